"""FlexPrefill (arXiv 2502.20766): each head decides between vertical-slash lines and a map of blocks, by what its last queries look at.

The last query block's exact scores give column and diagonal masses. If mean queries against mean keys predict the pooled column masses well
(square root of the Jensen-Shannon divergence below tau), the head is read by a map of blocks that holds ``gamma`` of the estimated mass of the
whole chunk; else by the fewest vertical blocks and block diagonals that hold ``gamma`` of the measured masses.

Blocks are pages of 64 (published: 128), and the last queries are those of the fixed grid's chunk, so that it works chunk by chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zen_turbo.attention import blocks
from zen_turbo.attention.blocks import Chunk
from zen_turbo.config import PAGE_TOKENS

if TYPE_CHECKING:
    from zen_turbo.kernels import BlockLists


@dataclass(frozen=True, kw_only=True)
class FlexPrefillSettings:
    gamma: float = 0.9
    tau: float = 0.1
    min_tokens: int = 512


def select(chunk: Chunk, settings: FlexPrefillSettings) -> BlockLists:
    keep = torch.zeros((chunk.num_heads, chunk.num_blocks, chunk.num_pages), dtype=torch.bool)
    for head, keys in chunk.heads():
        keep[head] = _keep(chunk, head, keys, settings)
    return blocks.lists_from_mask(keep, chunk, sink_pages=1, local_pages=0)


def _keep(chunk: Chunk, head: int, keys: torch.Tensor, settings: FlexPrefillSettings) -> torch.Tensor:
    """bool [blocks, pages]"""
    rows = torch.arange((chunk.num_rows - 1) // PAGE_TOKENS * PAGE_TOKENS, chunk.num_rows)
    positions, padded = chunk.first_position + rows, chunk.num_pages * PAGE_TOKENS
    logits = chunk.logits(rows, head, keys).masked_fill(torch.arange(padded) > positions[:, None], -torch.inf)
    mass = logits.softmax(dim=-1)  # [rows, keys]
    vertical = mass.mean(dim=0).view(chunk.num_pages, PAGE_TOKENS).sum(dim=1)  # [pages]
    slash = torch.zeros(padded)
    for row, position in zip(mass, positions.tolist(), strict=True):
        slash[: position + 1] += row[: position + 1].flip(0) / len(rows)
    diagonal = slash.view(chunk.num_pages, PAGE_TOKENS).sum(dim=1)  # [pages apart]
    means = keys.view(chunk.num_pages, PAGE_TOKENS, -1).mean(dim=1)
    estimate = _map_row(chunk, head, means, chunk.num_blocks - 1)
    least = settings.min_tokens // PAGE_TOKENS
    apart = chunk.first_block + torch.arange(chunk.num_blocks)[:, None] - torch.arange(chunk.num_pages)
    if _divergence(estimate, vertical) < settings.tau:
        energy = torch.stack([_map_row(chunk, head, means, block) for block in range(chunk.num_blocks)])
        keep = blocks.largest_by_mass(energy.view(-1), settings.gamma).view_as(energy)  # of the whole map
        pages, diagonals = _top(vertical, least), _top(diagonal, least)
    else:
        keep = torch.zeros_like(apart, dtype=torch.bool)
        pages = _top(vertical, max(least, int(blocks.largest_by_mass(vertical, settings.gamma).sum())))
        diagonals = _top(diagonal, max(least, int(blocks.largest_by_mass(diagonal, settings.gamma).sum())))
    return keep | pages | (diagonals[apart.clamp_min(0)] & (apart >= 0))


def _map_row(chunk: Chunk, head: int, means: torch.Tensor, block: int) -> torch.Tensor:
    """Softmax of the block's mean query over the pages up to its own, float32 [pages]."""
    rows = torch.arange(block * PAGE_TOKENS, min((block + 1) * PAGE_TOKENS, chunk.num_rows))
    count = chunk.first_block + block + 1
    result = torch.zeros(chunk.num_pages)
    # The mean of logits is the logit of the mean query.
    result[:count] = chunk.logits(rows, head, means[:count], per_page=1).mean(dim=0).softmax(dim=0)
    return result


def _top(mass: torch.Tensor, count: int) -> torch.Tensor:
    keep = torch.zeros_like(mass, dtype=torch.bool)
    keep[mass.topk(min(count, len(mass))).indices] = True
    return keep


def _divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """Square root of the Jensen-Shannon divergence, natural logarithm."""
    middle = (p + q) / 2
    total = sum(float(torch.special.xlogy(x, x / middle.clamp_min(1e-30)).sum()) for x in (p, q))
    return max(total / 2, 0.0) ** 0.5
