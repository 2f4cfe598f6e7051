"""What a sparse prefill kept, measured while it runs: density, and exact recall on sampled rows.

One ``Fidelity`` belongs to one request. It holds what the policy learns (each layer's and head's share of mass to leave out, and what that is
seen to cost) and what is reported in the end.

Recall of a row is exp(lse_kept - lse_full): the log-sum-exp over the kept pages comes with the attention itself, the one over all pages from
one more pass of the decode kernel for that row, which also gives the exact output and costs as much as reading all keys once. Rows to sample
are fixed by position and layer, some in every window of ``WINDOW_TOKENS`` positions, fewer far out, where a pass costs more. What was learnt
in a window counts from the next one on. So the result depends neither on the size of chunks, which must divide the window, nor on whether a
prefix was computed now or found in the cache: every page carries a note of what was sampled in its rows, and one that begins a window of what
was known there, and a request that starts from cached pages goes on from their notes.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from zen_turbo.attention.blocks import Chunk
from zen_turbo.attention.policies import adaptive
from zen_turbo.attention.policies.adaptive import AdaptiveSettings, Learnt
from zen_turbo.config import PAGE_TOKENS
from zen_turbo.kernels import BlockLists

WINDOW_TOKENS = 8192
Select = Callable[[Chunk, int], BlockLists]  # chunk, layer


def samples_in(window: int) -> int:
    """Rows to sample per layer in a window: 32 below 16K tokens, 16 below 64K, 8 below 128K, 4 below 512K, then 2."""
    for below, samples in ((2, 32), (8, 16), (16, 8), (64, 4)):
        if window < below:
            return samples
    return 2


def recall_of(lse_kept: torch.Tensor, lse_full: torch.Tensor) -> torch.Tensor:
    """The share of attention mass that was kept. The two kernels round differently: never more than all."""
    return (lse_kept - lse_full).exp().clamp(0, 1)


class Observation(NamedTuple):
    """One sampled row of one layer: for each head what its selection changed in the residual stream (squared, relative), and the pages it
    read; float32 [heads] each."""

    position: int
    layer: int
    error: torch.Tensor
    pages: torch.Tensor


class Note(NamedTuple):
    """What a page leaves to those who go on after it: what was known of the heads, if a window begins with this page, and what was sampled in
    its rows."""

    learnt: Learnt | None
    observations: tuple[Observation, ...]

    def to_bytes(self) -> bytes:
        """Little-endian: layers, heads, 1 if something was known, observations; what was known; then for each observation position, layer, errors,
        pages."""
        rows = [] if self.learnt is None else [part.flatten() for part in self.learnt]
        layers, heads = (0, 0) if self.learnt is None else self.learnt.left_out.shape
        if self.observations:
            heads = len(self.observations[0].error)
        head = struct.pack("<IIII", layers, heads, self.learnt is not None, len(self.observations))
        where = b"".join(struct.pack("<qI", seen.position, seen.layer) for seen in self.observations)
        rows += [part for seen in self.observations for part in (seen.error, seen.pages)]
        values = torch.cat(rows).numpy().astype("<f4").tobytes() if rows else b""
        return head + where + values

    @classmethod
    def from_bytes(cls, content: bytes) -> Note:
        """What ``to_bytes`` gave; checked by whoever stored it."""
        layers, heads, knows, count = struct.unpack_from("<IIII", content)
        where = [struct.unpack_from("<qI", content, 16 + 12 * number) for number in range(count)]
        values = torch.tensor(array("f", content[16 + 12 * count :]))
        known = 3 * layers * heads if knows else 0
        learnt = Learnt(*values[:known].view(3, layers, heads)) if knows else None
        rows = values[known:].view(count, 2, heads)
        return cls(learnt, tuple(Observation(*place, *row) for place, row in zip(where, rows, strict=True)))


class Fidelity:
    """policy: settings of the adaptive policy, which is steered, or another policy, which is only measured.

    dense_below: rows at earlier positions read everything. dense_from: rows at this position and later are the prompt's end, which reads
    everything, or with the adaptive policy as many pages as it says. Both are moved to whole query blocks, towards more dense ones.

    The end differs from prompt to prompt, so chunks that reach into it must not be shared as a prefix; what is learnt stops before it.
    """

    def __init__(
        self, policy: AdaptiveSettings | Select, *, num_layers: int, num_heads: int, dense_below: int, dense_from: int
    ) -> None:
        self._policy = policy
        self.dense_below = -(-dense_below // PAGE_TOKENS) * PAGE_TOKENS
        self.dense_from = dense_from // PAGE_TOKENS * PAGE_TOKENS
        self._num_layers, self._num_heads = num_layers, num_heads
        self._learnt: Learnt | None = None
        self._end: dict[str, int] | None = None
        if isinstance(policy, AdaptiveSettings):
            self._learnt = adaptive.begin(num_layers, num_heads, policy)
            # By where the end begins and not by the chunk: chunks of any size must choose alike.
            self._end = adaptive.end_of(self.dense_from // PAGE_TOKENS, policy)
        self._observed: list[Observation] = []  # in this window, ascending for each layer
        self._known_at: dict[int, Learnt] = {}  # by the first page of a window
        self._page_observations: dict[int, list[Observation]] = {}
        self._kept = 0
        self._causal = 0
        self._recalls: list[torch.Tensor] = []  # [heads] each

    def bounds_end(self, first_position: int, num_rows: int) -> bool:
        """Whether these rows reach into the prompt's end, and it does not read everything."""
        return self._end is not None and first_position + num_rows > max(self.dense_from, self.dense_below)

    def mass(self, layer: int) -> torch.Tensor:
        """Share of estimated mass that the adaptive policy keeps in this chunk, float32 [heads]."""
        assert self._learnt is not None
        return 1 - self._learnt.left_out[layer]

    def needs(self, layer: int) -> torch.Tensor | None:
        """Share of estimated mass that each head was seen to need, float32 [heads]; None before all were sampled, and without adaptive policy."""
        if self._learnt is None or not (self._learnt.pages[layer] > 0).all():
            return None
        return self.mass(layer)

    def select(self, chunk: Chunk, layer: int) -> BlockLists:
        """The policy's lists for one layer of a chunk."""
        if isinstance(self._policy, AdaptiveSettings):
            window = chunk.first_position // WINDOW_TOKENS * WINDOW_TOKENS
            end = self._end if self.bounds_end(chunk.first_position, chunk.num_rows) else None
            return adaptive.select(chunk, layer, self._num_layers, self.mass(layer), self._policy, window=window, end=end)
        return self._policy(chunk, layer)

    def begin_chunk(self, first_position: int) -> None:
        """Heed what was learnt if a window begins here."""
        if first_position % WINDOW_TOKENS:
            return
        if isinstance(self._policy, AdaptiveSettings) and self._learnt is not None:
            error, pages = (torch.zeros((self._num_layers, self._num_heads)) for _ in range(2))
            for seen in self._observed:
                error[seen.layer] += seen.error
                pages[seen.layer] += seen.pages
            self._learnt = adaptive.learn(self._learnt, error, pages, first_position, self._policy)
            self._known_at[first_position // PAGE_TOKENS] = self._learnt
        self._observed = []

    def note(self, page: int) -> Note:
        """What a page that was computed here leaves to others."""
        return Note(self._known_at.get(page), tuple(self._page_observations.get(page, ())))

    def resume(self, notes: Sequence[Note]) -> None:
        """Go on after a cached prefix of whole pages, one note each."""
        first = next((page for page in reversed(range(len(notes))) if notes[page].learnt is not None), 0)
        if notes and notes[first].learnt is not None:
            self._learnt = notes[first].learnt
        self._observed = [seen for note in notes[first:] for seen in note.observations]

    def rows_to_sample(self, first_position: int, num_rows: int, layer: int) -> list[int]:
        """Rows of this chunk on which recall is measured in ``layer``, ascending."""
        last = min(first_position + num_rows, self.dense_from)
        rows = set()
        for window in range(first_position // WINDOW_TOKENS, -(-last // WINDOW_TOKENS)):
            samples = samples_in(window)
            for sample in range(samples):
                # One in each of as many equal parts of the window, where in it by a multiplicative hash: layers look at different rows.
                part = WINDOW_TOKENS // samples
                place = ((window * 64 + sample) * 2654435761 + layer * 40503) * 2246822519 >> 7
                position = window * WINDOW_TOKENS + sample * part + place % part
                if max(first_position, self.dense_below) <= position < last:
                    rows.add(position - first_position)
        end_row = self.dense_from + PAGE_TOKENS - 1  # of the end's first query block
        if self.bounds_end(end_row, 1) and first_position <= end_row < first_position + num_rows:
            rows.add(end_row - first_position)
        return sorted(rows)

    def observe_row(self, seen: Observation, *, lse_kept: torch.Tensor, lse_full: torch.Tensor) -> None:
        """One sampled row, with its log-sum-exps over kept and over all keys, [heads] each. The prompt's end teaches nothing about other rows."""
        self._recalls.append(recall_of(lse_kept, lse_full))
        if seen.position >= self.dense_from:
            return
        self._observed.append(seen)
        self._page_observations.setdefault(seen.position // PAGE_TOKENS, []).append(seen)

    def observe_lists(self, lists: BlockLists, *, num_heads: int, causal_pairs: int) -> None:
        """Count pairs of one layer's chunk; causal_pairs: (query block, key page) pairs of one head."""
        self._kept += lists.entries.numel() * lists.heads_per_list
        self._causal += causal_pairs * num_heads

    @property
    def density(self) -> float:
        """Kept over causal pairs so far; 1 before anything was computed."""
        return self._kept / self._causal if self._causal else 1.0

    @property
    def recall(self) -> float | None:
        """Mean over all samples, None without any."""
        return float(torch.cat(self._recalls).mean()) if self._recalls else None

    @property
    def recall_p5(self) -> float | None:
        """5th percentile over all samples (one per sampled row and head)."""
        return float(torch.cat(self._recalls).quantile(0.05)) if self._recalls else None
