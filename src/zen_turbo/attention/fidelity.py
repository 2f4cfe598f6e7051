"""What a sparse prefill kept, measured while it runs: density, and exact recall on sampled rows.

One ``Fidelity`` belongs to one request. It holds what the policy learns (each layer's and head's share of mass to leave out) and what is
reported in the end.

Recall of a row is exp(lse_kept - lse_full): the log-sum-exp over the kept pages comes with the attention itself, the one over all pages from
one more pass of the decode kernel for that row, which also gives the exact output and costs as much as reading all keys once. Rows to sample
are fixed by position and layer, some in every window of ``WINDOW_TOKENS`` positions, fewer far out, where a pass costs more. What was learnt
in a window counts from the next one on. So the result depends neither on the size of chunks, which must divide the window, nor on whether a
prefix was computed now or found in the cache: what is known at every chunk's beginning is remembered, and a request that starts from a cached
prefix goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from zen_turbo.attention.blocks import Chunk
from zen_turbo.attention.policies import adaptive
from zen_turbo.attention.policies.adaptive import AdaptiveSettings
from zen_turbo.config import PAGE_TOKENS
from zen_turbo.kernels import BlockLists

WINDOW_TOKENS = 8192
Select = Callable[[Chunk, int], BlockLists]  # chunk, layer


def samples_in(window: int) -> int:
    """Rows to sample per layer in a window: 16 below 64K tokens, 8 below 128K, 4 below 512K, then 2."""
    for below, samples in ((8, 16), (16, 8), (64, 4)):
        if window < below:
            return samples
    return 2


class Mark(NamedTuple):
    """What is known before a chunk: the share each head leaves out, and sums over the window's samples so far. float32 [layers, heads]."""

    left_out: torch.Tensor
    errors: torch.Tensor
    pages: torch.Tensor
    samples: torch.Tensor


class Fidelity:
    """policy: settings of the adaptive policy, which is steered, or another policy, which is only measured.

    dense_below: rows at earlier positions read everything. dense_from: rows at this position and later read everything (the prompt's end).
    Both are moved to whole query blocks, towards more dense ones.

    The end differs from prompt to prompt, so chunks that reach into it must not be shared as a prefix; what is learnt stops before it.
    """

    def __init__(
        self, policy: AdaptiveSettings | Select, *, num_layers: int, num_heads: int, dense_below: int, dense_from: int
    ) -> None:
        self._policy = policy
        self.dense_below = -(-dense_below // PAGE_TOKENS) * PAGE_TOKENS
        self.dense_from = dense_from // PAGE_TOKENS * PAGE_TOKENS
        self.marks: dict[int, Mark] = {}
        share = torch.zeros((num_layers, num_heads))
        if isinstance(policy, AdaptiveSettings):
            share = adaptive.starting_share(num_layers, num_heads, policy)
        self._start = share
        self._known = Mark(share, *(torch.zeros_like(share) for _ in range(3)))
        self._kept = 0
        self._causal = 0
        self._recalls: list[torch.Tensor] = []  # [heads] each

    def mass(self, layer: int) -> torch.Tensor:
        """Share of estimated mass to keep in this chunk, float32 [heads]."""
        return 1 - self._known.left_out[layer]

    def select(self, chunk: Chunk, layer: int) -> BlockLists:
        """The policy's lists for one layer of a chunk."""
        if isinstance(self._policy, AdaptiveSettings):
            return adaptive.select(chunk, self.mass(layer), self._policy)
        return self._policy(chunk, layer)

    def begin_chunk(self, first_position: int) -> None:
        """Heed what was learnt if a window begins here, and remember the state of things."""
        if first_position % WINDOW_TOKENS == 0:
            share, errors, pages, samples = self._known
            if isinstance(self._policy, AdaptiveSettings):
                counts = samples.clamp_min(1)
                share = adaptive.adapt(share, errors / counts, pages / counts, self._policy, self._start)
            self._known = Mark(share, *(torch.zeros_like(share) for _ in range(3)))
        self.marks[first_position] = Mark(*(value.clone() for value in self._known))

    def marks_up_to(self, num_tokens: int) -> dict[int, Mark]:
        """What a prefix of ``num_tokens``, whole chunks that were computed, leaves to a request that goes on after it."""
        if num_tokens not in self.marks:  # the request ended there, before another chunk began
            self.begin_chunk(num_tokens)
        return self.marks

    def resume(self, marks: dict[int, Mark], num_tokens: int) -> None:
        """Go on after a cached prefix of ``num_tokens`` computed with ``marks``, by position of each chunk."""
        self.marks = {position: mark for position, mark in marks.items() if position < num_tokens}
        if num_tokens:
            self._known = Mark(*(value.clone() for value in marks[num_tokens]))

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
        return sorted(rows)

    def observe_row(
        self, layer: int, *, lse_kept: torch.Tensor, lse_full: torch.Tensor, error: torch.Tensor, pages: torch.Tensor
    ) -> None:
        """One sampled row, [heads] each: log-sum-exps over kept and over all keys, what each head's selection changed in the residual stream
        (squared, relative), and how many pages it read."""
        self._recalls.append((lse_kept - lse_full).exp().clamp(0, 1))  # the two kernels round differently: never more than all
        _, errors, read, samples = self._known
        errors[layer] += error
        read[layer] += pages
        samples[layer] += 1

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
