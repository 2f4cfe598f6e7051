"""A retrieval grid as a picture: length across, depth of the key down, colour from red (never found) to green (always found).

The scale is fixed to 0..1 and its three colours are those of the published heat maps, so that pictures compare. Each cell carries its count,
because colour alone must not carry the meaning. ``save`` writes a PNG and an HTML page that needs nothing but itself.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from zen_turbo.bench.report import write_atomic
from zen_turbo.errors import ConfigurationError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#F0496E", "#EBB839", "#0CD79F")


class Cell(NamedTuple):
    correct: int
    total: int

    @property
    def score(self) -> float:
        return self.correct / self.total


class Grid(NamedTuple):
    """cells[depth, length]; a combination that was not asked is missing."""

    lengths: list[int]
    depths: list[float]
    cells: dict[tuple[float, int], Cell]


def read_json(path: Path) -> dict[str, Any]:
    """The record of a measurement, from its file or from saved standard output (its last line). Raises ConfigurationError for anything else."""
    try:
        record = json.loads(path.read_text().splitlines()[-1])
        rows = [dict(row) for row in record["rows"]]
    except (OSError, ValueError, IndexError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{path} holds no record: {error}.", param="records") from error
    return {**record, "rows": rows}


def read_record(path: Path) -> dict[str, Any]:
    """The record of a retrieval grid. Raises ConfigurationError for any other."""
    record = read_json(path)
    if not record["rows"] or not all({"length", "depth", "correct"} <= set(row) for row in record["rows"]):
        raise ConfigurationError(f"{path} is not the record of a retrieval grid: its rows have no length, depth and correct.", param="records")
    return record


def grid_of(rows: Sequence[Mapping[str, Any]]) -> Grid:
    """rows: those of an evaluation, with length, depth and correct. Raises ValueError if there are none."""
    if not rows:
        raise ValueError("a grid needs rows")
    cells: dict[tuple[float, int], Cell] = {}
    for row in rows:
        key = (row["depth"], row["length"])
        before = cells.get(key, Cell(0, 0))
        cells[key] = Cell(before.correct + bool(row["correct"]), before.total + 1)
    return Grid(sorted({length for _, length in cells}), sorted({depth for depth, _ in cells}), cells)


def length_text(length: int) -> str:
    """65536 -> 64K, 1048576 -> 1M, 1000000 -> 1000000."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if length % size == 0:
            return f"{length // size}{unit}"
    return str(length)


def draw(axes: Axes, grid: Grid, *, title: str) -> None:
    """The grid into axes of a figure."""
    import numpy as np
    from matplotlib.colors import LinearSegmentedColormap

    scores = np.full((len(grid.depths), len(grid.lengths)), np.nan)
    for (depth, length), cell in grid.cells.items():
        scores[grid.depths.index(depth), grid.lengths.index(length)] = cell.score
    colours = LinearSegmentedColormap.from_list("found", COLOURS).with_extremes(bad="#eeeeee")
    axes.imshow(scores, cmap=colours, vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(grid.lengths)), [length_text(length) for length in grid.lengths])
    axes.set_yticks(range(len(grid.depths)), [f"{depth:g}" for depth in grid.depths])
    axes.set_xticks([x - 0.5 for x in range(1, len(grid.lengths))], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(grid.depths))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for (depth, length), cell in grid.cells.items():
        place = (grid.lengths.index(length), grid.depths.index(depth))
        axes.annotate(f"{cell.correct}/{cell.total}", place, ha="center", va="center", fontsize=8)
    axes.set_xlabel("prompt length in tokens")
    axes.set_ylabel("depth of the key in percent")
    axes.set_title(title, loc="left", fontsize=10)


def to_html(grid: Grid, *, title: str) -> str:
    """One page, no script, readable without colours."""
    head = "".join(f"<th>{length_text(length)}</th>" for length in grid.lengths)
    lines = []
    for depth in grid.depths:
        line = f"<th>{depth:g} %</th>"
        for length in grid.lengths:
            cell = grid.cells.get((depth, length))
            if cell is None:
                line += "<td></td>"
            else:
                line += f'<td style="background:{colour_of(cell.score)}">{cell.correct}/{cell.total}</td>'
        lines.append(f"<tr>{line}</tr>")
    style = (
        "body{font:14px system-ui,sans-serif;margin:2em}table{border-collapse:collapse}"
        "td{width:4.5em;height:2.2em;text-align:center;border:1px solid #fff}th{padding:.3em .8em;font-weight:normal}"
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{style}</style>'
        f"<h1>{html.escape(title)}</h1><table><tr><th>depth</th>{head}</tr>{''.join(lines)}</table></html>\n"
    )


def colour_of(score: float) -> str:
    """0 -> the first colour, 0.5 -> the second, 1 -> the third, linear between."""
    low, high = (COLOURS[0], COLOURS[1]) if score < 0.5 else (COLOURS[1], COLOURS[2])
    share = 2 * score - (score >= 0.5)
    ends = [[int(colour[at : at + 2], 16) for at in (1, 3, 5)] for colour in (low, high)]
    return "#" + "".join(f"{round(a + (b - a) * share):02X}" for a, b in zip(*ends, strict=True))


def save(rows: Sequence[Mapping[str, Any]], *, title: str, png: Path | None = None, page: Path | None = None) -> None:
    """Write the picture, the page, or both."""
    grid = grid_of(rows)
    if page is not None:
        write_atomic(page, to_html(grid, title=title))
    if png is not None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(2.5 + 0.75 * len(grid.lengths), 1.6 + 0.32 * len(grid.depths)), layout="constrained")
        draw(figure.add_subplot(), grid, title=title)
        figure.savefig(png, dpi=150)
