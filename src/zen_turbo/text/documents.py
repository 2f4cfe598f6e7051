"""Documents to a prompt: reading files and folders as text, and asking a question about them.

Formats are the business of ``readers``; what has structure is read there in a process of its own.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from zen_turbo.errors import DocumentError, DocumentNotFoundError
from zen_turbo.text.readers.apart import ReaderProcess
from zen_turbo.text.readers.document import Document, Reading
from zen_turbo.text.readers.kinds import MAGIC_BYTES, Kind, is_left_out, kind_of
from zen_turbo.text.readers.limits import check_characters
from zen_turbo.text.readers.plain import decode_text

__all__ = ["Document", "Reading", "build_messages", "documents_text", "read_documents", "read_file"]

_SYSTEM = "You are a helpful assistant. Answer the question from the documents that the user gives you, briefly and exactly."


def read_documents(paths: Sequence[Path]) -> Reading:
    """Read files, and folders recursively in sorted order; an archive that is named directly is read like a folder.

    In a folder or archive, hidden entries and package folders are not looked at; links, files that cannot be read and archives inside are left
    out and reported. A file named directly must be readable: raises DocumentNotFoundError, BinaryDocumentError, DocumentTooLargeError,
    DocumentTimeoutError, EncryptedDocumentError, or DocumentError (a format not supported, damaged, nothing to read).
    """
    documents: list[Document] = []
    skipped: list[tuple[str, str]] = []
    with ReaderProcess() as process:
        for path in paths:
            if not path.exists():
                raise DocumentNotFoundError(f"There is no file or folder {path}.")
            if not path.is_dir():
                reading = read_file(path, path.name, process)
                documents += reading.documents
                skipped += reading.skipped
                continue
            for file in _files(path):
                label = f"{path.resolve().name}/{file.relative_to(path)}"
                try:
                    documents += _read_in_folder(file, label, process)
                except DocumentError as error:
                    skipped.append((label, error.message))
    documents = [document for document in documents if document.text.strip()]
    if not documents:
        raise DocumentError("There is no text to read in " + ", ".join(map(str, paths)) + ".")
    return Reading(tuple(documents), tuple(skipped))


def _files(folder: Path) -> Iterator[Path]:
    for current, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not is_left_out(name))
        for name in sorted(files):
            file = Path(current, name)
            if not is_left_out(name) and not file.is_symlink() and file.is_file():
                yield file


def _read_in_folder(path: Path, label: str, process: ReaderProcess) -> Sequence[Document]:
    if _kind_of(path, label) is Kind.ZIP:
        raise DocumentError(f"{label} is an archive inside a folder; name it directly.")
    return read_file(path, label, process).documents


def read_file(path: Path, label: str, process: ReaderProcess, *, limit_text: bool = False) -> Reading:
    """One file: one document, or those of an archive. ``label`` names it in the prompt and in errors, and its extension says what it is.

    ``limit_text``: plain text, too, must keep to the limit of ``process``; other formats always must. Raises DocumentError and its kinds;
    may give documents without text.
    """
    kind = _kind_of(path, label)
    if kind is not Kind.TEXT:
        return process.read(path, label, kind)
    limit = process.limits.text_characters
    try:
        if limit_text and (size := path.stat().st_size) > 4 * limit:  # no character takes more than 4 bytes
            check_characters(size // 4, limit, label)
        raw = path.read_bytes()
    except OSError as error:
        raise DocumentError(f"{label} cannot be read: {error.strerror}.") from error
    text = decode_text(raw, label)
    if limit_text:
        check_characters(len(text), limit, label)
    return Reading((Document(label, text),))


def _kind_of(path: Path, label: str) -> Kind:
    try:
        with path.open("rb") as file:
            return kind_of(label, file.read(MAGIC_BYTES))
    except OSError as error:
        raise DocumentError(f"{label} cannot be read: {error.strerror}.") from error


def documents_text(documents: Sequence[Document]) -> str:
    """Documents as they stand in a prompt: each after a marker that carries its label, then a marker of the end. Lists that begin with the
    same documents begin with the same text."""
    parts = [f"=== {document.label} ===\n{document.text.rstrip()}\n" for document in documents]
    noun = "document" if len(documents) == 1 else f"{len(documents)} documents"
    return "\n".join(parts) + f"\n=== end of the {noun} ===\n\n"


def build_messages(documents: Sequence[Document], question: str) -> list[dict[str, str]]:
    """System message, then one user message: the documents, then the question. The documents come first, so that another question about them
    shares their prefix."""
    content = f"{documents_text(documents)}Question: {question}"
    return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": content}]
