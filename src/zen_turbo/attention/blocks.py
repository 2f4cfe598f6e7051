"""Which key pages a query block reads: building the lists that the kernel takes, and their invariants.

A list is CSR over query blocks of 64 rows: ascending entries ``page * 4 + variant``. Variant is the span distance between query and key
(0 same, 1 previous, 2 older), known from positions alone, so a policy only says which pages to keep. Because page, block and chunk divide the
span L, no page and no block straddles two spans.
"""

from __future__ import annotations

import torch

from zen_turbo.config import PAGE_TOKENS
from zen_turbo.kernels import BlockLists


def num_blocks(num_rows: int) -> int:
    return -(-num_rows // PAGE_TOKENS)


def variants(pages: torch.Tensor, query_pages: torch.Tensor, span_pages: int | None) -> torch.Tensor:
    """Rotation variant of each (query page, key page); broadcasts. ``span_pages`` is L / 64, None without Dual Chunk Attention."""
    if span_pages is None:
        return torch.zeros_like(pages + query_pages)
    return (query_pages // span_pages - pages // span_pages).clamp_max(2)


def dense_lists(*, first_position: int, num_rows: int, num_heads: int, span_pages: int | None, window: int | None = None) -> BlockLists:
    """Every causal page (inside the sliding window, if any) for every block; one list for all heads.

    first_position must be a multiple of 64 unless num_rows is 1. Size: int32 per (block, page), shared by all heads.
    """
    assert first_position % PAGE_TOKENS == 0 or num_rows == 1
    first_block = first_position // PAGE_TOKENS
    blocks = torch.arange(first_block, first_block + num_blocks(num_rows), dtype=torch.int64)
    first_rows = blocks * PAGE_TOKENS if num_rows > 1 else torch.tensor([first_position])
    begins = ((first_rows - window + 1).clamp_min(0) // PAGE_TOKENS) if window else torch.zeros_like(blocks)
    counts = blocks + 1 - begins
    offsets = torch.zeros(len(blocks) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=offsets[1:])
    query_pages = torch.repeat_interleave(blocks, counts)
    pages = torch.arange(int(offsets[-1])) - torch.repeat_interleave(offsets[:-1] - begins, counts)
    entries = (pages * 4 + variants(pages, query_pages, span_pages)).to(torch.int32)
    return BlockLists(offsets, entries, num_heads)


def density(lists: BlockLists, *, first_position: int, num_rows: int) -> float:
    """Kept (query block, key page) pairs over causal pairs, averaged over the lists."""
    first_block = first_position // PAGE_TOKENS
    count = num_blocks(num_rows)
    causal = sum(range(first_block + 1, first_block + count + 1))
    num_lists = (lists.offsets.numel() - 1) // count
    return lists.entries.numel() / (causal * num_lists)
