"""Choosing the next token. Order as in vLLM: grammar, logit bias, end tokens before min_tokens, penalties; temperature, then min_p, top_k,
top_p; greedy is the arg max, lowest id on ties."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from zen_turbo.engine.guidance import Matcher
from zen_turbo.engine.request import SamplingParams


class Sampler:
    """One per request: owns the request's random generator, so that a seed gives the same answer whatever else is running, and what depends on
    the tokens so far.

    prompt_token_ids: for the repetition penalty. end_token_ids: what must not be drawn before min_tokens. matcher: the grammar's state.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        prompt_token_ids: Sequence[int] = (),
        end_token_ids: Collection[int] = (),
        matcher: Matcher | None = None,
    ) -> None:
        self.params = params
        self._matcher = matcher
        self._end_token_ids = sorted(end_token_ids)
        self._num_sampled = 0
        self._counts: dict[int, int] = {}  # of the answer's tokens
        self._seen = torch.tensor(sorted(set(prompt_token_ids)), dtype=torch.int64) if params.repetition_penalty != 1 else None
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    @property
    def finished(self) -> bool:
        """Whether the grammar is at its end: nothing but an end token could follow."""
        return self._matcher is not None and self._matcher.finished

    def sample(self, logits: torch.Tensor) -> int:
        """logits: float32 [vocab_size] -> token id, which then counts as part of the answer.

        Raises FloatingPointError where logits are not finite (wrong output must not look right) and InvalidRequestError where the grammar
        cannot go on.
        """
        if not bool(torch.isfinite(logits).all()):
            raise FloatingPointError("The model produced logits that are not finite.")
        adjusted = self.adjusted(logits)
        if self.params.temperature == 0:
            token = int(adjusted.argmax())
        else:
            token = int(torch.multinomial(self.probabilities(adjusted), 1, generator=self._generator))
        if self._matcher is not None:
            self._matcher.consume(token)
        self._num_sampled += 1
        self._counts[token] = self._counts.get(token, 0) + 1
        return token

    def adjusted(self, logits: torch.Tensor) -> torch.Tensor:
        """What is asked of the next token whatever the temperature, float32 [vocab_size]: -inf is never drawn. ``logits`` is left as it is."""
        params = self.params
        if self._matcher is not None:
            logits = torch.where(self._matcher.allowed(), logits, -torch.inf)
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias), dtype=torch.int64)
            logits = logits.index_add(0, ids, torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype))
        if self._num_sampled < params.min_tokens:
            logits = logits.index_fill(0, torch.tensor(self._end_token_ids, dtype=torch.int64), -torch.inf)
        if self._seen is not None:
            ids = torch.cat([self._seen, torch.tensor(list(self._counts), dtype=torch.int64)]).unique()
            chosen = logits[ids]
            chosen = torch.where(chosen > 0, chosen / params.repetition_penalty, chosen * params.repetition_penalty)
            logits = logits.index_copy(0, ids, chosen)
        if self._counts and (params.presence_penalty or params.frequency_penalty):
            ids = torch.tensor(list(self._counts), dtype=torch.int64)
            counts = torch.tensor(list(self._counts.values()), dtype=logits.dtype)
            logits = logits.index_add(0, ids, -(params.presence_penalty + params.frequency_penalty * counts))
        return logits

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """The distribution that is sampled from, float64 [vocab_size]; temperature must not be 0."""
        params = self.params
        # The largest becomes 0 first, so that no temperature, however small, makes it infinite.
        probabilities = torch.softmax((logits.double() - logits.max()) / params.temperature, dim=-1)
        if params.min_p > 0:
            probabilities = torch.where(probabilities >= params.min_p * probabilities.max(), probabilities, 0.0)
        if params.top_k or params.top_p < 1:
            sorted_probabilities, order = probabilities.sort(descending=True, stable=True)
            if params.top_k:
                sorted_probabilities[params.top_k :] = 0
            sorted_probabilities /= sorted_probabilities.sum()
            if params.top_p < 1:
                before = sorted_probabilities.cumsum(0) - sorted_probabilities
                sorted_probabilities[before >= params.top_p] = 0  # the token that crosses top_p stays
            probabilities = torch.zeros_like(probabilities).scatter_(0, order, sorted_probabilities)
        return probabilities / probabilities.sum()
