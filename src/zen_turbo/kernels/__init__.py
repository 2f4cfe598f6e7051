"""Typed, checked wrappers of the native kernels. Every wrapper checks shapes, dtypes, contiguity and bounds, because the native side trusts
its arguments."""

from zen_turbo.kernels.attention import (
    HEAD_DIMS,
    Angles,
    BlockLists,
    PackedSummaries,
    PageBits,
    PageView,
    attend,
    decode,
    list_pages,
    padded_pages,
    page_bytes,
    select_pages,
    store,
)
from zen_turbo.kernels.layers import (
    PackedWeights,
    add_rms_norm,
    linear,
    pack_bf16,
    pack_int8,
    silu_mul,
)

__all__ = [
    "HEAD_DIMS",
    "Angles",
    "BlockLists",
    "PackedSummaries",
    "PackedWeights",
    "PageBits",
    "PageView",
    "add_rms_norm",
    "attend",
    "decode",
    "linear",
    "list_pages",
    "pack_bf16",
    "pack_int8",
    "padded_pages",
    "page_bytes",
    "select_pages",
    "silu_mul",
    "store",
]
