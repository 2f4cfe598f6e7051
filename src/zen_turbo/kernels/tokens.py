"""The next token of several sequences, natively from layer to layer (``csrc/tokens.cpp``): the arguments of kernels that stay from token to token
are prepared once, because preparing them in Python for every call takes longer than some of the calls.

Results are those of ``store``, ``select_pages``, ``list_pages``, ``decode`` and the kernels of ``layers``, called one by one, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from zen_turbo import native
from zen_turbo.config import PAGE_TOKENS
from zen_turbo.kernels.attention import BlockLists, PageView, Queries, Rotations, attend_args, select_args, store_args
from zen_turbo.kernels.checks import need
from zen_turbo.kernels.layers import PackedWeights, linear_args, norm_args, silu_args


class TokenLayer(NamedTuple):
    """What attention needs to know of one layer: as for ``store``."""

    rotate: bool
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    norm_eps: float


class TokenSelection(NamedTuple):
    """How the layers of a sequence choose pages, as for ``select_pages`` with ``per_kv_head``; mass and most_pages by layer."""

    mass: Sequence[torch.Tensor]
    most_pages: Sequence[int]
    sink_pages: int
    local_pages: int
    bound_pages: int
    codes: bool

    def settings(self, layer: int) -> dict[str, Any]:
        """Of a layer, but for its mass: as ``select_pages`` takes them."""
        return {
            "sink_pages": self.sink_pages,
            "local_pages": self.local_pages,
            "most_pages": self.most_pages[layer],
            "sample_rows": 1,
            "per_kv_head": True,
            "bound_pages": self.bound_pages,
            "codes": self.codes,
        }

    def most_kept(self, layer: int) -> int:
        """How many pages a list of that layer has at most: sinks, those chosen, recent ones and the token's own."""
        return self.sink_pages + self.most_pages[layer] + self.local_pages + 1


class TokenScratch:
    """What rows of a batch use one after the other. variants: how many rotations a query may have."""

    def __init__(self, *, variants: int, num_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        first, second, third = (torch.zeros((1, num_heads, head_dim), dtype=dtype) if v < variants else None for v in range(native.NUM_VARIANTS))
        self.queries: Queries = (first, second, third)
        self.qkv = torch.zeros((1, (num_heads + 2 * kv_heads) * head_dim), dtype=dtype)
        self.out = torch.empty((1, num_heads, head_dim), dtype=dtype)
        self.num_heads = num_heads


class TokenSequence:
    """One sequence in every layer, from token to token. ``views`` hold the pages; a sequence whose page table or whose selection changes is made
    anew, ``after`` the one before, whose choices it keeps.

    position: of the token that comes next, for which ``lists`` (one, for all heads) names every page. Not thread-safe.
    """

    def __init__(
        self,
        views: Sequence[PageView],
        layers: Sequence[TokenLayer],
        scratch: TokenScratch,
        lists: BlockLists,
        *,
        position: int,
        scale: float,
        span_pages: int | None,
        selection: TokenSelection | None,
        after: TokenSequence | None = None,
    ) -> None:
        self._views, self._scratch, self._selection = views, scratch, selection
        self._norms = layers  # native code has the addresses of their tensors
        self._lists: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._choice: list[torch.Tensor] = []
        self._args = native.array_of(native.TokenLayerArgs, len(views))
        for index, (view, layer) in enumerate(zip(views, layers, strict=True)):
            view = view._replace(stored_tokens=position + 1)
            into = self._args[index]
            into.store = store_args(
                scratch.qkv,
                scratch.queries,
                (None, None, None),
                view,
                first_position=position,
                num_heads=scratch.num_heads,
                q_norm=layer.q_norm,
                k_norm=layer.k_norm,
                norm_eps=layer.norm_eps,
            )
            into.attend = attend_args(scratch.queries, view, lists, scratch.out, first_position=position, scale=scale)
            into.rotate, into.chosen_page = layer.rotate, -1
            if selection is not None:
                self._prepare_choice(into, view, selection, index, position=position, scale=scale, span_pages=span_pages)
                if after is not None and after._selection is not None:
                    self._keep_choice(index, after)
        self._row = native.TokenRowArgs(layers=native.address(self._args), full_out=scratch.out.data_ptr())
        self._token: tuple[object, ...] = ()  # tensors of the token that ``begin`` was last called for

    def _prepare_choice(
        self,
        into: native.TokenLayerArgs,
        view: PageView,
        selection: TokenSelection,
        index: int,
        *,
        position: int,
        scale: float,
        span_pages: int | None,
    ) -> None:
        into.select, chosen = select_args(
            self._scratch.queries,
            view,
            selection.mass[index],
            first_position=position,
            scale=scale,
            span_pages=span_pages,
            **selection.settings(index),
        )
        kv_heads, room = view.pages.shape[1], len(view.page_table)
        if not self._choice:  # which layers use one after the other
            self._choice = [torch.empty((kv_heads, -(-room // 64)), dtype=torch.int64), chosen.counts]
        into.select.bits, into.select.counts = (each.data_ptr() for each in self._choice)
        most = min(selection.most_kept(index), room)
        lists = torch.zeros(kv_heads + 1, dtype=torch.int64), torch.empty(kv_heads * most, dtype=torch.int32)
        self._lists.append(lists)
        into.offsets, into.entries, into.most_entries = lists[0].data_ptr(), lists[1].data_ptr(), lists[1].numel()

    def _keep_choice(self, index: int, after: TokenSequence) -> None:
        offsets, entries = after._lists[index]
        count = int(offsets[-1])
        assert count <= self._lists[index][1].numel()
        self._lists[index][0][:] = offsets
        self._lists[index][1][:count] = entries[:count]
        self._args[index].chosen_page = after._args[index].chosen_page

    def serves(self, view: PageView, *, sparse: bool) -> bool:
        """Whether it can go on with the pages of its first layer as they are now, and choose where that is asked for."""
        known = self._views[0]
        return view.page_table is known.page_table and view.packed is known.packed and (self._selection is not None or not sparse)

    def begin(
        self,
        position: int,
        angles: Rotations,
        logit_factor: torch.Tensor | None,
        *,
        dense: BlockLists | None,
        select_every: int,
        sample: tuple[int, torch.Tensor, torch.Tensor] | None,
    ) -> None:
        """Prepare the token at ``position``. dense: every page, in one list; needed without selection, and where it is sampled. select_every: 0 reads
        everything, else for how many tokens of a page a choice serves. sample: a layer, and float32 [heads] each where the log-sum-exp over the pages
        it reads goes and over all."""
        need(position < len(self._views[0].page_table) * PAGE_TOKENS, "the row lies beyond the page table")
        need(not select_every or self._selection is not None, "nothing is chosen here")
        need(dense is not None or (select_every > 0 and sample is None), "a list of every page is needed")
        half = self._scratch.out.shape[2] // 2
        for angle, query in zip(angles, self._scratch.queries, strict=True):
            for table in angle or ():
                need(query is not None and table.dtype == torch.float32 and table.numel() == half, f"angles must be float32 [1, {half}]")
        if dense is not None:
            need(dense.last_page == position // PAGE_TOKENS and len(dense.offsets) == 2, "the dense list must end with the row's page")
        layer, kept, full = sample or (-1, None, None)
        for lse in (kept, full):
            same = lse is None or (lse.dtype == torch.float32 and lse.numel() == self._scratch.num_heads and lse.is_contiguous())
            need(same, f"lse must be contiguous float32 [{self._scratch.num_heads}]")
        self._token = (angles, logit_factor, dense, sample)
        row = self._row
        row.position, row.select_every, row.sampled_layer = position, select_every, layer
        row.cos[:] = [None if angle is None else angle.cos.data_ptr() for angle in angles]
        row.sin[:] = [None if angle is None else angle.sin.data_ptr() for angle in angles]
        row.logit_factor = None if logit_factor is None else logit_factor.data_ptr()
        row.dense_offsets = None if dense is None else dense.offsets.data_ptr()
        row.dense_entries = None if dense is None else dense.entries.data_ptr()
        row.lse_kept = None if kept is None else kept.data_ptr()
        row.lse_full = None if full is None else full.data_ptr()


class LinearWeights(NamedTuple):
    weights: PackedWeights
    bias: torch.Tensor | None


class LayerWeights(NamedTuple):
    """One layer, as ``layers`` multiplies it."""

    input_norm: torch.Tensor
    qkv: LinearWeights
    out: LinearWeights
    post_norm: torch.Tensor
    gate_up: LinearWeights
    down: LinearWeights


class TokenBatch:
    """So many rows on their way through all layers: ``residual`` float32 [rows, hidden], which the caller fills, and ``delta`` [rows, hidden], the
    last layer's output, not added yet."""

    def __init__(self, layers: Sequence[LayerWeights], *, rows: int, dtype: torch.dtype, eps: float) -> None:
        first = layers[0]

        def room(width: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.zeros((rows, width), dtype=dtype)

        hidden = first.out.weights.outputs
        self.residual, self._x, self._projected, self.delta = room(hidden, torch.float32), room(hidden), room(hidden), room(hidden)
        self._qkv, self._attended = room(first.qkv.weights.outputs), room(first.out.weights.inputs)
        self._gate_up, self._gated = room(first.gate_up.weights.outputs), room(first.down.weights.inputs)
        self._layers = layers
        args = native.array_of(native.LayerArgs, len(layers))
        for index, layer in enumerate(layers):
            into, x = args[index], self._x
            into.input_norm = norm_args(self.residual, self.delta if index else None, layer.input_norm, x, eps=eps)
            into.qkv = linear_args(x, layer.qkv.weights, self._qkv, bias=layer.qkv.bias)
            into.out = linear_args(self._attended, layer.out.weights, self._projected, bias=layer.out.bias)
            into.post_norm = norm_args(self.residual, self._projected, layer.post_norm, x, eps=eps)
            into.gate_up = linear_args(x, layer.gate_up.weights, self._gate_up, bias=layer.gate_up.bias)
            into.silu = silu_args(self._gate_up, self._gated)
            into.down = linear_args(self._gated, layer.down.weights, self.delta, bias=layer.down.bias)
        self._args = args

    def run(self, sequences: Sequence[TokenSequence]) -> None:
        """The first rows' tokens, one of each sequence, through all layers."""
        need(len(sequences) <= len(self._qkv), f"{len(sequences)} sequences need as many rows, not {len(self._qkv)}")
        layers = native.address(self._args)
        _call(sequences, self._qkv, self._attended, first_layer=0, num_layers=len(self._layers), layers=layers)


def attend_tokens(sequences: Sequence[TokenSequence], layer: int, qkv: torch.Tensor, attended: torch.Tensor) -> None:
    """The attention of one layer. qkv: [rows, (heads + 2 kv_heads) * head_dim], attended: [rows, heads * head_dim], contiguous; the first rows are
    those of ``sequences``."""
    scratch = sequences[0]._scratch
    width, same = scratch.out.numel(), qkv.shape[1:] == scratch.qkv.shape[1:] and qkv.dtype == scratch.qkv.dtype
    need(same and qkv.is_contiguous(), "qkv must be contiguous, a row per sequence")
    need(attended.shape == (len(qkv), width) and attended.dtype == qkv.dtype and attended.is_contiguous(), f"attended must be [{len(qkv)}, {width}]")
    need(len(sequences) <= len(qkv), f"{len(sequences)} sequences need as many rows, not {len(qkv)}")
    _call(sequences, qkv, attended, first_layer=layer, num_layers=1, layers=None)


def _call(
    sequences: Sequence[TokenSequence], qkv: torch.Tensor, attended: torch.Tensor, *, first_layer: int, num_layers: int, layers: int | None
) -> None:
    """layers: where their arguments lie, None for the attention of one."""
    rows = native.pointers((native.address(sequence._row) for sequence in sequences), len(sequences))
    args = native.TokensArgs(
        layers,
        first_layer,
        num_layers,
        native.address(rows),
        len(sequences),
        qkv.data_ptr(),
        attended.data_ptr(),
        qkv.stride(0) * qkv.element_size(),
        attended.stride(0) * attended.element_size(),
    )
    native.call("zt_tokens", args)
