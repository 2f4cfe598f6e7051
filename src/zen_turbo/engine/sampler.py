"""Choosing the next token. Order as in vLLM: temperature, then min_p, top_k, top_p; greedy is the arg max, lowest id on ties."""

from __future__ import annotations

import torch

from zen_turbo.engine.request import SamplingParams


class Sampler:
    """One per request: owns the request's random generator, so that a seed gives the same answer whatever else is running."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def sample(self, logits: torch.Tensor) -> int:
        """logits: float32 [vocab_size] -> token id. Raises FloatingPointError where they are not finite: wrong output must not look right."""
        if not bool(torch.isfinite(logits).all()):
            raise FloatingPointError("The model produced logits that are not finite.")
        if self.params.temperature == 0:
            return int(logits.argmax())
        probabilities = self.probabilities(logits)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """The distribution that is sampled from, float64 [vocab_size]; temperature must not be 0."""
        params = self.params
        probabilities = torch.softmax(logits.double() / params.temperature, dim=-1)
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
