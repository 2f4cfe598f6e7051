"""PDF: the text layer, page by page.

Pages of a document with more than one are marked ``[page 12]``, counted as a viewer counts them. It costs a page three or four tokens of its
five hundred, and the model can then say where something stands, which is what people ask of a paper or a contract.
"""

from __future__ import annotations

from typing import BinaryIO

import pypdf

from zen_turbo.errors import DocumentError, EncryptedDocumentError
from zen_turbo.text.readers.limits import Budget

# Typesetters' joined letters, which a model has hardly seen.
_LIGATURES = {0xFB00: "ff", 0xFB01: "fi", 0xFB02: "fl", 0xFB03: "ffi", 0xFB04: "ffl", 0xFB05: "st", 0xFB06: "st"}
_CONTROLS = {code: None for code in range(32) if chr(code) not in "\t\n\r"}


def read_pdf(file: BinaryIO, label: str, budget: Budget) -> str:
    """The title if the file has one, then the pages; a page that cannot be read says so in its place.

    Raises DocumentError (damaged, or no text: a scan), EncryptedDocumentError (it opens only with a password), DocumentTooLargeError.
    """
    try:
        reader = pypdf.PdfReader(file)
        locked = reader.is_encrypted and not reader.decrypt("")
        count = 0 if locked else len(reader.pages)
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # the library lets anything out that a damaged file causes
        raise DocumentError(f"{label} is no PDF, or a damaged one: {_reason(error)}.") from error
    if locked:
        raise EncryptedDocumentError(f"{label} opens only with a password; save a copy without one.")
    texts, reasons = [], []
    for number in range(count):
        try:
            text = _clean(reader.pages[number].extract_text())
        except MemoryError:
            raise
        except Exception as error:
            reasons.append(_reason(error))
            text = f"[this page could not be read: {reasons[-1]}]"
        budget.take_text(len(text))
        texts.append(text.strip())
    if len(reasons) == count:
        raise DocumentError(f"{label}: none of its {count} pages can be read" + (f": {reasons[0]}." if reasons else "."))
    if not any(texts):
        raise DocumentError(f"{label} has {count} pages and no text, as scans have; it needs text recognition first.")
    if count > 1:
        texts = [f"[page {number}]\n{text}" for number, text in enumerate(texts, 1)]
    return "\n\n".join([*_title(reader, budget), *texts])


def _title(reader: pypdf.PdfReader, budget: Budget) -> list[str]:
    try:
        title = " ".join(_clean(str((reader.metadata and reader.metadata.title) or "")).split())
    except MemoryError:
        raise
    except Exception:  # the text is there, and that is what was asked for
        return []
    budget.take_text(len(title))
    return [f"Title: {title}"] if title else []


def _clean(text: str) -> str:
    """Text that can be encoded, without control characters."""
    return text.encode("utf-8", "replace").decode().translate(_LIGATURES | _CONTROLS)


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__} {error}".split())[:100]
