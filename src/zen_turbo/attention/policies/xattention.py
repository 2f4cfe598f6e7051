"""XAttention (arXiv 2503.16428): blocks scored by sums along antidiagonals.

Groups of S tokens: logit[a, b] = sum_t q[a S + S - 1 - t] . k[b S + t] / (sqrt(d) S), a softmax over b, summed over each block pair; then the
largest blocks of every query block until they hold ``threshold`` of it. Every row and every key takes part, at 1 / S of the cost of scores:
thorough, and dear on a CPU. Here for comparison on equal kernels: blocks are 64 x 64 pages (published: 128).
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
class XAttentionSettings:
    """``stride`` S divides 64; ``threshold`` is the share of scores to keep."""

    threshold: float = 0.9
    stride: int = 8


def select(chunk: Chunk, settings: XAttentionSettings) -> BlockLists:
    energy = torch.zeros((chunk.num_heads, chunk.num_blocks, chunk.num_pages))
    for head, keys in chunk.heads():
        groups = keys.view(chunk.num_pages * PAGE_TOKENS // settings.stride, -1)  # [groups, S * D]
        for block in range(chunk.num_blocks):
            energy[head, block] = _block_energy(chunk, head, block, groups, settings.stride)
    keep = blocks.largest_by_mass(energy, settings.threshold)
    return blocks.lists_from_mask(keep, chunk, sink_pages=1, local_pages=0)


def _block_energy(chunk: Chunk, head: int, block: int, keys: torch.Tensor, stride: int) -> torch.Tensor:
    """float32 [pages]"""
    per_page, count = PAGE_TOKENS // stride, chunk.first_block + block + 1
    rows = slice(block * PAGE_TOKENS, min((block + 1) * PAGE_TOKENS, chunk.num_rows))
    parts = []
    factor = 1.0 if chunk.logit_factor is None else float(chunk.logit_factor[rows].mean())
    for variant, first, end in chunk.variant_runs(block, count):
        queries = chunk.queries[variant]
        assert queries is not None
        q = queries[rows, head].float()
        q = torch.cat((q, q.new_zeros(PAGE_TOKENS - len(q), q.shape[1])))
        q = q.view(per_page, stride, -1).flip(1).reshape(per_page, -1)  # [groups, S * D], antidiagonals
        parts.append(q @ keys[first * per_page : end * per_page].T)
    logits = torch.cat(parts, dim=1) * (chunk.scale * factor / stride)
    own = (count - 1) * per_page + torch.arange(per_page)
    logits = logits.masked_fill(torch.arange(count * per_page) > own[:, None], -torch.inf)
    energy = torch.zeros(chunk.num_pages)
    groups = -(-(rows.stop - rows.start) // stride)  # the rest of a last block has no rows, and no say
    energy[:count] = logits[:groups].softmax(dim=-1).sum(dim=0).view(count, per_page).sum(dim=1)
    return energy
