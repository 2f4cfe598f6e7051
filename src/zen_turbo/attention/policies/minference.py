"""Vertical-slash selection of MInference (arXiv 2407.02490), as the Qwen2.5-1M report uses it (2501.15383).

The chunk's last 64 queries are scored exactly against every key. Keys with the most mass (verticals) are kept for all queries of the chunk,
and so are the diagonals with the most mass (slashes). Budgets are per head: the checkpoint's own where it ships a sparse_attention_config,
else the commonest of the published ones.

What differs here: whole pages are read, so verticals and slashes are rounded up to pages (more is read and kept than by the original, which
gathers columns), and the last queries are those of the fixed grid's chunk. Scores use the rotations that attention uses.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from zen_turbo.attention import blocks
from zen_turbo.attention.blocks import Chunk
from zen_turbo.config import PAGE_TOKENS
from zen_turbo.errors import UnsupportedModelError

if TYPE_CHECKING:
    from zen_turbo.kernels import BlockLists

LAST_QUERIES = 64
_SINK_TOKENS, _NEAR_TOKENS = 30, 100  # lines that are always kept


@dataclass(frozen=True, kw_only=True)
class MinferenceSettings:
    """Lines to keep per head. ``budgets``: (layer, head) -> (verticals, slashes) of a checkpoint that says so."""

    verticals: int = 1000
    slashes: int = 6096
    budgets: Mapping[tuple[int, int], tuple[int, int]] = field(default_factory=dict)


def budgets_of(layers: object) -> dict[tuple[int, int], tuple[int, int]]:
    """A published sparse_attention_config: for each layer {head: [kind, verticals, slashes, ...]}; None is none. Raises
    UnsupportedModelError for another shape or kind: a head read by other budgets than its own would be wrong in silence."""
    found: dict[tuple[int, int], tuple[int, int]] = {}
    if not isinstance(layers, list | None):
        raise UnsupportedModelError("sparse_attention_config is not a list of layers.")
    for layer, heads in enumerate(layers or []):
        for head, row in heads.items() if isinstance(heads, Mapping) else ((None, heads),):
            usable = head is not None and str(head).isdecimal() and isinstance(row, list) and len(row) >= 3 and row[0] == "vertical_and_slash"
            if not usable or not all(isinstance(count, int) and count > 0 for count in row[1:3]):
                raise UnsupportedModelError(f"sparse_attention_config: layer {layer}, head {head} is not vertical_and_slash: {str(row)[:80]}.")
            found[layer, int(head)] = (row[1], row[2])
    return found


def select(chunk: Chunk, layer: int, settings: MinferenceSettings) -> BlockLists:
    """Memory: a few float32 rows of 64 queries by all keys, for one head at a time."""
    keep = torch.zeros((chunk.num_heads, chunk.num_blocks, chunk.num_pages), dtype=torch.bool)
    for head, keys in chunk.heads():
        verticals, slashes = settings.budgets.get((layer, head), (settings.verticals, settings.slashes))
        keep[head] = _keep(chunk, head, keys, verticals, slashes)
    return blocks.lists_from_mask(keep, chunk, sink_pages=1, local_pages=1)


def _keep(chunk: Chunk, head: int, keys: torch.Tensor, verticals: int, slashes: int) -> torch.Tensor:
    """bool [blocks, pages]"""
    # The last rows of the last query block: their rotations differ from those of the block before where a span begins between the two.
    rows = torch.arange(max((chunk.num_rows - 1) // PAGE_TOKENS * PAGE_TOKENS, chunk.num_rows - LAST_QUERIES), chunk.num_rows)
    end = chunk.first_position + chunk.num_rows
    positions = chunk.first_position + rows
    logits = chunk.logits(rows, head, keys)[:, :end]
    logits = logits.masked_fill(torch.arange(end) > positions[:, None], -torch.inf)
    mass = logits.softmax(dim=-1)  # [rows, keys]
    vertical = mass.sum(dim=0)
    slash = torch.zeros(end)  # by distance
    for row, position in zip(mass, positions.tolist(), strict=True):
        slash[: position + 1] += row[: position + 1].flip(0)
    vertical[:_SINK_TOKENS] = torch.inf
    slash[:_NEAR_TOKENS] = torch.inf
    lines = vertical.topk(min(verticals, end)).indices
    distances = slash.topk(min(slashes, end)).indices
    pages = torch.zeros(chunk.num_pages, dtype=torch.bool)
    pages[lines // PAGE_TOKENS] = True
    # A slash at distance s crosses, for queries of block b, the pages b - s // 64 and, unless s is a multiple of 64, the one before.
    offsets = torch.zeros(chunk.num_pages + 1, dtype=torch.bool)
    offsets[distances // PAGE_TOKENS] = True
    offsets[distances[distances % PAGE_TOKENS > 0] // PAGE_TOKENS + 1] = True
    apart = chunk.first_block + torch.arange(chunk.num_blocks)[:, None] - torch.arange(chunk.num_pages)
    return pages | (offsets[apart.clamp_min(0)] & (apart >= 0))
