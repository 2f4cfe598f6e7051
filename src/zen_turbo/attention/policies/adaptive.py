"""The adaptive policy: for each head and query block the pages of largest estimated mass, as many as that head turns out to need.

Estimates come from page means, which flatter a selection: the mass of scattered keys hides in a mean (Jensen), by little in a focused head and
by much in a diffuse one. So the share of *estimated* mass to keep is no promise. And what a missing share costs differs by orders of magnitude
between heads: on a novel, a dozen of 336 make nearly all of the difference from dense attention. Which ones depends on text and position.

So each head's share follows from what its own selection was seen to cost. On sampled rows attention is computed exactly
(``attention.fidelity``), which gives for each head

    error   squared norm of what the selection changes in the residual stream, relative to that stream
    pages   what the head read there

and both are power laws of the share l of mass that is left out: error ~ l^1.7 and pages ~ l^-0.7.
Each window of the prompt gives samples of their constants; older windows count less and less. A head then leaves out the l at which error / pages
is ``price``: with equal prices one more page would help every head alike, which is the least total error for so many pages. Up to 32K tokens
a third of attention takes less time than the linear layers, so a page is priced at ``near_price``; from there on it has the full price.
Beyond 128K tokens the price grows with the position and fewer rows are scored, so that neither attention nor selection grows without end.
The prompt's end, where the question is and an answer begins, leaves out a ninth of what other rows do, which makes a page worth a two-hundredth of
the price; and because a question asks for single tokens, which a mean hides, it reads some pages by the bounds of their keys first.

Samples are few, and a head that is needed rarely but then much looks easy in almost all of them. So a share starts at ``mass``, moves by no more
than a factor of four from one window to the next, and never falls below ``least_mass``, whatever was seen.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch

from zen_turbo.attention import blocks
from zen_turbo.attention.blocks import Chunk
from zen_turbo.config import FAR_TOKENS, PAGE_TOKENS

if TYPE_CHECKING:
    from zen_turbo.kernels import BlockLists

_T = TypeVar("_T")

# Exponents of the laws above, measured (medians of all heads, docs/LOG.md). Were what is missing in proportion to its mass, the squared error's
# would be 2.
_ERROR = 1.7
_PAGES = 0.7
_FADE = 0.85  # what a window's samples count for in the next one: the last six or seven windows decide
_MOST_CHANGE = math.log(4)
_END = 9  # the prompt's end leaves out so much less
_FARTHER = 131072  # position from which the price grows and fewer rows are scored
_LEAST_SAMPLE_ROWS = 4


@dataclass(frozen=True, kw_only=True)
class AdaptiveSettings:
    """``mass``: share of estimated mass that a head keeps in the beginning, and ``least_mass`` at any time (``far_least_mass``, if given, where
    pages have their full price), for the layers of each quarter (or other equal part) of the depth. ``price``: relative squared output error per
    page at which one more page is no longer worth it, in windows from FAR_TOKENS on (beyond 128K in proportion to the position to the power
    ``price_growth``); ``near_price``: in those before (None: one price up to 128K).
    ``most_mass``: a head never keeps more, unless ``least_mass`` says so.
    ``most_pages``: the most it keeps beside sinks and local pages, whatever its share, in the same parts of the depth; this bounds the work of
    a token, so that a preset that has it reads any length in linear time. ``sample_rows``: rows of a query block that are scored, beyond 128K fewer
    (``sample_rows_at``); what only the others look for is missed.
    ``end_pages``: in prompts of so many pages the end reads everything; in longer ones see ``end_of``."""

    mass: tuple[float, ...]
    least_mass: tuple[float, ...]
    price: float
    near_price: float | None = None
    price_growth: float = 1.0
    far_least_mass: tuple[float, ...] | None = None
    most_pages: tuple[int, ...] | None = None
    most_mass: float = 0.9995
    sink_pages: int = 1
    local_pages: int = 4
    sample_rows: int = 32
    end_pages: int = 1024


class Learnt(NamedTuple):
    """What is known of each head, float32 [layers, heads] each: the share of estimated mass that it leaves out, and the sums over samples, older
    ones faded, of error / left_out^1.7 and of pages * left_out^0.7."""

    left_out: torch.Tensor
    error: torch.Tensor
    pages: torch.Tensor


PRESETS = {
    "turbo": AdaptiveSettings(mass=(0.80,), least_mass=(0.50,), price=1e-6, near_price=2e-7, most_pages=(512,), sample_rows=8),
    "balanced": AdaptiveSettings(mass=(0.95,), least_mass=(0.60,), price=2e-7, near_price=1e-8, price_growth=1.5),
    "faithful": AdaptiveSettings(
        mass=(0.98,), least_mass=(0.90,), far_least_mass=(0.85,), price=2e-8, near_price=5e-10, price_growth=1.25, end_pages=2048
    ),
}


def settings_of(preset: str, mass: float | None) -> AdaptiveSettings:
    """A preset; with ``mass``, the share that every head keeps, whatever its price. Raises KeyError for an unknown preset."""
    settings = PRESETS[preset]
    if mass is None:
        return settings
    return dataclasses.replace(settings, mass=(mass,), least_mass=(mass,), far_least_mass=None, price=math.inf, near_price=None)


def end_of(first_page: int, settings: AdaptiveSettings) -> dict[str, int] | None:
    """How the end of a prompt chooses pages, as settings of ``blocks.choose_by_mass``, if it begins in ``first_page``: an eighth of them by bounds,
    but no more than ``end_pages``, and four times those in all. None where it reads everything."""
    if first_page < settings.end_pages:
        return None
    bound_pages = min(first_page // 8, settings.end_pages)
    return {"most_pages": 4 * settings.end_pages, "bound_pages": bound_pages, "sample_rows": PAGE_TOKENS}


def select(
    chunk: Chunk,
    layer: int,
    num_layers: int,
    mass: torch.Tensor,
    settings: AdaptiveSettings,
    *,
    window: int,
    end: dict[str, int] | None = None,
) -> BlockLists:
    """Lists for every head of a layer; mass: float32 [heads]; window: the position at which the chunk's window begins; end: what ``end_of`` gives
    for the prompt, whose end reads everything otherwise."""
    return blocks.select_by_mass(
        chunk,
        mass,
        end=None if end is None else {**end, "mass": end_mass(mass, settings)},
        sink_pages=settings.sink_pages,
        local_pages=settings.local_pages,
        most_pages=None if settings.most_pages is None else of_depth(settings.most_pages, layer, num_layers),
        sample_rows=sample_rows_at(window, settings),
    )


def of_depth(values: tuple[_T, ...], layer: int, num_layers: int) -> _T:
    """The value for the part of the depth that a layer lies in."""
    return values[layer * len(values) // num_layers]


def begin(num_layers: int, num_heads: int, settings: AdaptiveSettings) -> Learnt:
    """Before anything was sampled."""
    left_out = _left_out(settings.mass, num_layers, num_heads)
    return Learnt(left_out, torch.zeros_like(left_out), torch.zeros_like(left_out))


def price_at(position: int, settings: AdaptiveSettings) -> float:
    """Of a page, in the window that begins at ``position``."""
    if settings.near_price is not None and position < FAR_TOKENS:
        return settings.near_price
    return settings.price * max(1.0, position / _FARTHER) ** settings.price_growth


def sample_rows_at(position: int, settings: AdaptiveSettings) -> int:
    """Rows of a query block that are scored in the window that begins at ``position``: half as many with every doubling beyond 128K, so that
    what a token's selection costs stays about the same; but no fewer than four."""
    doublings = max(0, (position // _FARTHER).bit_length() - 1)
    return min(settings.sample_rows, max(settings.sample_rows >> doublings, _LEAST_SAMPLE_ROWS))


def learn(learnt: Learnt, error: torch.Tensor, pages: torch.Tensor, position: int, settings: AdaptiveSettings) -> Learnt:
    """After a window, for the one that begins at ``position``. error, pages: sums over the old one's samples, 0 for a head that had none,
    float32 [layers, heads]. A head that never had any keeps its share."""
    left_out = learnt.left_out.clamp_min(1 - settings.most_mass)
    all_error = _FADE * learnt.error + error / left_out**_ERROR
    all_pages = _FADE * learnt.pages + pages * left_out**_PAGES
    best = (price_at(position, settings) * all_pages / all_error.clamp_min(1e-30)) ** (1 / (_ERROR + _PAGES))
    near = left_out * torch.exp(torch.log(best / left_out).clamp(-_MOST_CHANGE, _MOST_CHANGE))
    least_mass = settings.least_mass if settings.far_least_mass is None or position < FAR_TOKENS else settings.far_least_mass
    near = near.clamp_min(1 - settings.most_mass).minimum(_left_out(least_mass, *left_out.shape))
    return Learnt(torch.where(all_pages > 0, near, learnt.left_out), all_error, all_pages)


def end_mass(mass: torch.Tensor, settings: AdaptiveSettings) -> torch.Tensor:
    """Share of estimated mass that the prompt's end keeps, where other rows keep ``mass``; never less."""
    return (1 - (1 - mass) / _END).clamp_max(settings.most_mass).maximum(mass)


def _left_out(kept: tuple[float, ...], num_layers: int, num_heads: int) -> torch.Tensor:
    shares = [1 - of_depth(kept, layer, num_layers) for layer in range(num_layers)]
    return torch.tensor(shares)[:, None].expand(num_layers, num_heads).clone()
