"""The pool of page slots that all sequences share.

One memory map, anonymous or of a file, committed by the operating system as pages are first written, viewed as uint8
[num_layers, num_slots, num_key_value_heads, page_bytes]: a layer's slots lie together, so that a huge page serves many of them. Summaries
have a map of their own, so that scoring all pages of a layer reads one stretch of memory. Slots are
reference-counted, because sequences that share a prefix share its full pages read-only. Allocation takes the slot freed last (still warm in
cache and already committed), else the lowest slot never used.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch

from zen_turbo.errors import InsufficientMemoryError
from zen_turbo.kv.geometry import PageGeometry


class PagePool:
    def __init__(self, geometry: PageGeometry, num_slots: int, *, folder: Path | None = None) -> None:
        """folder: keep the pages in a file there that has no name, so that they may exceed memory: the operating system writes out what was not
        used for long and reads it again when a kernel touches it. Its room on the disk is taken now, so that a full disk is an OSError here and
        no fault later."""
        assert 0 < num_slots < 2**31
        self._folder = folder
        self.geometry = geometry
        self.num_slots = num_slots
        shape = (geometry.num_layers, num_slots, geometry.num_key_value_heads)
        self._maps: list[mmap.mmap] = []
        self._storage: torch.Tensor | None = self._allocate(torch.uint8, (*shape, geometry.page_bytes))
        self._summaries: torch.Tensor | None = None
        if geometry.summaries:
            self._summaries = self._allocate(torch.float32, (*shape, 3, geometry.head_dim))
        self._references = [0] * num_slots
        self._free: list[int] = []
        self._next_unused = 0

    def _allocate(self, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        size = math.prod(shape) * dtype.itemsize
        if self._folder is None:
            self._maps.append(mmap.mmap(-1, size))
        else:
            with tempfile.TemporaryFile(dir=self._folder) as file:
                os.posix_fallocate(file.fileno(), 0, size)
                self._maps.append(mmap.mmap(file.fileno(), size))
        with contextlib.suppress(AttributeError, OSError):  # huge pages are an optimisation that some kernels refuse
            self._maps[-1].madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(self._maps[-1], dtype=dtype).view(shape)

    @property
    def num_free(self) -> int:
        return len(self._free) + self.num_slots - self._next_unused

    def layer(self, index: int) -> torch.Tensor:
        """uint8 [num_slots, num_key_value_heads, page_bytes]."""
        assert self._storage is not None, "the pool is closed"
        return self._storage[index]

    def layer_summaries(self, index: int) -> torch.Tensor | None:
        """float32 [num_slots, num_key_value_heads, 3, head_dim], or None where they are not kept."""
        return None if self._summaries is None else self._summaries[index]

    def read_slot(self, slot: int) -> bytes:
        """Everything a slot holds, ``geometry.slot_bytes``: pages of every layer and KV head, then their summaries."""
        assert self._storage is not None, "the pool is closed"
        parts = [self._storage[:, slot].numpy()]
        if self._summaries is not None:
            parts.append(self._summaries[:, slot].numpy())
        return b"".join(part.tobytes() for part in parts)

    def write_slot(self, slot: int, content: bytes | bytearray) -> None:
        """What ``read_slot`` gave, of the same geometry."""
        assert self._storage is not None, "the pool is closed"
        assert len(content) == self.geometry.slot_bytes
        pages = self._storage[:, slot]
        pages.copy_(torch.frombuffer(content, dtype=torch.uint8, count=pages.numel()).view(pages.shape))
        if self._summaries is not None:
            summaries = self._summaries[:, slot]
            values = torch.frombuffer(content, dtype=torch.float32, count=summaries.numel(), offset=pages.numel())
            summaries.copy_(values.view(summaries.shape))

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` slots, each with one reference. Raises InsufficientMemoryError and takes none if there are too few."""
        if count > self.num_free:
            raise InsufficientMemoryError(
                f"The KV cache of {count} pages",
                need_bytes=count * self.geometry.slot_bytes,
                have_bytes=self.num_free * self.geometry.slot_bytes,
            )
        reused = min(count, len(self._free))
        slots = [self._free.pop() for _ in range(reused)]
        slots += range(self._next_unused, self._next_unused + count - reused)
        self._next_unused += count - reused
        for slot in slots:
            self._references[slot] = 1
        return slots

    def references(self, slot: int) -> int:
        """How many sequences and indexes hold the slot."""
        return self._references[slot]

    def share(self, slots: Iterable[int]) -> None:
        """Add one reference to each slot, which must be in use."""
        for slot in slots:
            assert self._references[slot] > 0, f"slot {slot} is free"
            self._references[slot] += 1

    def free(self, slots: Iterable[int]) -> None:
        """Drop one reference from each slot; a slot without references can be allocated again."""
        for slot in slots:
            assert self._references[slot] > 0, f"slot {slot} is freed twice"
            self._references[slot] -= 1
            if self._references[slot] == 0:
                self._free.append(slot)

    def verify(self, tables: Iterable[Iterable[int]]) -> None:
        """Check that exactly the slots named by these page tables are in use, each as often as it is named, and that every other slot is
        free exactly once. Raises AssertionError with the first difference."""
        named: Counter[int] = Counter()
        for table in tables:
            slots = list(table)
            assert len(slots) == len(set(slots)), "a page table names a slot twice"
            named.update(slots)
        assert len(self._free) == len(set(self._free)), "a slot is free twice"
        free = set(self._free)
        for slot in range(self.num_slots):
            count = self._references[slot]
            assert count == named[slot], f"slot {slot} has {count} references, {named[slot]} are known"
            assert (count == 0) == (slot in free or slot >= self._next_unused), f"slot {slot} is both used and free, or neither"

    def close(self) -> None:
        """Give the memory back. Views of layers must be gone."""
        self._storage = self._summaries = None
        for memory in self._maps:
            with contextlib.suppress(BufferError):  # a view is still alive: the map goes with it
                memory.close()
