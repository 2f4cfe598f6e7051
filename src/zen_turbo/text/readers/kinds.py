"""Which reader a file needs, from its name, and from its first bytes where the name says nothing."""

from __future__ import annotations

import enum
from pathlib import PurePosixPath

from zen_turbo.errors import DocumentError


class Kind(enum.StrEnum):
    TEXT = "text"
    HTML = "html"
    PDF = "pdf"
    EPUB = "epub"
    DOCX = "docx"
    ZIP = "zip"


_KINDS = {
    ".html": Kind.HTML,
    ".htm": Kind.HTML,
    ".xhtml": Kind.HTML,
    ".pdf": Kind.PDF,
    ".epub": Kind.EPUB,
    ".docx": Kind.DOCX,
    ".docm": Kind.DOCX,
    ".zip": Kind.ZIP,
}
_REFUSED = frozenset(".odt .ods .odp .rtf .doc .ppt .pptx .xls .xlsx .pages .mobi .azw .azw3 .djvu .tar .tgz .gz .bz2 .xz .7z .rar".split())
_MAGIC = ((b"%PDF-", Kind.PDF), (b"PK\x03\x04", Kind.ZIP))
MAGIC_BYTES = max(len(magic) for magic, _ in _MAGIC)


def kind_of(name: str, head: bytes) -> Kind:
    """``name``: a file's name or label; ``head``: its first MAGIC_BYTES, which count where the name has no extension. Everything that is not
    known is tried as text. Raises DocumentError for a format that is known and not read."""
    suffix = PurePosixPath(name).suffix.lower()
    if suffix in _REFUSED:
        raise DocumentError(f"{name}: {suffix} files are not supported; convert it to PDF, DOCX or text first.")
    if not suffix:
        return next((kind for magic, kind in _MAGIC if head.startswith(magic)), Kind.TEXT)
    return _KINDS.get(suffix, Kind.TEXT)


_SKIPPED_FOLDERS = frozenset(("node_modules", "__pycache__", "site-packages", "dist-packages", "__MACOSX"))


def is_left_out(name: str) -> bool:
    """Whether a folder's or archive's entry of this name (one component) is never looked at: hidden, or of a tool."""
    return name.startswith(".") or name in _SKIPPED_FOLDERS
