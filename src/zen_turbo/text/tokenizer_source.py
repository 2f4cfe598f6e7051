"""Where a tokenizer comes from: plain data, so that checkpoint loading and tokenisation do not import each other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TokenizerSource:
    """kind "gguf": ``gguf_fields`` holds every ``tokenizer.*`` metadata value as plain Python. kind "hf": ``folder`` holds tokenizer.json."""

    kind: str
    gguf_fields: dict[str, Any] | None = None
    folder: Path | None = None
