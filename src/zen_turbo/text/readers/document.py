"""What readers give: documents with labels, and what was left out."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAX_LABEL_CHARACTERS = 255  # what file systems allow for one name

_DRIVE = re.compile(r"^[A-Za-z]:")


@dataclass(frozen=True)
class Document:
    """``label``: the path as the user would recognise it."""

    label: str
    text: str


@dataclass(frozen=True)
class Reading:
    """What was read, and what a folder or an archive held that was left out, with the reason."""

    documents: tuple[Document, ...]
    skipped: tuple[tuple[str, str], ...] = ()


def clean_label(name: str) -> str:
    """A name from a stranger as a label: a relative path with forward slashes, without ``..``, drive or anything that does not print, so
    that it stays on its line between the markers of a prompt. May be empty. It is shown, never opened."""
    parts = _DRIVE.sub("", name.replace("\\", "/")).split("/")
    kept = (" ".join("".join(character if character.isprintable() else " " for character in part).split()) for part in parts)
    return "/".join(part for part in kept if part not in ("", ".", ".."))
