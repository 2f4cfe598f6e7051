"""The heat map: counts, colours at the ends and the middle of the scale, gaps."""

from __future__ import annotations

from pathlib import Path

import pytest

from zen_turbo.evals import heatmap

ROWS = [
    {"length": 4096, "depth": 0.0, "correct": True},
    {"length": 4096, "depth": 0.0, "correct": False},
    {"length": 4096, "depth": 100.0, "correct": True},
    {"length": 1 << 20, "depth": 0.0, "correct": False},
]


def test_rows_are_counted() -> None:
    grid = heatmap.grid_of(ROWS)
    assert grid.lengths == [4096, 1 << 20]
    assert grid.depths == [0.0, 100.0]
    assert grid.cells == {(0.0, 4096): (1, 2), (100.0, 4096): (1, 1), (0.0, 1 << 20): (0, 1)}
    with pytest.raises(ValueError, match="rows"):
        heatmap.grid_of([])


@pytest.mark.parametrize(("score", "colour"), [(0.0, heatmap.COLOURS[0]), (0.5, heatmap.COLOURS[1]), (1.0, heatmap.COLOURS[2]), (0.25, "#EE8054")])
def test_colours(score: float, colour: str) -> None:
    assert heatmap.colour_of(score) == colour


def test_the_page_says_every_count_and_leaves_gaps_empty() -> None:
    page = heatmap.to_html(heatmap.grid_of(ROWS), title="a < b")
    assert "a &lt; b" in page and "a < b" not in page
    assert page.count("<td ") == 3 and page.count("<td></td>") == 1
    for text in ("1/2", "1/1", "0/1", "4K", "1M", "100 %"):
        assert text in page


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    heatmap.save(ROWS, title="passkey", png=tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
