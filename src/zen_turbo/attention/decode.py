"""Sparse decode: which pages one new token reads, so that an answer streams as fast after a million tokens as after a few thousand.

A token's query scores the mean key of every page (``csrc/select.inl``), its heads of one KV head together, because a page is read once for all
of them. Kept are sinks, recent pages, and the pages of largest estimated mass until they hold ``mass`` of it, at most ``most_pages``: reading a
token costs the weights, the means and that many pages, whatever lies behind it. Up to ``dense_pages`` everything is read.

What was kept is measured as in the prefill: one layer of every ``SAMPLE_EVERY``-th token computes its exact log-sum-exp too, which costs one
layer's keys and values, and layers take turns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zen_turbo.attention.blocks import Queries, from_bits
from zen_turbo.attention.fidelity import recall_of
from zen_turbo.config import PAGE_TOKENS
from zen_turbo.kernels import BlockLists, PageView, select_pages

SAMPLE_EVERY = 16


@dataclass(frozen=True, kw_only=True)
class DecodeSettings:
    mass: float = 0.98
    most_pages: int = 256
    sink_pages: int = 1
    local_pages: int = 8
    dense_pages: int = 128


class SparseDecode:
    """Selection and telemetry of one request's answer."""

    def __init__(self, settings: DecodeSettings, *, num_layers: int) -> None:
        self.settings = settings
        self._num_layers = num_layers
        self._recalls: list[torch.Tensor] = []  # [heads] each

    def is_sparse(self, position: int) -> bool:
        return position // PAGE_TOKENS > self.settings.dense_pages

    def select(
        self,
        queries: Queries,
        kv: PageView,
        *,
        position: int,
        scale: float,
        span_pages: int | None,
        logit_factor: torch.Tensor | None,
    ) -> BlockLists:
        """The pages that the token at ``position`` reads, one list per KV head. queries: [1, heads, head_dim] each."""
        settings, kv_heads = self.settings, kv.pages.shape[1]
        assert queries[0] is not None
        chosen = select_pages(
            queries,
            kv,
            torch.full((kv_heads,), settings.mass),
            first_position=position,
            scale=scale,
            span_pages=span_pages,
            sink_pages=settings.sink_pages,
            local_pages=settings.local_pages,
            most_pages=settings.most_pages,
            sample_rows=1,
            logit_factor=logit_factor,
            per_kv_head=True,
        )
        return from_bits(chosen, first_position=position, num_heads=queries[0].shape[1], span_pages=span_pages)

    def samples(self, position: int, layer: int) -> bool:
        """Whether recall is measured for this token in this layer."""
        turn, rest = divmod(position, SAMPLE_EVERY)
        return rest == 0 and turn % self._num_layers == layer

    def observe(self, *, lse_kept: torch.Tensor, lse_full: torch.Tensor) -> None:
        """Log-sum-exps of one token over kept and over all keys, [heads] each."""
        self._recalls.append(recall_of(lse_kept, lse_full))

    @property
    def recall(self) -> float | None:
        """Mean over samples and heads, None without any."""
        return float(torch.cat(self._recalls).mean()) if self._recalls else None
