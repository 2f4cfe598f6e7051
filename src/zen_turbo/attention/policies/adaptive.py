"""The adaptive policy: for each head and query block the pages of largest estimated mass, as many as that head turns out to need.

Estimates come from page means, which flatter a selection: the mass of scattered keys hides in a mean (Jensen), by little in a focused head and
by much in a diffuse one. So the share of *estimated* mass to keep is no promise. It is steered: on sampled rows the exact recall is measured
(``attention.fidelity``), and ``adapt`` moves each head's share towards the one with which the measured recall is what was asked for. A
focused head ends with few pages, a diffuse one with many, without any calibration beforehand.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch

from zen_turbo.attention import blocks
from zen_turbo.kernels import BlockLists, PageView


@dataclass(frozen=True, kw_only=True)
class AdaptiveSettings:
    """``recall``: the exact recall to aim at. ``mass``: share of estimated mass that every head begins with. ``sample_rows``: rows of a query
    block that are scored. ``step``: how fast shares move. ``least_mass``: where they stop falling, so that a head whose samples all looked
    easy can still find something new."""

    recall: float
    mass: float
    least_mass: float
    sink_pages: int = 1
    local_pages: int = 8
    sample_rows: int = 8
    step: float = 0.3


_LEAST_LEFT_OUT = 1e-4

PRESETS = {
    "turbo": AdaptiveSettings(recall=0.80, mass=0.80, least_mass=0.50, local_pages=4, sample_rows=4),
    "balanced": AdaptiveSettings(recall=0.92, mass=0.95, least_mass=0.80),
    "faithful": AdaptiveSettings(recall=0.97, mass=0.98, least_mass=0.90),
}


def settings_of(preset: str, recall: float | None) -> AdaptiveSettings:
    """A preset, or with ``recall`` one that aims at that instead. Raises KeyError for an unknown preset."""
    settings = PRESETS[preset]
    if recall is None:
        return settings
    return dataclasses.replace(settings, recall=recall, mass=(1 + recall) / 2, least_mass=recall / 2)


def select(
    queries: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    kv: PageView,
    mass: torch.Tensor,
    settings: AdaptiveSettings,
    *,
    first_position: int,
    scale: float,
    span_pages: int | None,
    logit_factor: torch.Tensor | None,
    sparse_blocks: range,
) -> BlockLists:
    """Lists for every head; mass: float32 [heads]. Query blocks of this run outside ``sparse_blocks`` read everything. The other arguments as
    for ``kernels.attend``."""
    return blocks.select_by_mass(
        queries,
        kv,
        mass,
        first_position=first_position,
        scale=scale,
        span_pages=span_pages,
        sink_pages=settings.sink_pages,
        local_pages=settings.local_pages,
        sample_rows=settings.sample_rows,
        logit_factor=logit_factor,
        sparse_blocks=sparse_blocks,
    )


def surprise(recall: torch.Tensor, settings: AdaptiveSettings) -> torch.Tensor:
    """How much better than wanted a sample was, in units of what is wanted to be left out; recall and result: float32 [heads].

    0 is as wanted, 1 is perfect. A bad sample counts at most three steps, for recall has a long tail below and none above.
    """
    return ((recall - settings.recall) / (1 - settings.recall)).clamp(-3, 1)


def adapt(left_out: torch.Tensor, surprises: torch.Tensor, settings: AdaptiveSettings) -> torch.Tensor:
    """The shares to leave out from now on; surprises: the sum over the samples so far unheeded; all float32 [layers, heads].

    A share comes to rest where the mean surprise is none, that is where the mean recall is the wanted one.
    """
    return (left_out * torch.exp(settings.step * surprises)).clamp(_LEAST_LEFT_OUT, 1 - settings.least_mass)


def starting_share(num_layers: int, num_heads: int, settings: AdaptiveSettings) -> torch.Tensor:
    """Share of estimated mass to leave out before anything was sampled, float32 [layers, heads]."""
    return torch.full((num_layers, num_heads), 1 - settings.mass)
