"""Sizes of the KV cache. A page is 64 tokens of one layer and one KV head, K then V; a slot is the same 64 tokens of all layers and heads."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zen_turbo.config import PAGE_TOKENS
from zen_turbo.kernels import page_bytes


@dataclass(frozen=True, kw_only=True)
class PageGeometry:
    """dtype: of queries, and of pages unless ``int8``. ``summaries``: whether the mean, largest and smallest key of every full page are kept
    beside it, in fp32, for sparse policies."""

    num_layers: int
    num_key_value_heads: int
    head_dim: int
    dtype: torch.dtype
    summaries: bool = False
    int8: bool = False

    @property
    def page_bytes(self) -> int:
        return page_bytes(self.head_dim, torch.int8 if self.int8 else self.dtype)

    @property
    def open_page_bytes(self) -> int:
        """Of one layer and KV head: where a sequence collects the page that is not full yet. 0 where pages need not be quantised."""
        return page_bytes(self.head_dim, self.dtype) if self.int8 else 0

    @property
    def summary_bytes(self) -> int:
        return 3 * self.head_dim * 4 if self.summaries else 0

    @property
    def slot_bytes(self) -> int:
        return (self.page_bytes + self.summary_bytes) * self.num_layers * self.num_key_value_heads

    def bytes_for(self, num_tokens: int) -> int:
        return pages_for(num_tokens) * self.slot_bytes


def pages_for(num_tokens: int) -> int:
    return -(-num_tokens // PAGE_TOKENS)
