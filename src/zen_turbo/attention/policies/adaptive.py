"""The adaptive policy: for each head and query block the pages of largest estimated mass, as many as that head turns out to need.

Estimates come from page means, which flatter a selection: the mass of scattered keys hides in a mean (Jensen), by little in a focused head and
by much in a diffuse one. So the share of *estimated* mass to keep is no promise. And what a missing share costs differs too, by far most by
depth: early layers average over what is near, the last ones hardly look back, and what a prompt is searched for is found in a few heads of the two
quarters between. ``mass`` therefore has one share for each quarter.

Shares are a floor. On sampled rows attention is computed exactly (``attention.fidelity``), which gives for each head

    error   squared norm of what the selection changes in the residual stream, relative to that stream
    pages   what the head read there

and a head whose error per page is above ``price`` is made to keep more, until it is not: with equal prices one more page would help every head
alike, which is the least total error for so many pages. Shares never fall below their floor on the evidence of samples: a head that is needed
rarely but then much looks easy in almost all of them.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from zen_turbo.attention import blocks
from zen_turbo.attention.blocks import Chunk

if TYPE_CHECKING:
    from zen_turbo.kernels import BlockLists

_T = TypeVar("_T")

# How pages depend on the share left out, and errors on pages, near a working point: pages ~ left_out^-_PAGES, error ~ pages^-_ERROR. Measured
# roughly on source code at 16K to 64K; they set how far one correction goes, not where corrections end.
_PAGES = 0.6
_ERROR = 1.5


@dataclass(frozen=True, kw_only=True)
class AdaptiveSettings:
    """``mass``: share of estimated mass that a head keeps at least, for the layers of each quarter (or other equal part) of the depth.
    ``most_pages``: the most it keeps beside sinks and local pages, whatever its share, in the same parts of the depth; this bounds the work of
    a token, so that a preset that has it reads any length in linear time. ``price``: relative squared output error per page above which a head
    keeps more, up to ``most_mass``. ``sample_rows``: rows of a query block that are scored; what only the others look for is missed.
    ``end_pages``: pages that the prompt's last rows read, where the question is, in every head; up to so many pages they read everything."""

    mass: tuple[float, ...]
    price: float
    most_pages: tuple[int, ...] | None = None
    most_mass: float = 0.9995
    sink_pages: int = 1
    local_pages: int = 4
    sample_rows: int = 32
    end_pages: int = 2048


PRESETS = {
    "turbo": AdaptiveSettings(mass=(0.50, 0.70, 0.93, 0.60), most_pages=(48, 48, 128, 48), price=1e-4, sample_rows=4),
    "balanced": AdaptiveSettings(mass=(0.70, 0.95, 0.97, 0.80), price=1e-5),
    "faithful": AdaptiveSettings(mass=(0.90, 0.99, 0.99, 0.95), price=1e-6),
}


def settings_of(preset: str, mass: float | None) -> AdaptiveSettings:
    """A preset; with ``mass``, the share that every head keeps, whatever its price. Raises KeyError for an unknown preset."""
    settings = PRESETS[preset]
    return settings if mass is None else dataclasses.replace(settings, mass=(mass,), price=math.inf)


def select(chunk: Chunk, layer: int, num_layers: int, mass: torch.Tensor, settings: AdaptiveSettings) -> BlockLists:
    """Lists for every head of a layer; mass: float32 [heads]."""
    return blocks.select_by_mass(
        chunk,
        mass,
        sink_pages=settings.sink_pages,
        local_pages=settings.local_pages,
        most_pages=None if settings.most_pages is None else of_depth(settings.most_pages, layer, num_layers),
        sample_rows=settings.sample_rows,
        end_pages=settings.end_pages,
    )


def of_depth(values: tuple[_T, ...], layer: int, num_layers: int) -> _T:
    """The value for the part of the depth that a layer lies in."""
    return values[layer * len(values) // num_layers]


def starting_share(num_layers: int, num_heads: int, settings: AdaptiveSettings) -> torch.Tensor:
    """Share of estimated mass to leave out before anything was sampled, float32 [layers, heads]."""
    shares = [1 - of_depth(settings.mass, layer, num_layers) for layer in range(num_layers)]
    return torch.tensor(shares)[:, None].expand(num_layers, num_heads).clone()


def adapt(
    left_out: torch.Tensor, error: torch.Tensor, pages: torch.Tensor, settings: AdaptiveSettings, start: torch.Tensor
) -> torch.Tensor:
    """The shares to leave out from now on. error, pages: means over samples of a head, 0 pages where there was none; start: the shares in the
    beginning, which are the most that is left out; all float32 [layers, heads].

    With error ~ pages^-e the pages that pay the price are pages * (error / pages / price)^(1 / (e + 1)). One correction goes four fifths of
    the way and changes a share fourfold at most: samples are few, and their errors have long tails.
    """
    ratio = (error / (pages * settings.price)).clamp(1e-30)
    change = -0.8 / ((_ERROR + 1) * _PAGES) * torch.log(ratio)
    moved = left_out * torch.exp(change.clamp(-1.4, 1.4))
    return torch.where(pages > 0, moved, left_out).clamp_min(1 - settings.most_mass).minimum(start)
