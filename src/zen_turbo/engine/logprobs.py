"""Log probabilities of the model's own distribution: of one token that was drawn, and of a prompt's tokens, a tile of rows at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from zen_turbo.engine.request import TokenLogprobs


def token_logprobs(logits: torch.Tensor, token_id: int, top: int) -> TokenLogprobs:
    """logits: float32 [vocab_size] as the model gave them; ``top``: number of likeliest tokens to name."""
    values = torch.log_softmax(logits.double(), dim=-1)
    best = values.topk(min(top, len(values)))
    return TokenLogprobs(token_id, float(values[token_id]), tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)))


class PromptLogprobs:
    """Gathers what the rows of a prompt say about the tokens that follow them. Rows may come in any tiles, in order.

    Kept per token: 4 bytes and 8 for each of ``top`` alternatives, never a row of the vocabulary.
    """

    def __init__(self, token_ids: Sequence[int], top: int) -> None:
        self._token_ids = list(token_ids)
        self._targets = torch.tensor(self._token_ids[1:], dtype=torch.int64)
        self._logprobs = torch.empty(len(self._targets))
        self._top_ids = torch.empty((len(self._targets), top), dtype=torch.int32)
        self._top_logprobs = torch.empty((len(self._targets), top))

    def add(self, first_position: int, logits: torch.Tensor) -> None:
        """logits: float32 [rows, vocab_size] of the tokens at first_position and on. The prompt's last row is the answer's and is left out."""
        rows = min(len(logits), len(self._targets) - first_position)
        if rows <= 0:
            return
        where = slice(first_position, first_position + rows)
        values = torch.log_softmax(logits[:rows], dim=-1)
        self._logprobs[where] = values.gather(1, self._targets[where, None])[:, 0]
        best = values.topk(self._top_ids.shape[1])
        self._top_ids[where], self._top_logprobs[where] = best.indices.int(), best.values

    def result(self) -> tuple[TokenLogprobs, ...]:
        tops = zip(self._top_ids.tolist(), self._top_logprobs.tolist(), strict=True)
        rows = zip(self._token_ids[1:], self._logprobs.tolist(), tops, strict=True)
        return tuple(TokenLogprobs(token, logprob, tuple(zip(*top, strict=True))) for token, logprob, top in rows)
