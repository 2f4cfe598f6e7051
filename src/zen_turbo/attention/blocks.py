"""Which key pages a query block reads: building the lists that the kernel takes, and their invariants.

A list is CSR over query blocks of 64 rows: ascending entries ``page * 4 + variant``. Variant is the span distance between query and key
(0 same, 1 previous, 2 older), known from positions alone, so a policy only says which pages to keep. Because page, block and chunk divide the
span L, no page and no block straddles two spans.
"""

from __future__ import annotations

import torch

from zen_turbo import kernels
from zen_turbo.config import PAGE_TOKENS
from zen_turbo.kernels import BlockLists, PageBits, PageView


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


def from_bits(chosen: PageBits, *, first_position: int, num_heads: int, span_pages: int | None) -> BlockLists:
    """Lists of the pages that ``chosen`` has for each query block, with the variants that spans ask for; one list per row of bits."""
    first_block = first_position // PAGE_TOKENS
    return kernels.list_pages(chosen, first_block=first_block, span_pages=span_pages, heads_per_list=num_heads // chosen.bits.shape[0])


def pack_bits(keep: torch.Tensor, *, first_position: int, sink_pages: int = 0, local_pages: int = 0) -> PageBits:
    """bool [lists, blocks, pages] -> bits, with what every policy must keep and must not: the diagonal, ``local_pages`` before it and the
    first ``sink_pages`` are set, pages after the diagonal are cleared."""
    num_lists, num_blocks, num_pages = keep.shape
    diagonal = first_position // PAGE_TOKENS + torch.arange(num_blocks)[:, None]
    pages = torch.arange(num_pages)
    keep = (keep | (pages >= diagonal - local_pages) | (pages < sink_pages)) & (pages <= diagonal)
    words = -(-num_pages // 64)
    padded = torch.zeros((num_lists, num_blocks, words * 64), dtype=torch.int64)
    padded[..., :num_pages] = keep
    bits = (padded.view(num_lists, num_blocks, words, 64) << torch.arange(64)).sum(dim=-1)
    return PageBits(bits, keep.sum(dim=-1, dtype=torch.int32))


def _every_page(first_position: int, count: int) -> PageBits:
    num_pages = first_position // PAGE_TOKENS + count
    return pack_bits(torch.ones((1, count, num_pages), dtype=torch.bool), first_position=first_position)


def select_by_mass(
    queries: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    kv: PageView,
    mass: torch.Tensor,
    *,
    first_position: int,
    scale: float,
    span_pages: int | None,
    sink_pages: int,
    local_pages: int,
    most_pages: int | None = None,
    sample_rows: int = 8,
    logit_factor: torch.Tensor | None = None,
    sparse_blocks: range | None = None,
) -> BlockLists:
    """The pages of largest estimated mass for each head and query block, natively; see ``kernels.select_pages``. Query blocks of this run
    outside ``sparse_blocks``, if that is given, read everything."""
    chosen = kernels.select_pages(
        queries,
        kv,
        mass,
        first_position=first_position,
        scale=scale,
        span_pages=span_pages,
        sink_pages=sink_pages,
        local_pages=local_pages,
        most_pages=most_pages,
        sample_rows=sample_rows,
        logit_factor=logit_factor,
    )
    dense = [block for block in range(chosen.bits.shape[1]) if sparse_blocks is not None and block not in sparse_blocks]
    if dense:
        everything = _every_page(first_position, chosen.bits.shape[1])
        chosen.bits[:, dense] = everything.bits[:, dense]
        chosen.counts[:, dense] = everything.counts[:, dense]
    return from_bits(chosen, first_position=first_position, num_heads=mass.shape[0], span_pages=span_pages)


def pages_read(lists: BlockLists, *, block: int, num_blocks: int, num_heads: int) -> torch.Tensor:
    """How many pages each head's list of one query block has, int64 [num_heads]."""
    first = torch.arange(num_heads) // lists.heads_per_list * num_blocks + block
    return lists.offsets[first + 1] - lists.offsets[first]


def density(lists: BlockLists, *, first_position: int, num_rows: int) -> float:
    """Kept (query block, key page) pairs over causal pairs, averaged over the lists."""
    first_block = first_position // PAGE_TOKENS
    count = num_blocks(num_rows)
    causal = sum(range(first_block + 1, first_block + count + 1))
    num_lists = (lists.offsets.numel() - 1) // count
    return lists.entries.numel() / (causal * num_lists)
