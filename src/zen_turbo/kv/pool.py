"""The pool of page slots that all sequences share.

One memory map, anonymous or of a file, committed by the operating system as pages are first written, viewed as uint8
[num_layers, num_slots, num_key_value_heads, page_bytes]: a layer's slots lie together, so that a huge page serves many of them. Summaries
have a map of their own, so that scoring all pages of a layer reads one stretch of memory. Slots are
reference-counted, because sequences that share a prefix share its full pages read-only. Allocation takes the slot freed last (still warm in
cache and already committed), else the lowest slot never used. Pages that lie in a file can be mapped over slots instead of being copied.
"""

from __future__ import annotations

import contextlib
import errno
import math
import mmap
import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from zen_turbo.errors import InsufficientMemoryError
from zen_turbo.kv.geometry import PageGeometry
from zen_turbo.kv.mapping import can_map, map_over

_RUN_SLOTS = 64  # so many rows of any block are whole pages of the operating system
_MOST_MAPPED = 24_000  # of the 65,530 mappings that Linux allows a process: two prompts of a million tokens; what comes later is copied


class PagePool:
    def __init__(self, geometry: PageGeometry, num_slots: int, *, folder: Path | None = None) -> None:
        """folder: keep the pages in a file there that has no name, so that they may exceed memory: the operating system writes out what was not
        used for long and reads it again when a kernel touches it. Its room on the disk is taken now, so that a full disk is an OSError here and
        no fault later."""
        assert 0 < num_slots < 2**31
        self._folder = folder
        self.geometry = geometry
        self.num_slots = num_slots
        room = -(-num_slots // _RUN_SLOTS) * _RUN_SLOTS  # every layer's slots begin where a file can be mapped
        shape = (geometry.num_layers, room, geometry.num_key_value_heads)
        self._maps: list[mmap.mmap] = []
        self._storage: torch.Tensor | None = self._allocate(torch.uint8, (*shape, geometry.page_bytes))
        self._summaries: torch.Tensor | None = None
        if geometry.summaries:
            self._summaries = self._allocate(torch.float32, (*shape, 3, geometry.head_dim))
        self._references = [0] * num_slots
        self._free: list[int] = []
        self._next_unused = 0
        self._num_mapped = 0

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
        return self._storage[index, : self.num_slots]

    def layer_summaries(self, index: int) -> torch.Tensor | None:
        """float32 [num_slots, num_key_value_heads, 3, head_dim], or None where they are not kept."""
        return None if self._summaries is None else self._summaries[index, : self.num_slots]

    def blocks(self) -> list[np.ndarray]:
        """All that slots hold: every layer's pages, then every layer's summaries, each uint8 [num_slots, bytes]. Views of the memory itself."""
        assert self._storage is not None, "the pool is closed"
        parts = [self._storage] if self._summaries is None else [self._storage, self._summaries.view(torch.uint8)]
        return [layer.reshape(len(layer), -1)[: self.num_slots] for part in parts for layer in part.numpy()]

    def fill(self, block: np.ndarray, slots: list[int], descriptor: int, offset: int) -> None:
        """Put the rows that lie together in a file from ``offset`` on into these slots of one of the ``blocks``: mapped where slots and file lie on
        the same bounds, copied elsewhere. Raises OSError."""
        row, mapped = block.shape[1], 0
        address = block.ctypes.data + slots[0] * row
        if self._num_mapped < _MOST_MAPPED and can_map(address, offset) and slots == list(range(slots[0], slots[0] + len(slots))):
            step = math.lcm(row, mmap.PAGESIZE) // row
            mapped = len(slots) // step * step
        if mapped:
            try:
                map_over(address, mapped * row, descriptor, offset)
                self._num_mapped += 1
            except OSError:  # the file system cannot, or the process has too many mappings already
                mapped = 0
        if mapped < len(slots):
            content = os.pread(descriptor, (len(slots) - mapped) * row, offset + mapped * row)
            if len(content) != (len(slots) - mapped) * row:
                raise OSError(errno.EIO, "the file is too short")
            block[slots[mapped:]] = np.frombuffer(content, np.uint8).reshape(-1, row)

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

    def allocate_run(self, count: int) -> list[int]:
        """The same, as consecutive slots from a bound on that a file can be mapped over, if so many were never used."""
        first = -(-self._next_unused // _RUN_SLOTS) * _RUN_SLOTS
        if count <= 0 or first + count > self.num_slots:
            return self.allocate(count)
        self._free += reversed(range(self._next_unused, first))
        self._next_unused = first + count
        slots = list(range(first, first + count))
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
