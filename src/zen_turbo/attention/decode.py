"""Sparse decode: which pages one new token reads, so that an answer streams as fast after a million tokens as after a few thousand.

Two ways, of one shape: sinks, recent pages, and at most ``most_pages`` others for each KV head, because a page is read once for all query heads
of a group. Up to ``dense_pages`` everything is read.

    SparseDecode   a token scores every page with its own query (``csrc/select_token.inl``), and takes a quarter of ``most_pages`` by the
                   bounds of their keys, where a single key may be looked for, and others by their mean keys until these hold ``mass``.
                   What it chose in a layer serves the next token too, if that is of the same page; layers take turns (``select_every``).
                   After an adaptive prefill a KV head keeps the share that the neediest head of its group was seen to need, and may read
                   ``NEEDY_TIMES`` as many pages for it: a few diffuse heads make most of the difference from dense decode
    SnapDecode     the prompt's last ``OBSERVED_ROWS`` rows choose once, and every token of the answer reads what they looked at (SnapKV,
                   2404.14469, with pages in place of pooled keys): a token costs no scoring, and cannot look for anything else

What was kept is measured as in the prefill: one layer of every ``SAMPLE_EVERY``-th token computes its exact log-sum-exp too, which costs one
layer's keys and values, and layers take turns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from zen_turbo.attention.blocks import Chunk, choose_by_mass, lists_from_mask, select_by_mass
from zen_turbo.attention.fidelity import Fidelity, recall_of
from zen_turbo.config import PAGE_TOKENS
from zen_turbo.kernels import BlockLists, TokenSelection

SAMPLE_EVERY = 16
OBSERVED_ROWS = 64
NEEDY_TIMES = 4


@dataclass(frozen=True, kw_only=True)
class DecodeSettings:
    mass: float = 0.98
    most_pages: int = 256
    sink_pages: int = 1
    local_pages: int = 8
    dense_pages: int = 128
    select_every: int = 2


class SparseDecode:
    """Selection and telemetry of one request's answer. prompt_tokens: where the answer begins; fidelity: of the prefill, if it was sparse."""

    selects_by_mass = True  # as ``selection`` says, so that native code can do it from token to token

    def __init__(
        self, settings: DecodeSettings, *, num_layers: int, prompt_tokens: int, fidelity: Fidelity | None = None
    ) -> None:
        self.settings = settings
        self.prompt_tokens = prompt_tokens
        self._num_layers = num_layers
        self._fidelity = fidelity
        self._selection: TokenSelection | None = None
        self._lists: dict[int, tuple[int, BlockLists]] = {}  # by layer: the page of the token that chose them
        self._recalls: list[torch.Tensor] = []  # [heads] each

    def is_sparse(self, position: int) -> bool:
        """Whether the token at ``position`` may leave pages out."""
        return position >= self.prompt_tokens and position // PAGE_TOKENS > self.settings.dense_pages

    def observe_prompt(self, end: Chunk, layer: int) -> None:
        """The prompt's last rows, whole query blocks of them, in the layer in which they attend. Not needed here."""

    def select(self, token: Chunk, layer: int) -> BlockLists:
        """The pages that ``token``, a chunk of one row at any position, reads: one list per KV head."""
        settings, position = self.settings, token.first_position
        chosen_at, lists = self._lists.get(layer, (-1, None))
        if lists is None or (position + layer) % settings.select_every == 0 or chosen_at != position // PAGE_TOKENS:
            lists = self._choose(token, layer)
            self._lists[layer] = position // PAGE_TOKENS, lists
        return lists

    def _choose(self, token: Chunk, layer: int) -> BlockLists:
        rule = self.selection(token.kv.pages.shape[1], token.dtype)
        return select_by_mass(token, rule.mass[layer], **rule.settings(layer))

    def selection(self, kv_heads: int, dtype: torch.dtype) -> TokenSelection:
        """How tokens of that dtype choose."""
        if self._selection is None:
            settings = self.settings
            mass, most_pages = zip(*(self._limits_of(layer, kv_heads) for layer in range(self._num_layers)), strict=True)
            self._selection = TokenSelection(
                mass,
                most_pages,
                sink_pages=settings.sink_pages,
                local_pages=settings.local_pages,
                bound_pages=settings.most_pages // 4,
                codes=dtype == torch.bfloat16,  # fp32 engines are oracles
            )
        return self._selection

    def _limits_of(self, layer: int, kv_heads: int) -> tuple[torch.Tensor, int]:
        """Share of estimated mass to keep, float32 [kv_heads], and the most pages. The same for every token: nothing is learnt after the prompt."""
        needs = self._fidelity.needs(layer) if self._fidelity is not None else None
        if needs is None:
            return torch.full((kv_heads,), self.settings.mass), self.settings.most_pages
        return needs.view(kv_heads, -1).amax(dim=1), self.settings.most_pages * NEEDY_TIMES

    def sampled_layer(self, position: int) -> int | None:
        """The layer in which recall is measured for this token."""
        turn, rest = divmod(position, SAMPLE_EVERY)
        return turn % self._num_layers if rest == 0 else None

    def observe(self, *, lse_kept: torch.Tensor, lse_full: torch.Tensor) -> None:
        """Log-sum-exps of one token over kept and over all keys, [heads] each."""
        self._recalls.append(recall_of(lse_kept, lse_full))

    @property
    def recall(self) -> float | None:
        """Mean over samples and heads, None without any."""
        return float(torch.cat(self._recalls).mean()) if self._recalls else None


class SnapDecode(SparseDecode):
    """Pages chosen once, by the prompt's end."""

    selects_by_mass = False

    def __init__(
        self, settings: DecodeSettings, *, num_layers: int, prompt_tokens: int, fidelity: Fidelity | None = None
    ) -> None:
        super().__init__(settings, num_layers=num_layers, prompt_tokens=prompt_tokens, fidelity=fidelity)
        self._chosen: dict[int, torch.Tensor] = {}  # by layer: bool [kv_heads, pages]

    def observe_prompt(self, end: Chunk, layer: int) -> None:
        kv_heads = end.kv.pages.shape[1]
        energies = torch.empty((2, kv_heads, end.num_blocks, end.num_pages))
        rows = OBSERVED_ROWS
        choose_by_mass(end, torch.ones(kv_heads), sink_pages=0, local_pages=0, sample_rows=rows, per_kv_head=True, bound_pages=1, energies=energies)
        by_mean, by_bound = energies.sum(dim=2)
        most = min(self.settings.most_pages, end.num_pages)
        chosen = torch.zeros_like(by_mean, dtype=torch.bool).scatter_(1, by_bound.topk(most // 2, dim=1).indices, True)
        best = by_mean.masked_fill(chosen, -1).topk(most - most // 2, dim=1).indices
        self._chosen[layer] = chosen.scatter_(1, best, True)

    def select(self, token: Chunk, layer: int) -> BlockLists:
        chosen = self._chosen[layer]
        keep = torch.zeros((len(chosen), 1, token.num_pages), dtype=torch.bool)
        keep[:, 0, : chosen.shape[1]] = chosen
        # Everything since the prompt's last pages: the answer's own tokens are always read.
        keep[:, 0, max(0, self.prompt_tokens // PAGE_TOKENS - self.settings.local_pages) :] = True
        return lists_from_mask(keep, token, sink_pages=self.settings.sink_pages, local_pages=self.settings.local_pages)


DECODERS = {"sparse": SparseDecode, "snapkv": SnapDecode}
