"""Real text of any length for measurements: the Python standard library's own source, or files of the user's choice.

Random tokens would be easier and wrong: what a sparse policy keeps, and how fast a tokenizer is, depends on the text.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from zen_turbo.errors import DocumentError
from zen_turbo.text.documents import read_documents

_SKIPPED_FOLDERS = frozenset(("site-packages", "dist-packages", "__pycache__"))
_CHARACTERS_PER_TOKEN = 4
_SPARE_TOKENS = 16


class Encoder(Protocol):
    def encode(self, text: str) -> list[int]: ...


def standard_library() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def standard_library_files() -> list[Path]:
    """Its Python files, without installed packages, in sorted order of their path."""
    root = standard_library()
    files = [path for path in root.rglob("*.py") if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)]
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _texts(source: Path | None) -> Iterator[str]:
    if source is not None:
        yield from (document.text for document in read_documents([source]).documents)
        return
    for path in standard_library_files():
        try:
            yield path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # a few files of its tests are in other encodings, on purpose


def read_tokens(encoder: Encoder, num_tokens: int, source: Path | None = None) -> list[int]:
    """The first ``num_tokens`` tokens of the text: no template, no special tokens. ``source``: a file or folder, None the standard library.

    Reads and encodes only as much text as is needed. Raises DocumentError if there is too little, and what reading documents raises.
    """
    texts = _texts(source)
    pieces: list[str] = []
    num_characters, wanted = 0, num_tokens * _CHARACTERS_PER_TOKEN + 4096
    while True:
        ended = True
        for text in texts:
            pieces.append(text)
            num_characters += len(text)
            if num_characters >= wanted:
                ended = False
                break
        whole = "\n".join(pieces)
        # Cut at a line end and keep some tokens to spare: the last token of a cut text may not be one of the whole text.
        tokens = encoder.encode(whole if ended else whole[: whole.rfind("\n", 0, wanted) + 1])
        if len(tokens) >= num_tokens + (0 if ended else _SPARE_TOKENS):
            return tokens[:num_tokens]
        if ended:
            raise DocumentError(f"{source or 'The standard library'} has only {len(tokens)} tokens; {num_tokens} are needed.")
        wanted *= 2


def fingerprint(token_ids: Sequence[int]) -> str:
    """Short hash of token ids: two records with the same one used the same prompt."""
    return hashlib.sha256(",".join(map(str, token_ids)).encode()).hexdigest()[:16]
