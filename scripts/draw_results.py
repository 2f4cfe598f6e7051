"""Draws docs/images/results.svg, the picture of the README, from the records in results/.

    .venv/bin/python scripts/draw_results.py

Left: time to first token by prompt length, ours and llama.cpp on the same machine, with the linear floor (what the linear layers alone
need). Right: the passkey heat map.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from zen_turbo.evals import heatmap

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
OURS, PEER, FLOOR = "#0b6e4f", "#b5483a", "#8a8f98"


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "zen-turbo"  # the same records give the same file
    prefill, peers = (heatmap.read_json(RESULTS / name) for name in ("prefill_dense.json", "llama_cpp.json"))
    passkey = [heatmap.read_record(path) for path in sorted(RESULTS.glob("passkey_dense*.json"))]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    draw_times(left, prefill["rows"], peers["rows"])
    rows = [row for record in passkey for row in record["rows"]]
    found = sum(row["correct"] for row in rows)
    heatmap.draw(right, heatmap.grid_of(rows), title=f"Passkey found: {found} of {len(rows)}")
    figure.savefig(ROOT / "docs" / "images" / "results.svg", metadata={"Date": None})


def draw_times(axes: Axes, ours: list[dict[str, Any]], peers: list[dict[str, Any]]) -> None:
    lengths = [row["length"] for row in ours]
    axes.plot(lengths, [row["ttft_s"] for row in ours], color=OURS, marker="o", label="zen-turbo, dense")
    axes.plot([row["length"] for row in peers], [row["ttft_s"] for row in peers], color=PEER, marker="s", label="llama.cpp, best setting")
    axes.plot(lengths, [row["linear_floor_s"] for row in ours], color=FLOOR, linestyle="--", label="linear layers alone")
    for row in peers:
        axes.annotate(f"{row['ratio']:.1f}x", (row["length"], row["ttft_s"]), textcoords="offset points", xytext=(-6, 6), ha="right", color=PEER)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [heatmap.length_text(length) for length in lengths])
    axes.set_xlabel("prompt length in tokens")
    axes.set_ylabel("seconds to first token")
    axes.set_title("Time to first token, Qwen2.5-Coder 0.5B, 2 cores", loc="left", fontsize=10)
    axes.grid(which="major", color="#e4e6ea")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="upper left")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


if __name__ == "__main__":
    main()
