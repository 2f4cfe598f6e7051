"""The KV cache of one sequence: a page table into the pool, and how many tokens of it are committed.

With int8 pages the tokens of a page that is not full are in ``open_page``, unquantised, and belong to this sequence alone. So do the summaries
of its pages as scoring reads them: pages have them too, but each in a place of its own.

Ownership: every slot in ``page_table`` carries one reference of this sequence. Tokens [0, num_tokens) are committed; what lies beyond in
reserved pages is scratch of the chunk being computed and is never read by others. Only full committed pages are ever shared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zen_turbo.config import PAGE_TOKENS
from zen_turbo.kernels import PackedSummaries, PageView
from zen_turbo.kv.geometry import pages_for
from zen_turbo.kv.pool import PagePool


class SequenceCache:
    def __init__(self, pool: PagePool) -> None:
        self.pool = pool
        self.num_tokens = 0
        self._slots: list[int] = []
        self._table = torch.empty(0, dtype=torch.int32)
        self._packed: dict[int, PackedSummaries] = {}  # by layer
        geometry, self._open = pool.geometry, None
        if geometry.int8:
            shape = (geometry.num_layers, geometry.num_key_value_heads, geometry.open_page_bytes)
            self._open = torch.empty(shape, dtype=torch.uint8)

    @property
    def slots(self) -> tuple[int, ...]:
        return tuple(self._slots)

    @property
    def page_table(self) -> torch.Tensor:
        """int32 [num_pages], logical page -> slot."""
        return self._table

    def pages(self, layer: int) -> PageView:
        """``stored_tokens`` are those committed; whoever stores more says so."""
        open_page = None if self._open is None else self._open[layer]
        summaries, packed = self.pool.layer_summaries(layer), self._packed_summaries(layer)
        return PageView(self.pool.layer(layer), self._table, summaries, open_page, self.num_tokens, packed)

    def _packed_summaries(self, layer: int) -> PackedSummaries | None:
        geometry = self.pool.geometry
        if not geometry.summaries:
            return None
        packed = self._packed.get(layer)
        if packed is None or packed.num_pages < len(self._slots):
            packed = self._packed[layer] = PackedSummaries(
                len(self._slots), kv_heads=geometry.num_key_value_heads, head_dim=geometry.head_dim, dtype=geometry.dtype
            )
        return packed

    def reserve(self, num_tokens: int) -> None:
        """Make room for that many tokens in all. Raises InsufficientMemoryError and changes nothing if the pool has too few slots."""
        missing = pages_for(num_tokens) - len(self._slots)
        if missing > 0:
            self._set(self._slots + self.pool.allocate(missing))

    def commit(self, num_tokens: int) -> None:
        """The first ``num_tokens`` tokens are now written in every layer."""
        assert self.num_tokens <= num_tokens <= len(self._slots) * PAGE_TOKENS
        self.num_tokens = num_tokens

    def adopt(self, slots: Sequence[int]) -> None:
        """Begin with the full pages in ``slots``, which others hold too and which are never written again. Only in an empty sequence."""
        assert not self._slots
        self.pool.share(slots)
        self._set(list(slots))
        self.num_tokens = len(slots) * PAGE_TOKENS

    def release(self) -> None:
        """Drop every page. The sequence is empty afterwards."""
        self.pool.free(self._slots)
        self._set([])
        self._packed.clear()
        self.num_tokens = 0

    def _set(self, slots: list[int]) -> None:
        self._slots = slots
        self._table = torch.tensor(slots, dtype=torch.int32)
