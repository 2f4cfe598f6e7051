"""Attention over pages: what its kernels take and give, and the kernels that store keys, choose pages, and attend."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from zen_turbo import native
from zen_turbo.config import PAGE_TOKENS
from zen_turbo.kernels.checks import DTYPES, calling, need

HEAD_DIMS = (64, 80, 96, 128, 256)
_INT8 = 2
_TILE_PAGES = 16  # pages whose means lie together, as 16 keys of a page do
_CODE_TILE_PAGES = 64


class PackedSummaries:
    """Summaries of a sequence's pages in one layer, packed as scoring reads them and kept from call to call; ``store`` and ``select_pages`` keep
    ``num_valid`` true.

    A chunk scores tiles of 16 pages in the dtype of queries, a token of an answer with ``codes`` tiles of 64 pages, whose channels are 8-bit
    codes (``csrc/summary_codes.inl``). A prompt comes before its answer, so one kind is kept at a time. ``tiles``: of means, and where they
    were asked for of bounds, uint8 [kv_heads, tiles, bytes] each.
    """

    def __init__(self, num_pages: int, *, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.num_pages = padded_pages(num_pages)
        self.kv_heads, self.head_dim, self.dtype = kv_heads, head_dim, dtype
        self.codes = False
        self.tiles: list[torch.Tensor] = []
        self._valid = native.int64s((), 2)  # native code reads it, and keeps it true for the tokens of an answer

    @property
    def tile_pages(self) -> int:
        return _CODE_TILE_PAGES if self.codes else _TILE_PAGES

    @property
    def num_valid(self) -> list[int]:
        """How many pages of each kind of tiles are as their summaries say."""
        return list(self._valid)[: len(self.tiles)]

    @property
    def address_of_valid(self) -> int:
        return native.address(self._valid)

    def rewrite(self, first_page: int) -> None:
        """Pages from this one on are stored again."""
        self._valid[:] = [min(pages, first_page) for pages in self._valid]

    def scored(self, num_pages: int, *, bounds: bool) -> None:
        """Tiles are true for so many pages: those of means, and with ``bounds`` both."""
        for number in range(1 + bounds):
            self._valid[number] = max(self._valid[number], num_pages)

    def prepare(self, *, codes: bool, bounds: bool) -> None:
        """Have tiles of one kind, and drop those of the other."""
        if codes != self.codes:
            self.codes, self.tiles, self._valid[:] = codes, [], (0, 0)
        while len(self.tiles) < 1 + bounds:
            width = self.head_dim * (1 + len(self.tiles))
            size = width * (_CODE_TILE_PAGES + 2 * 4 if codes else _TILE_PAGES * self.dtype.itemsize)
            self.tiles.append(torch.empty((self.kv_heads, self.num_pages // self.tile_pages, size), dtype=torch.uint8))


def padded_pages(num_pages: int) -> int:
    """Pages that packed summaries have room for: whole cache lines of their scores."""
    return -(-num_pages // _CODE_TILE_PAGES) * _CODE_TILE_PAGES


class PageView(NamedTuple):
    """The pages of one layer and the page table of one sequence.

    pages: uint8 [num_slots, num_key_value_heads, page_bytes(head_dim, dtype or int8)], packed as in kernels.h and quantise.inl.
    page_table: int32 [num_pages], logical page -> slot.
    summaries: float32 [num_slots, num_key_value_heads, 3, head_dim], mean, largest and smallest key of each full page, or None: not kept.
    open_page: uint8 [num_key_value_heads, page_bytes(head_dim, dtype)], for int8 pages: where the page that is not full yet is collected in
    the dtype of the queries; None: pages have that dtype themselves. stored_tokens: how many tokens the sequence has stored, which says which
    page is open (only read with int8 pages). packed: kept for scoring pages; None: packed anew by every call that scores.
    """

    pages: torch.Tensor
    page_table: torch.Tensor
    summaries: torch.Tensor | None = None
    open_page: torch.Tensor | None = None
    stored_tokens: int = 0
    packed: PackedSummaries | None = None


def page_bytes(head_dim: int, dtype: torch.dtype) -> int:
    """Size of one page: 64 keys and values of one KV head in bfloat16, float32 or int8 (with its scales)."""
    if dtype == torch.int8:
        return 2 * PAGE_TOKENS * head_dim + 4 * (head_dim + PAGE_TOKENS)
    return 2 * PAGE_TOKENS * head_dim * dtype.itemsize


# Three rotations of a query, each [rows, heads, head_dim]; None where no row needs it.
Queries = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class BlockLists(NamedTuple):
    """Key pages that each query block reads (CSR).

    offsets: int64 [num_lists * num_blocks + 1]; entries: int32, page * 4 + variant, ascending within a block. List g serves the query
    heads [g * heads_per_list, (g + 1) * heads_per_list). Variants: 0 same span, 1 previous span, 2 older (Dual Chunk Attention). last_page: of
    all lists, where whoever made them knows it; lists without are looked through before they are read.
    """

    offsets: torch.Tensor
    entries: torch.Tensor
    heads_per_list: int
    last_page: int | None = None


class PageBits(NamedTuple):
    """Pages chosen for each query block, as bits.

    bits: int64 [num_lists, num_blocks, words], bit p of a row is page p; counts: int32 [num_lists, num_blocks], how many are set.
    """

    bits: torch.Tensor
    counts: torch.Tensor


class Angles(NamedTuple):
    """cos and sin of one rotation: float32 [rows, head_dim / 2], or one row that serves all."""

    cos: torch.Tensor
    sin: torch.Tensor


Rotations = tuple[Angles | None, Angles | None, Angles | None]  # of the variants of a query


def _page_view(kv: PageView, head_dim: int, dtype: torch.dtype) -> native.PageViewArgs:
    pages, page_table, open_page = kv.pages, kv.page_table, kv.open_page
    size = page_bytes(head_dim, dtype if open_page is None else torch.int8)
    need(pages.dtype == torch.uint8 and pages.dim() == 3, "pages must be uint8 [num_slots, num_key_value_heads, page_bytes]")
    need(pages.shape[2] == size and pages.stride(2) == 1, f"a page must be {size} contiguous bytes, not {pages.shape[2]}")
    need(page_table.dtype == torch.int32 and page_table.dim() == 1 and page_table.is_contiguous(), "page_table must be contiguous int32")
    slot_stride, head_stride, num_pages = pages.stride(0), pages.stride(1), page_table.shape[0]
    view = native.PageViewArgs(pages.data_ptr(), slot_stride, head_stride, page_table.data_ptr(), num_pages, None, 0, -1, DTYPES[dtype])
    if open_page is not None:
        shape = (pages.shape[1], page_bytes(head_dim, dtype))
        need(open_page.dtype == torch.uint8 and open_page.shape == shape, f"open_page must be uint8 {list(shape)}")
        need(open_page.stride(1) == 1, "open_page must be contiguous within a head")
        view.open, view.open_head_stride, view.dtype = open_page.data_ptr(), open_page.stride(0), _INT8
        view.open_page = kv.stored_tokens // PAGE_TOKENS if kv.stored_tokens % PAGE_TOKENS else -1
    return view


def _summaries(kv: PageView, head_dim: int) -> torch.Tensor:
    shape = (kv.pages.shape[0], kv.pages.shape[1], 3, head_dim)
    summaries = kv.summaries
    need(summaries is not None, "the pages have no summaries")
    assert summaries is not None
    same = summaries.dtype == torch.float32 and summaries.shape == shape and summaries[0].is_contiguous()
    need(same, f"summaries must be float32 {list(shape)}, contiguous within a slot")
    return summaries


def _queries(queries: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
    first = queries[0]
    need(len(queries) == native.NUM_VARIANTS and first is not None, "queries must be three variants, the first present")
    assert first is not None
    need(first.dim() == 3 and first.dtype in DTYPES, "a query must be bfloat16 or float32 [rows, heads, head_dim]")
    need(first.shape[2] in HEAD_DIMS, f"head_dim must be one of {HEAD_DIMS}, not {first.shape[2]}")
    for query in queries:
        if query is not None:
            same = query.shape == first.shape and query.dtype == first.dtype and query.stride() == first.stride()
            need(same and query.stride(2) == 1, "query variants must agree in shape, dtype and strides, head_dim contiguous")
    return first


def attend_args(
    queries: Queries,
    kv: PageView,
    lists: BlockLists,
    out: torch.Tensor,
    *,
    first_position: int,
    scale: float,
    window: int | None = None,
    logit_factor: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    num_threads: int | None = None,
) -> native.AttendArgs:
    """Block-sparse causal flash attention of consecutive positions over packed pages; writes ``out``.

    queries: up to three rotations (same span, previous span, older), each bf16 or f32 [rows, num_attention_heads, head_dim]; a variant that
    no entry names may be None. out: the same shape and dtype. logit_factor: f32 [rows], multiplies the row's logits (temperature).
    lse: f32 [heads, rows], filled with the natural log-sum-exp over the kept keys. window: keys in (position - window, position] only.
    Raises ValueError for arguments that do not fit together. Cost: 4 * head_dim * 64 FLOP per row and kept page.
    """
    first = _queries(queries)
    num_rows, num_heads, head_dim = first.shape
    num_blocks = -(-num_rows // PAGE_TOKENS)
    offsets, entries, heads_per_list, last_page = lists
    need(heads_per_list > 0 and num_heads % heads_per_list == 0, "heads_per_list must divide the query heads")
    num_lists = num_heads // heads_per_list
    need(out.shape == first.shape and out.dtype == first.dtype and out.stride(2) == 1, "out must look like the queries")
    need(offsets.dtype == torch.int64 and entries.dtype == torch.int32, "offsets must be int64, entries int32")
    need(offsets.is_contiguous() and entries.is_contiguous(), "offsets and entries must be contiguous")
    need(offsets.numel() == num_lists * num_blocks + 1, f"{num_lists} lists of {num_blocks} blocks need that product + 1 offsets")
    need(num_heads % kv.pages.shape[1] == 0, "num_key_value_heads must divide the query heads")
    if last_page is None:
        need(int(offsets[0]) == 0 and int(offsets[-1]) == entries.numel() > 0, "offsets must run from 0 to the number of entries")
        # Entries ascend within a block, so the last one of each block bounds them; blocks of all lists end at offsets[1:].
        last_page = int(entries[(offsets[1:] - 1).clamp_min(0)].max()) >> 2
    need(last_page < kv.page_table.shape[0], f"a list names page {last_page} of {kv.page_table.shape[0]}")
    need(first_position + num_rows <= kv.page_table.shape[0] * PAGE_TOKENS, "the rows lie beyond the page table")
    need(kv.open_page is None or first_position + num_rows <= kv.stored_tokens, "with int8 pages stored_tokens must cover the rows")
    for tensor, shape in ((logit_factor, (num_rows,)), (lse, (num_heads, num_rows))):
        if tensor is not None:
            need(tensor.dtype == torch.float32 and tensor.shape == shape and tensor.is_contiguous(), f"expected float32 {shape}")
    return native.AttendArgs(
        native.pointers(query.data_ptr() if query is not None else None for query in queries),
        first.stride(0),
        first.stride(1),
        out.data_ptr(),
        out.stride(0),
        out.stride(1),
        lse.data_ptr() if lse is not None else None,
        logit_factor.data_ptr() if logit_factor is not None else None,
        _page_view(kv, head_dim, first.dtype),
        offsets.data_ptr(),
        entries.data_ptr(),
        heads_per_list,
        num_rows,
        first_position,
        window or 0,
        num_heads,
        kv.pages.shape[1],
        head_dim,
        DTYPES[first.dtype],
        scale,
        num_threads or torch.get_num_threads(),
    )


attend = calling("zt_attend", attend_args)


# ``attend`` for one row: query heads that share a KV head and a list read each page together, and a long list is cut into parts that run in
# parallel and merge in a fixed order.
decode = calling("zt_decode", attend_args)


def store_args(
    qkv: torch.Tensor,
    queries: Queries,
    angles: Rotations,
    kv: PageView,
    *,
    first_position: int,
    num_heads: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    norm_eps: float = 0.0,
    num_threads: int | None = None,
) -> native.StoreArgs:
    """Rotate queries into their variants, rotate and pack keys, pack values.

    qkv: bf16 or f32 [rows, (num_heads + 2 * num_key_value_heads) * head_dim], queries then keys then values. queries: outputs
    [rows, num_heads, head_dim], None where a variant is not wanted. angles[v] rotates variant v, angles[0] also the keys; None is no
    rotation. q_norm, k_norm: f32 [head_dim] RMS norm weights applied before the rotation. Rows go to positions first_position and on; a row
    that opens a page which it does not fill clears that page first, so positions must be written in order. Every page that is full after the
    call gets its summary, where ``kv`` keeps them.
    """
    rows, width = qkv.shape
    kv_heads = kv.pages.shape[1]
    head_dim = width // (num_heads + 2 * kv_heads)
    need(qkv.dtype in DTYPES and qkv.stride(1) == 1, "qkv must be bfloat16 or float32 with contiguous rows")
    need(width == head_dim * (num_heads + 2 * kv_heads) and head_dim in HEAD_DIMS, f"head_dim must be one of {HEAD_DIMS}")
    need(rows > 0 and first_position >= 0, "rows and first_position must not be negative")
    need(first_position + rows <= kv.page_table.shape[0] * PAGE_TOKENS, "the rows lie beyond the page table")
    strides = {(query.stride(0), query.stride(1)) for query in queries if query is not None}
    need(len(strides) == 1, "query variants must agree in strides")
    for query in queries:
        if query is not None:
            same = query.shape == (rows, num_heads, head_dim) and query.dtype == qkv.dtype and query.stride(2) == 1
            need(same, f"a query variant must be {qkv.dtype} [{rows}, {num_heads}, {head_dim}]")
    for angle in angles:
        for table in angle or ():
            same = table.dtype == torch.float32 and table.is_contiguous() and table.shape[1] == head_dim // 2
            need(same and table.shape[0] in (1, rows), f"angles must be contiguous float32 [{rows} or 1, {head_dim // 2}]")
    for weight in (q_norm, k_norm):
        if weight is not None:
            need(weight.dtype == torch.float32 and weight.shape == (head_dim,), f"norm weights must be float32 [{head_dim}]")
    row_stride, head_stride = strides.pop()
    summaries = _summaries(kv, head_dim) if kv.summaries is not None else None
    if kv.packed is not None:
        kv.packed.rewrite(first_position // PAGE_TOKENS)
    return native.StoreArgs(
        qkv.data_ptr(),
        qkv.stride(0),
        native.pointers(query.data_ptr() if query is not None else None for query in queries),
        row_stride,
        head_stride,
        native.pointers(angle.cos.data_ptr() if angle else None for angle in angles),
        native.pointers(angle.sin.data_ptr() if angle else None for angle in angles),
        native.int64s(0 if angle is None or angle.cos.shape[0] == 1 else head_dim // 2 for angle in angles),
        q_norm.data_ptr() if q_norm is not None else None,
        k_norm.data_ptr() if k_norm is not None else None,
        norm_eps,
        _page_view(kv, head_dim, qkv.dtype),
        summaries.data_ptr() if summaries is not None else None,
        summaries.stride(0) if summaries is not None else 0,
        rows,
        first_position,
        num_heads,
        kv_heads,
        head_dim,
        DTYPES[qkv.dtype],
        num_threads or torch.get_num_threads(),
    )


store = calling("zt_store", store_args)


def select_args(
    queries: Queries,
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
    energies: torch.Tensor | None = None,
    per_kv_head: bool = False,
    bound_pages: int = 0,
    codes: bool = False,
    num_threads: int | None = None,
) -> tuple[native.SelectArgs, PageBits]:
    """Choose pages for every query block and head from the summaries of pages; ``csrc/select.inl`` has the rule.

    queries, kv, first_position (a multiple of 64, or of a single row), scale, logit_factor: as for ``attend``, after ``store`` of the same
    rows. mass: float32 [lists], the share of estimated attention mass to keep; 1 keeps every page. sink_pages, local_pages: kept always, as is
    the diagonal; at most ``most_pages`` others. energies: float32 [lists, blocks, pages], filled with the estimates if given. There is a list
    for every head, or with ``per_kv_head`` one for all heads of a group, by the sum of their estimates. bound_pages: so many, of
    ``most_pages``, are chosen first and by the bounds of a page's keys, which show single keys that a mean hides (Quest, arXiv 2406.10774); energies
    are then two of these, by means and by bounds. codes: for a single bfloat16 row with per_kv_head, summaries are read as 8-bit codes.
    Raises ValueError for arguments that do not fit together.
    Cost: 2 * head_dim * sample_rows FLOP per head, query block and page, with bounds three times that.
    """
    first = _queries(queries)
    num_rows, num_heads, head_dim = first.shape
    summaries = _summaries(kv, head_dim)
    num_lists = kv.pages.shape[1] if per_kv_head else num_heads
    need(first_position % PAGE_TOKENS == 0 or num_rows == 1, f"first_position must be a multiple of {PAGE_TOKENS}")
    need(mass.dtype == torch.float32 and mass.shape == (num_lists,) and mass.is_contiguous(), f"mass must be float32 [{num_lists}]")
    num_blocks = -(-num_rows // PAGE_TOKENS)
    num_pages = first_position // PAGE_TOKENS + num_blocks
    need(num_pages <= kv.page_table.shape[0], "the rows lie beyond the page table")
    need(kv.page_table.dtype == torch.int32 and kv.page_table.is_contiguous(), "page_table must be contiguous int32")
    if span_pages is not None:
        needed = min((num_pages - 1) // span_pages, 2)
        need(all(query is not None for query in queries[: needed + 1]), f"these rows need {needed + 1} query variants")
    for tensor, shape in ((logit_factor, (num_rows,)), (energies, (*((2,) if bound_pages else ()), num_lists, num_blocks, num_pages))):
        if tensor is not None:
            need(tensor.dtype == torch.float32 and tensor.shape == shape and tensor.is_contiguous(), f"expected float32 {shape}")
    need(not codes or (num_rows == 1 and per_kv_head and first.dtype == torch.bfloat16), "codes are for one bfloat16 row with per_kv_head")
    tiles: list[torch.Tensor] = []
    packed = kv.packed
    if packed is not None:
        same = packed.dtype == first.dtype and (packed.kv_heads, packed.head_dim) == (kv.pages.shape[1], head_dim)
        need(same, "packed summaries must be of the same heads, head_dim and dtype")
        need(packed.num_pages >= num_pages, f"packed summaries have room for {packed.num_pages} pages, not {num_pages}")
        packed.prepare(codes=codes, bounds=bound_pages > 0)
        tiles = packed.tiles[: 1 + (bound_pages > 0)]
    bits = torch.empty((num_lists, num_blocks, -(-num_pages // 64)), dtype=torch.int64)
    counts = torch.empty((num_lists, num_blocks), dtype=torch.int32)
    args = native.SelectArgs(
        native.pointers(query.data_ptr() if query is not None else None for query in queries),
        first.stride(0),
        first.stride(1),
        logit_factor.data_ptr() if logit_factor is not None else None,
        summaries.data_ptr(),
        summaries.stride(0),
        kv.page_table.data_ptr(),
        mass.data_ptr(),
        bits.data_ptr(),
        counts.data_ptr(),
        energies.data_ptr() if energies is not None else None,
        num_rows,
        first_position,
        span_pages or 0,
        sink_pages,
        local_pages,
        num_pages if most_pages is None else most_pages,
        bound_pages,
        sample_rows,
        native.pointers((each.data_ptr() for each in tiles), 2),
        native.int64s((each.shape[1] for each in tiles), 2),
        packed.address_of_valid if packed is not None else None,
        num_heads,
        kv.pages.shape[1],
        head_dim,
        DTYPES[first.dtype],
        scale,
        per_kv_head,
        codes,
        num_threads or torch.get_num_threads(),
    )
    return args, PageBits(bits, counts)


def select_pages(queries: Queries, kv: PageView, mass: torch.Tensor, **settings: Any) -> PageBits:
    """Choose pages: ``select_args`` has the settings."""
    args, chosen = select_args(queries, kv, mass, **settings)
    native.call("zt_select_pages", args)
    if kv.packed is not None:
        kv.packed.scored(args.first_position // PAGE_TOKENS, bounds=args.bound_pages > 0)  # of pages that precede these rows
    return chosen


def list_pages(chosen: PageBits, *, first_block: int, span_pages: int | None, heads_per_list: int) -> BlockLists:
    """Bits to the lists that ``attend`` takes; ``first_block`` is the page of the first query block."""
    bits, counts = chosen
    num_lists, num_blocks, words = bits.shape
    need(bits.dtype == torch.int64 and bits.is_contiguous(), "bits must be contiguous int64")
    need(counts.dtype == torch.int32 and counts.shape == (num_lists, num_blocks), "counts must be int32 [num_lists, num_blocks]")
    offsets = torch.zeros(num_lists * num_blocks + 1, dtype=torch.int64)
    torch.cumsum(counts.view(-1), 0, out=offsets[1:])
    entries = torch.empty(int(offsets[-1]), dtype=torch.int32)
    args = native.ListArgs(
        bits.data_ptr(), offsets.data_ptr(), entries.data_ptr(), num_lists, num_blocks, first_block, words, span_pages or 0
    )
    native.call("zt_list_pages", args)
    return BlockLists(offsets, entries, heads_per_list, first_block + num_blocks - 1)
