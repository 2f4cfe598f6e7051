"""The adaptive policy: for each head and query block the pages of largest estimated mass, as many as that head turns out to need.

Estimates come from page means, which flatter a selection: the mass of scattered keys hides in a mean (Jensen), by little in a focused head and
by much in a diffuse one. So the share of *estimated* mass to keep is no promise. And what a missing share costs differs too: the output of a
diffuse head is close to an average, whichever half of the keys it reads. So shares are steered by what counts, the error of the output. On
sampled rows attention is computed exactly (``attention.fidelity``), which gives for each head

    error   squared norm of what the selection changes in the residual stream, relative to that stream
    pages   what the head read there

The least total error for a given number of pages is where one more page would help every head alike. Errors fall like pages^-2a, so that
price, error / pages up to a constant, is made equal for all heads of all layers: ``adapt`` moves each head's share towards the one with which
it pays ``price``. A preset is a price. Nothing is calibrated beforehand, and a head may change its ways within a prompt.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from zen_turbo.attention import blocks
from zen_turbo.attention.blocks import Chunk

if TYPE_CHECKING:
    from zen_turbo.kernels import BlockLists

# How pages depend on the share left out, and errors on pages, near a working point: pages ~ left_out^-_PAGES, error ~ pages^-_ERROR. Measured
# roughly on source code at 16K to 64K; they set how far one correction goes, not where corrections end.
_PAGES = 0.6
_ERROR = 1.5


@dataclass(frozen=True, kw_only=True)
class AdaptiveSettings:
    """``price``: relative squared output error per page that every head is made to pay. ``mass``: share of estimated mass that a head begins
    with. ``least_mass``, ``most_mass``: where shares stop. ``sample_rows``: rows of a query block that are scored."""

    price: float
    mass: float
    least_mass: float = 0.4
    most_mass: float = 0.9995
    sink_pages: int = 1
    local_pages: int = 4
    sample_rows: int = 8


PRESETS = {
    "turbo": AdaptiveSettings(price=1e-5, mass=0.85, sample_rows=4),
    "balanced": AdaptiveSettings(price=1e-6, mass=0.93),
    "faithful": AdaptiveSettings(price=1e-7, mass=0.98),
}


def settings_of(preset: str, mass: float | None) -> AdaptiveSettings:
    """A preset; with ``mass``, the share that every head keeps, unsteered. Raises KeyError for an unknown preset."""
    settings = PRESETS[preset]
    return settings if mass is None else dataclasses.replace(settings, mass=mass, least_mass=mass, most_mass=mass)


def select(chunk: Chunk, mass: torch.Tensor, settings: AdaptiveSettings) -> BlockLists:
    """Lists for every head; mass: float32 [heads]."""
    return blocks.select_by_mass(
        chunk, mass, sink_pages=settings.sink_pages, local_pages=settings.local_pages, sample_rows=settings.sample_rows
    )


def adapt(left_out: torch.Tensor, error: torch.Tensor, pages: torch.Tensor, settings: AdaptiveSettings) -> torch.Tensor:
    """The shares to leave out from now on. error, pages: means over samples of a head, 0 pages where there was none; all float32 [layers, heads].

    With error ~ pages^-e the pages that pay the price are pages * (error / pages / price)^(1 / (e + 1)). One correction goes four fifths of
    the way and changes a share fourfold at most: samples are few, and their errors have long tails.
    """
    ratio = (error / (pages * settings.price)).clamp(1e-30)
    change = -0.8 / ((_ERROR + 1) * _PAGES) * torch.log(ratio)
    moved = left_out * torch.exp(change.clamp(-1.4, 1.4))
    return torch.where(pages > 0, moved, left_out).clamp(1 - settings.most_mass, 1 - settings.least_mass)


def starting_share(num_layers: int, num_heads: int, settings: AdaptiveSettings) -> torch.Tensor:
    """Share of estimated mass to leave out before anything was sampled, float32 [layers, heads]."""
    return torch.full((num_layers, num_heads), 1 - settings.mass)
