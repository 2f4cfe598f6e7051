"""EPUB: a zip of XHTML chapters, read in the order of the book's spine."""

from __future__ import annotations

from typing import BinaryIO
from xml.etree.ElementTree import Element

from zen_turbo.errors import DocumentError, EncryptedDocumentError
from zen_turbo.text.readers.limits import Budget
from zen_turbo.text.readers.markup import html_to_text
from zen_turbo.text.readers.package import Package, local_name, relative_to
from zen_turbo.text.readers.plain import decode_text

_CONTAINER, _ENCRYPTION = "META-INF/container.xml", "META-INF/encryption.xml"
_CHAPTERS = ("application/xhtml+xml", "text/html")


def read_epub(file: BinaryIO, label: str, budget: Budget) -> str:
    """Title and authors, then the chapters with an empty line between.

    Raises DocumentError (damaged, no chapters), EncryptedDocumentError (chapters under rights management), DocumentTooLargeError.
    """
    return text_of_epub(Package(file, label, budget), label, budget)


def text_of_epub(package: Package, label: str, budget: Budget) -> str:
    """``read_epub`` of a zip that is open."""
    roots = [element.get("full-path") for element in _named(package.xml(_CONTAINER), "rootfile")]
    if not roots or not roots[0]:
        raise DocumentError(f"{label}: {_CONTAINER} names no book.")
    root = roots[0]
    book = package.xml(root)
    items = {item.get("id"): item for item in _named(book, "item")}
    encrypted = _encrypted(package)
    texts = [_title(book)]
    budget.take_text(len(texts[0]))
    for reference in _named(book, "itemref"):
        item = items.get(reference.get("idref"))
        if item is None:
            raise DocumentError(f"{label}: the spine names {reference.get('idref')!r}, which is not in the manifest.")
        if item.get("media-type") not in _CHAPTERS:
            continue  # a picture may be a page of its own
        name = relative_to(root, item.get("href") or "")
        if name in encrypted:
            raise EncryptedDocumentError(f"{label}: {name} is encrypted (rights management); only books without it can be read.")
        text = html_to_text(decode_text(package.read(name), f"{label}: {name}", declared=True))
        budget.take_text(len(text))
        texts.append(text)
    return "\n\n".join(text for text in texts if text)


def _named(tree: Element, name: str) -> list[Element]:
    return [element for element in tree.iter() if local_name(element.tag) == name]


def _title(book: Element) -> str:
    lines = []
    for name, caption in (("title", "Title"), ("creator", "Author")):
        values = [" ".join((element.text or "").split()) for element in _named(book, name)]
        if text := ", ".join(value for value in values if value):
            lines.append(f"{caption}: {text}")
    return "\n".join(lines)


def _encrypted(package: Package) -> set[str]:
    """Members that are encrypted one by one. Fonts often are, which does not concern us."""
    if _ENCRYPTION not in package:
        return set()
    return {relative_to("", element.get("URI") or "") for element in _named(package.xml(_ENCRYPTION), "CipherReference")}
