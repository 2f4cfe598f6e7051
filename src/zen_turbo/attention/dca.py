"""Dual Chunk Attention (arXiv 2402.17463, 2501.15383): positions that never exceed what the model was trained on.

Positions are cut into spans of L = chunk_size - local_size. A key is rotated once, by its place in its span. A query has three rotations,
and which one applies depends only on how many spans lie between query and key:

    key               j mod L
    query, same span  i mod L                            true distance
    query, previous   min((i mod L) + L, chunk_size)     true distance up to the clamp
    query, older      min(2 L - 1, chunk_size)           one rotation for every query

For prompts of at most chunk_size tokens the clamp never binds and no query sees a third span, so all distances are true and the result is
plain RoPE. The clamp follows the published code (chunk_size, not chunk_size - 1 as in the paper's figures). Frequencies are not rescaled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from zen_turbo.config import PAGE_TOKENS
from zen_turbo.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class DualChunk:
    """Geometry in tokens. Raises ConfigurationError, with the numbers, where it cannot work; nothing is rounded.

    ``trained_window`` is where the temperature starts. ``page_tokens`` is the alignment that L must have (a page has one variant, so it may
    not straddle two spans); only tests of the position functions change it.
    """

    chunk_size: int
    local_size: int
    trained_window: int
    page_tokens: int = PAGE_TOKENS

    def __post_init__(self) -> None:
        if not 0 < self.local_size < self.chunk_size:
            raise ConfigurationError(
                f"dca_local_size {self.local_size} must lie between 0 and dca_chunk_size {self.chunk_size}.", param="dca_local_size"
            )
        if self.trained_window <= 0:
            raise ConfigurationError(f"The trained window must be positive, not {self.trained_window}.")
        if self.span % self.page_tokens:
            raise ConfigurationError(
                f"dca_chunk_size - dca_local_size = {self.chunk_size} - {self.local_size} = {self.span} must be a multiple of "
                f"{self.page_tokens}, the page size.",
                param="dca_local_size",
            )
        if self.span < self.local_size:
            raise ConfigurationError(
                f"dca_local_size {self.local_size} must not exceed dca_chunk_size - dca_local_size = {self.chunk_size} - {self.local_size} "
                f"= {self.span}: a third span would begin inside the trained window.",
                param="dca_local_size",
            )

    @property
    def span(self) -> int:
        """L."""
        return self.chunk_size - self.local_size


class QueryPositions(NamedTuple):
    """int64 [T] each: the rotation of a query against keys of its own span, the previous one, and all older ones."""

    intra: torch.Tensor
    succ: torch.Tensor
    inter: torch.Tensor


def default_for(trained_window: int) -> DualChunk:
    """chunk_size = the trained window, local_size a quarter of it. Raises ConfigurationError where that is not a whole number of pages."""
    if trained_window % (4 * PAGE_TOKENS):  # otherwise three quarters of it are not whole pages
        raise ConfigurationError(
            f"A trained window of {trained_window} tokens has no default Dual Chunk Attention geometry: it is not a multiple of "
            f"{4 * PAGE_TOKENS}. Set dca_chunk_size and dca_local_size (their difference a multiple of {PAGE_TOKENS}), or set "
            "context_extension to none.",
            param="dca_chunk_size",
        )
    return DualChunk(chunk_size=trained_window, local_size=trained_window // 4, trained_window=trained_window)


def span_of(positions: torch.Tensor, geometry: DualChunk) -> torch.Tensor:
    """int64 [T] -> int64 [T]: which span each position lies in."""
    return positions // geometry.span


def key_positions(positions: torch.Tensor, geometry: DualChunk) -> torch.Tensor:
    """int64 [T] -> int64 [T]: the one rotation of a key."""
    return positions % geometry.span


def query_positions(positions: torch.Tensor, geometry: DualChunk) -> QueryPositions:
    """int64 [T] -> the three rotations of a query, clamped as in the published code."""
    intra = positions % geometry.span
    succ = (intra + geometry.span).clamp_max(geometry.chunk_size)
    inter = torch.full_like(positions, min(2 * geometry.span - 1, geometry.chunk_size))
    return QueryPositions(intra, succ, inter)


def scoring_positions(positions: torch.Tensor, geometry: DualChunk) -> QueryPositions:
    """Continuous, unclamped rotations: what selection must score with, lest far pages all look equally near."""
    intra = positions % geometry.span
    return QueryPositions(intra, intra + geometry.span, intra + geometry.chunk_size)


def temperature(positions: torch.Tensor, trained_window: int) -> torch.Tensor:
    """The factor on the logits of a query at each position, float32 [T]: m^2 with m = max(1, 0.1 ln((i + 1) / trained_window) + 1).

    Exactly 1 inside the trained window. A function of the query's own position, so it does not depend on how long the request turns out to
    be; keys are never scaled, so a cached key serves every request. The published rule is ``original_temperature``.
    """
    m = 0.1 * torch.log((positions.to(torch.float64) + 1) / trained_window) + 1
    return m.clamp_min(1.0).square().float()


def original_temperature(num_tokens: int, trained_window: int) -> float:
    """m^2 by the request's total length, as the published code scales keys by m and the softmax by m. For comparison only: it makes
    cached keys depend on the length of the request that wrote them."""
    m = 0.1 * torch.log(torch.tensor(num_tokens / trained_window, dtype=torch.float64)) + 1
    return float(m.clamp_min(1.0).square())
