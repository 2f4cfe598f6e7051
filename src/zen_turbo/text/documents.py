"""Documents to a prompt: reading files and folders as text, and asking a question about them."""

from __future__ import annotations

import codecs
import html.parser
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from zen_turbo.errors import BinaryDocumentError, DocumentError, DocumentNotFoundError

_SKIPPED_FOLDERS = frozenset(("node_modules", "__pycache__", "site-packages", "dist-packages"))
_HTML = frozenset((".html", ".htm", ".xhtml"))
_NOT_YET = frozenset((".pdf", ".epub", ".docx", ".odt", ".rtf", ".doc"))
_SYSTEM = "You are a helpful assistant. Answer the question from the documents that the user gives you, briefly and exactly."


@dataclass(frozen=True)
class Document:
    """``label``: the path as the user would recognise it."""

    label: str
    text: str


@dataclass(frozen=True)
class Reading:
    """What was read, and what a folder held that was left out, with the reason."""

    documents: tuple[Document, ...]
    skipped: tuple[tuple[str, str], ...]


def read_documents(paths: Sequence[Path]) -> Reading:
    """Read files, and folders recursively in sorted order.

    In a folder, hidden entries, package folders, links and files that are not text are left out and reported. A file named directly must be
    text: raises DocumentNotFoundError, BinaryDocumentError, or DocumentError (a format not supported, nothing to read).
    """
    documents: list[Document] = []
    skipped: list[tuple[str, str]] = []
    for path in paths:
        if not path.exists():
            raise DocumentNotFoundError(f"There is no file or folder {path}.")
        if not path.is_dir():
            documents.append(Document(path.name, read_text(path)))
            continue
        for file in _files(path):
            label = f"{path.resolve().name}/{file.relative_to(path)}"
            try:
                documents.append(Document(label, read_text(file)))
            except DocumentError as error:
                skipped.append((label, error.message))
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise DocumentError("There is no text to read in " + ", ".join(map(str, paths)) + ".")
    return Reading(tuple(documents), tuple(skipped))


def _files(folder: Path) -> Iterator[Path]:
    for current, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _SKIPPED_FOLDERS)
        for name in sorted(files):
            file = Path(current, name)
            if not name.startswith(".") and not file.is_symlink() and file.is_file():
                yield file


def read_text(path: Path) -> str:
    """One file as text: UTF-8 (with or without mark) or UTF-16 with mark; HTML without its tags.

    Raises BinaryDocumentError for anything else and DocumentError for a format that is not supported yet or an unreadable file.
    """
    if path.suffix.lower() in _NOT_YET:
        raise DocumentError(f"{path}: {path.suffix} files are not supported yet; convert it to text first.")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DocumentError(f"{path} cannot be read: {error.strerror}.") from error
    encoding = "utf-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise BinaryDocumentError(f"{path} is not text: byte {error.start} is not valid {encoding.removesuffix('-sig')}.") from error
    if "\0" in text:
        raise BinaryDocumentError(f"{path} is not text: it contains NUL characters.")
    return html_to_text(text) if path.suffix.lower() in _HTML else text


class _TextOfHtml(html.parser.HTMLParser):
    _HIDDEN = frozenset(("script", "style", "template", "head"))
    _BLOCKS = frozenset(("p", "div", "br", "li", "tr", "h1", "h2", "h3", "h4", "h5", "h6", "pre", "section", "article", "table", "ul", "ol"))

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._hidden += tag in self._HIDDEN
        if tag in self._BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._HIDDEN and self._hidden:
            self._hidden -= 1
        if tag in self._BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self.parts.append(data)


def html_to_text(source: str) -> str:
    parser = _TextOfHtml()
    parser.feed(source)
    parser.close()
    lines = [" ".join(line.split()) for line in "".join(parser.parts).splitlines()]
    return "\n".join(line for line in lines if line)


def build_messages(documents: Sequence[Document], question: str) -> list[dict[str, str]]:
    """System message, then one user message: each document between markers that carry its label, then the question. The documents come
    first, so that another question about them shares their prefix."""
    parts = [f"=== {document.label} ===\n{document.text.rstrip()}\n" for document in documents]
    noun = "document" if len(documents) == 1 else f"{len(documents)} documents"
    content = "\n".join(parts) + f"\n=== end of the {noun} ===\n\nQuestion: {question}"
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": content}]
