"""Zip archives: each member a document, its path the label."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import BinaryIO

from zen_turbo.errors import DocumentError, DocumentTooLargeError, EncryptedDocumentError
from zen_turbo.text.readers.document import MAX_LABEL_CHARACTERS, Document, Reading, clean_label
from zen_turbo.text.readers.docx import text_of_docx
from zen_turbo.text.readers.epub import text_of_epub
from zen_turbo.text.readers.kinds import MAGIC_BYTES, Kind, is_left_out, kind_of
from zen_turbo.text.readers.limits import Budget
from zen_turbo.text.readers.package import Package, is_link

# Beyond this many the rest is counted, so that what is reported stays readable and bounded.
_REPORTED = 1000


def read_archive(file: BinaryIO, label: str, budget: Budget, read: Callable[[Kind, BinaryIO, str, Budget], str]) -> Reading:
    """Members in sorted order, read with ``read``; labels are ``archive/path``. Hidden and tool folders are not looked at; links, archives
    inside, names that lead outside and members that are no documents are left out and reported.

    An EPUB or DOCX whose name does not say so is read as what it is. Raises DocumentError, EncryptedDocumentError, and
    DocumentTooLargeError for the archive as a whole: its members share one budget.
    """
    package = Package(file, label, budget)
    if "META-INF/container.xml" in package and "mimetype" in package:
        return Reading((Document(label, text_of_epub(package, label, budget)),))
    if "[Content_Types].xml" in package and "word/document.xml" in package:
        return Reading((Document(label, text_of_docx(package, label, budget)),))
    if any(entry.flag_bits & 0x1 for entry in package.entries):
        raise EncryptedDocumentError(f"{label} is encrypted; only archives without a password can be read.")
    documents: list[Document] = []
    skipped: list[tuple[str, str]] = []
    for entry in sorted(package.entries, key=lambda entry: _files_first(entry.filename)):
        name = clean_label(entry.filename)
        if any(is_left_out(part) for part in name.split("/")):
            continue
        inside = f"{label}/{name}"
        try:
            if is_link(entry):
                raise DocumentError(f"{inside} is a link.")
            if _leads_outside(entry.filename):
                raise DocumentError(f"{inside}: its name leads outside the archive.")
            if len(name) > MAX_LABEL_CHARACTERS:
                raise DocumentError(f"{inside}: its name has {len(name)} characters; at most {MAX_LABEL_CHARACTERS} are read.")
            data = b"" if kind_of(name, b"") is Kind.ZIP else package.read_entry(entry)
            kind = kind_of(name, data[:MAGIC_BYTES])
            if kind is Kind.ZIP:
                raise DocumentError(f"{inside} is an archive inside an archive; name it directly.")
            text = read(kind, io.BytesIO(data), inside, budget)
        except DocumentTooLargeError:
            raise
        except DocumentError as error:
            skipped.append((inside, error.message))
            continue
        if text.strip():
            budget.take_text(len(inside))
            documents.append(Document(inside, text))
    if len(skipped) > _REPORTED:
        skipped[_REPORTED:] = [(label, f"{len(skipped) - _REPORTED} more were left out")]
    return Reading(tuple(documents), tuple((where[-2 * MAX_LABEL_CHARACTERS :], reason[:1000]) for where, reason in skipped))


def _leads_outside(name: str) -> bool:
    path = name.replace("\\", "/")
    return path.startswith("/") or path[1:2] == ":" or ".." in path.split("/")


def _files_first(name: str) -> list[tuple[bool, str]]:
    """Order of a walk: the files of a folder, then its folders."""
    *folders, file = name.split("/")
    return [*((True, folder) for folder in folders), (False, file)]
