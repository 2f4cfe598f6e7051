"""DOCX: the text of a Word document as it reads today: insertions kept, deletions left out, notes at the end.

Parsed as a stream of XML events, so that memory does not depend on what the file claims to be, and nesting costs nothing.
"""

from __future__ import annotations

from typing import BinaryIO

import defusedxml.ElementTree

from zen_turbo.errors import DocumentError
from zen_turbo.text.readers.limits import Budget
from zen_turbo.text.readers.package import Package, local_name, relative_to

# Properties hold tab stops that are no tabs; a Fallback repeats what its Choice says; moved text stands where it was moved to.
_SKIPPED = frozenset(("pPr", "rPr", "sectPr", "tblPr", "tblGrid", "trPr", "tcPr", "Fallback", "del", "moveFrom"))
_MARKS = {"tab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "-"}
_NOTES = {"footnote": "", "endnote": "e"}  # both count from 1: the letter tells them apart


def read_docx(file: BinaryIO, label: str, budget: Budget) -> str:
    """Paragraphs as lines, table cells separated by tabs, notes as ``[^1]`` with their text at the end.

    Raises DocumentError (damaged, no document inside, XML entities) and DocumentTooLargeError.
    """
    return text_of_docx(Package(file, label, budget), label, budget)


def text_of_docx(package: Package, label: str, budget: Budget) -> str:
    """``read_docx`` of a zip that is open."""
    mains = _related(package, "", "/officeDocument")
    if not mains:
        raise DocumentError(f"{label}: there is no document inside.")
    parts = [mains[0], *_related(package, mains[0], "/footnotes"), *_related(package, mains[0], "/endnotes")]
    return "\n".join(text for part in parts if (text := _text_of_part(package, part, budget)))


def _related(package: Package, part: str, kind: str) -> list[str]:
    """Parts that ``part`` ("" is the whole) names as its ``kind``: relationship types end alike in both dialects of the format."""
    folder, _, name = part.rpartition("/")
    relationships = f"{folder}/_rels/{name}.rels".lstrip("/")
    if relationships not in package:
        return []
    return [
        relative_to(part, element.get("Target") or "")
        for element in package.xml(relationships).iter()
        if local_name(element.tag) == "Relationship" and (element.get("Type") or "").endswith(kind) and element.get("TargetMode") != "External"
    ]


def _text_of_part(package: Package, part: str, budget: Budget) -> str:
    target = _Text(budget)
    package.feed(part, defusedxml.ElementTree.DefusedXMLParser(target=target))
    return target.text()


class _Text:
    """Target of an XML parser."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._parts: list[str] = []
        self._skipped = 0
        self._cells = 0
        self._in_text = False
        self._separators: list[bool] = []

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        name = local_name(tag)
        self._skipped += name in _SKIPPED
        self._cells += name == "tc"
        self._in_text = name == "t"
        if name in _MARKS:
            self._add(" " if self._cells and name != "noBreakHyphen" else _MARKS[name])
        elif name.removesuffix("Reference") in _NOTES and name not in _NOTES:
            self._add(self._note(name.removesuffix("Reference"), attributes))
        elif name in _NOTES:
            # Separators between text and notes are stored as notes of a type.
            self._separators.append(any(local_name(key) == "type" for key in attributes))
            self._skipped += self._separators[-1]
            self._add(self._note(name, attributes) + " ")

    def end(self, tag: str) -> None:
        name = local_name(tag)
        self._in_text = False
        if name in _NOTES:
            self._skipped -= self._separators.pop()
        if name == "p":
            self._add(" " if self._cells else "\n")
        elif name == "tc":
            self._cells -= 1
            self._add(" " if self._cells else "\t")
        elif name == "tr":
            self._add(" " if self._cells else "\n")
        self._skipped -= name in _SKIPPED

    def data(self, data: str) -> None:
        if self._in_text:
            self._add(data)

    def close(self) -> None:
        pass

    def text(self) -> str:
        lines = (line.rstrip().lstrip(" ") for line in "".join(self._parts).replace(" \t", "\t").split("\n"))
        return "\n".join(line for line in lines if line)

    def _add(self, text: str) -> None:
        if not self._skipped:
            self._budget.take_text(len(text))
            self._parts.append(text)

    def _note(self, kind: str, attributes: dict[str, str]) -> str:
        number = next((value for key, value in attributes.items() if local_name(key) == "id"), "")
        return f"[^{_NOTES[kind]}{number}]"
