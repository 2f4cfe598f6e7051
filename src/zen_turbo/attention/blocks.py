"""Which key pages a query block reads: building the lists that the kernel takes, and their invariants.

A list is CSR over query blocks of 64 rows: ascending entries ``page * 4 + variant``. Variant is the span distance between query and key
(0 same, 1 previous, 2 older), known from positions alone, so a policy only says which pages to keep. Because page, block and chunk divide the
span L, no page and no block straddles two spans.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from zen_turbo import kernels
from zen_turbo.config import PAGE_TOKENS
from zen_turbo.kernels import BlockLists, PageBits, PageView, Queries


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """What a policy is told: the queries of consecutive rows, whose keys are already stored, and the pages.

    Rows are at first_position (a multiple of 64) and on. ``sparse_blocks``: the query blocks that may leave pages out. The rest as for
    ``kernels.attend``.
    """

    queries: Queries
    kv: PageView
    first_position: int
    scale: float
    span_pages: int | None
    logit_factor: torch.Tensor | None
    sparse_blocks: range

    @property
    def _first(self) -> torch.Tensor:
        first = self.queries[0]
        assert first is not None
        return first

    @property
    def dtype(self) -> torch.dtype:
        return self._first.dtype

    @property
    def num_rows(self) -> int:
        return self._first.shape[0]

    @property
    def num_heads(self) -> int:
        return self._first.shape[1]

    @property
    def num_blocks(self) -> int:
        return num_blocks(self.num_rows)

    @property
    def first_block(self) -> int:
        return self.first_position // PAGE_TOKENS

    @property
    def num_pages(self) -> int:
        """Pages up to the last row's."""
        return self.first_block + self.num_blocks

    @property
    def first_end_block(self) -> int:
        """The first query block after those that may leave pages out: where the prompt's end begins, if it does in this chunk."""
        return max(self.sparse_blocks.start, self.sparse_blocks.stop)

    def after(self, block: int) -> Chunk:
        """The rows from this query block on, all of which may leave pages out."""
        first, second, third = (query[block * PAGE_TOKENS :] if query is not None else None for query in self.queries)
        return dataclasses.replace(
            self,
            queries=(first, second, third),
            first_position=self.first_position + block * PAGE_TOKENS,
            logit_factor=None if self.logit_factor is None else self.logit_factor[block * PAGE_TOKENS :],
            sparse_blocks=range(self.num_blocks - block),
        )

    def heads(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Every query head with the keys of its KV head (``keys``), which are unpacked once for the heads that share them."""
        kv_heads = self.kv.pages.shape[1]
        group = self.num_heads // kv_heads
        for kv_head in range(kv_heads):
            keys = self.keys(kv_head)
            yield from ((kv_head * group + head, keys) for head in range(group))

    def keys(self, kv_head: int) -> torch.Tensor:
        """The rotated keys of one KV head, float32 [num_pages * 64, head_dim], zero where nothing is stored yet. Cost: a copy of all keys."""
        dtype, head_dim, count = self._first.dtype, self._first.shape[2], PAGE_TOKENS * self._first.shape[2]
        stored = self.kv.pages[self.kv.page_table[: self.num_pages].long(), kv_head]
        pair = 2 if dtype == torch.bfloat16 else 1  # the layouts of csrc/kernels.h and quantise.inl

        def unpack(elements: torch.Tensor) -> torch.Tensor:
            tiles = elements.view(-1, PAGE_TOKENS // 16, head_dim // pair, 16, pair)
            return tiles.permute(0, 1, 3, 2, 4).reshape(-1, PAGE_TOKENS, head_dim).float()

        if self.kv.open_page is None:
            return unpack(stored[:, : count * dtype.itemsize].view(dtype)).view(-1, head_dim)
        scales = stored[:, 2 * count : 2 * count + 4 * head_dim].contiguous().view(torch.float32)
        keys = unpack(stored[:, :count].contiguous().view(torch.int8)) * scales[:, None]
        if (self.first_position + self.num_rows) % PAGE_TOKENS:
            keys[-1] = unpack(self.kv.open_page[kv_head, : count * dtype.itemsize].view(dtype))[0]
        return keys.view(-1, head_dim)

    def variant_runs(self, block: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(variant, first page, end page): what the rows of a query block use for pages [0, count)."""
        if self.span_pages is None:
            yield 0, 0, count
            return
        own = (self.first_block + block) // self.span_pages
        bounds = (0, max(own - 1, 0) * self.span_pages, own * self.span_pages, count)
        for variant, first, end in zip((2, 1, 0), bounds, bounds[1:], strict=False):
            if min(end, count) > first:
                yield variant, first, min(end, count)

    def logits(self, rows: torch.Tensor, head: int, keys: torch.Tensor, *, per_page: int = PAGE_TOKENS) -> torch.Tensor:
        """Logits of some rows of one query block over ``keys`` (float32 [pages * per_page, head_dim], one KV head), float32 [rows, keys], not
        masked. per_page: 64 for keys, 1 for page means."""
        block = int(rows[0]) // PAGE_TOKENS
        count = len(keys) // per_page
        parts = []
        for variant, first, end in self.variant_runs(block, count):
            queries = self.queries[variant]
            assert queries is not None
            parts.append(queries[rows, head].float() @ keys[first * per_page : end * per_page].T)
        result = torch.cat(parts, dim=1) * self.scale
        return result if self.logit_factor is None else result * self.logit_factor[rows, None]


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
    return BlockLists(offsets, entries, num_heads, int(blocks[-1]))


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


def lists_of(chosen: PageBits, chunk: Chunk) -> BlockLists:
    """The lists of what a policy chose. Query blocks outside ``chunk.sparse_blocks`` read everything; writes into ``chosen`` for them."""
    dense = [block for block in range(chunk.num_blocks) if block not in chunk.sparse_blocks]
    if dense:
        everything = _every_page(chunk.first_position, chunk.num_blocks)
        chosen.bits[:, dense] = everything.bits[:, dense]
        chosen.counts[:, dense] = everything.counts[:, dense]
    return from_bits(chosen, first_position=chunk.first_position, num_heads=chunk.num_heads, span_pages=chunk.span_pages)


def lists_from_mask(keep: torch.Tensor, chunk: Chunk, *, sink_pages: int, local_pages: int) -> BlockLists:
    """Lists of a policy that says bool [heads, blocks, pages]; the diagonal, sinks and local pages are kept whatever it says."""
    return lists_of(pack_bits(keep, first_position=chunk.first_position, sink_pages=sink_pages, local_pages=local_pages), chunk)


def largest_by_mass(energy: torch.Tensor, mass: float) -> torch.Tensor:
    """bool like energy [..., pages]: the fewest largest entries of each row that reach ``mass`` of its sum; all of them for mass >= 1."""
    if mass >= 1:
        return torch.ones_like(energy, dtype=torch.bool)
    ordered, order = energy.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = before < mass * energy.sum(dim=-1, keepdim=True)
    return torch.zeros_like(kept).scatter_(-1, order, kept)


def choose_by_mass(chunk: Chunk, mass: torch.Tensor, **settings: Any) -> PageBits:
    """The pages of largest estimated mass for each list and query block, natively. mass and settings (sink_pages, local_pages, most_pages,
    sample_rows, per_kv_head, bound_pages, codes, energies) as for ``kernels.select_pages``."""
    return kernels.select_pages(
        chunk.queries,
        chunk.kv,
        mass,
        first_position=chunk.first_position,
        scale=chunk.scale,
        span_pages=chunk.span_pages,
        logit_factor=chunk.logit_factor,
        **settings,
    )


def select_by_mass(chunk: Chunk, mass: torch.Tensor, *, end: Mapping[str, Any] | None = None, **settings: Any) -> BlockLists:
    """The lists of what ``choose_by_mass`` gives. Query blocks of the prompt's end read everything, or what it gives with the mass and settings
    that ``end`` has in place of these."""
    first = chunk.first_end_block
    chosen = {"mass": mass, **settings}
    if end is None or first == chunk.num_blocks:
        return lists_of(choose_by_mass(chunk, **chosen), chunk)
    last = choose_by_mass(chunk.after(first), **{**chosen, **end})
    if first == 0:
        return lists_of(last, chunk.after(0))
    bits = choose_by_mass(chunk, **chosen)
    bits.bits[:, first:], bits.counts[:, first:] = last.bits, last.counts
    return lists_of(bits, dataclasses.replace(chunk, sparse_blocks=range(chunk.sparse_blocks.start, chunk.num_blocks)))


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
