"""What a request needs and what the machine has, known before anything is computed; and what is handed back to it."""

from __future__ import annotations

import contextlib
import ctypes
import resource
from dataclasses import dataclass
from pathlib import Path

import psutil

from zen_turbo.config import PAGE_TOKENS
from zen_turbo.kernels import padded_pages
from zen_turbo.kv.geometry import PageGeometry, pages_for
from zen_turbo.models.config import ModelConfig
from zen_turbo.models.linear import TILE_ROWS


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes. ``kv_bytes`` grows with the sequence; ``activation_bytes`` is the peak of one chunk and is shared by all requests."""

    kv_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.kv_bytes + self.activation_bytes


def estimate(model: ModelConfig, geometry: PageGeometry, *, total_tokens: int, chunk_tokens: int) -> MemoryEstimate:
    """Memory of one request of ``total_tokens`` (prompt and answer).

    Per row of a chunk: residual in fp32; QKV, three query variants, attention output and the block's output in the engine's dtype; per row of
    a linear tile: norm output, gate and up, gated product, their results; per (query block, key page): one int64 while lists are built and
    one int32 after. With summaries those of every page are kept once more, packed for scoring.
    """
    rows = min(chunk_tokens, total_tokens)
    tile = min(rows, TILE_ROWS)
    size = geometry.dtype.itemsize
    heads = model.num_attention_heads * model.head_dim
    kv = 2 * model.num_key_value_heads * model.head_dim
    per_row = 4 * model.hidden_size + size * ((heads + kv) + 3 * heads + heads + 2 * model.hidden_size)
    per_tile_row = size * (3 * model.hidden_size + heads + kv + 3 * model.intermediate_size)
    lists = (rows // PAGE_TOKENS + 1) * pages_for(total_tokens) * (4 * 8 + 4)
    logits = 2 * 4 * model.vocab_size
    open_pages = geometry.open_page_bytes * geometry.num_layers * geometry.num_key_value_heads
    packed = padded_pages(pages_for(total_tokens)) * 3 * model.head_dim * size * model.num_key_value_heads * geometry.num_layers
    kv_bytes = geometry.bytes_for(total_tokens) + (packed if geometry.summaries else 0)
    return MemoryEstimate(kv_bytes, rows * per_row + tile * per_tile_row + lists + logits + open_pages)


def available_bytes() -> int:
    """Memory that can still be used: what the kernel says is available, or what the control group leaves, whichever is less."""
    available = psutil.virtual_memory().available
    for limit_file, usage_file in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such controller, or "max": no limit
            limit = int(Path(limit_file).read_text())
            available = min(available, max(0, limit - int(Path(usage_file).read_text())))
    return available


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def release_freed() -> None:
    """Hand freed memory back to the system, where the C library can (glibc). Otherwise a server keeps what its busiest minute took."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
