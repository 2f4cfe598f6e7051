"""Tri-shape (SCBench, arXiv 2412.10319; A-shape is StreamingLLM's, 2309.17453): sinks, a sliding window, and a dense end of the prompt.

Looks at positions only. The dense end is the engine's, the same for every policy. The cheapest policy there is, and blind to what lies between:
the floor that others are measured against.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zen_turbo.attention import blocks
from zen_turbo.attention.blocks import Chunk

if TYPE_CHECKING:
    from zen_turbo.kernels import BlockLists


@dataclass(frozen=True, kw_only=True)
class TriShapeSettings:
    """In pages of 64 tokens: the published 128 and 1920 tokens."""

    sink_pages: int = 2
    local_pages: int = 30


def select(chunk: Chunk, settings: TriShapeSettings) -> BlockLists:
    nothing = torch.zeros((1, chunk.num_blocks, chunk.num_pages), dtype=torch.bool)
    return blocks.lists_from_mask(nothing, chunk, sink_pages=settings.sink_pages, local_pages=settings.local_pages)
