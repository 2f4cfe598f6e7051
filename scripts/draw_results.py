"""Draws docs/images/results.svg, the picture of the README, from the records in results/.

    .venv/bin/python scripts/draw_results.py

Left: time to first token by prompt length, dense and with every preset that has records, and llama.cpp, with the linear floor (what the bf16
linear layers alone need). Beyond the longest prefill: reading times of ``bench marginal``, where dense ones are added up from measured chunks.
Times of two processors are not drawn together: what is not of the dense record's is left out. Right: the passkey heat map of the preset turbo.
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
SHADES = {"faithful": "#3f9a7a", "balanced": "#6fbf9f", "turbo": "#c98a1b"}
MILLION = "marginal_1m_turbo"
PASSKEY = tuple(f"passkey_turbo{part}" for part in ("", "_128k", "_256k", "_512k", "_1m_0", "_1m_25", "_1m_lower_half"))
Points = list[tuple[int, float]]


def main() -> None:
    matplotlib.rcParams["svg.hashsalt"] = "zen-turbo"  # the same records give the same file
    peers = heatmap.read_json(RESULTS / "llama_cpp.json")["rows"]
    passkey = [heatmap.read_record(path) for name in PASSKEY if (path := RESULTS / f"{name}.json").exists()]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.25, 1))
    draw_times(left, peers if same_machine("llama_cpp") else [])
    rows = [row for record in passkey for row in record["rows"]]
    found = sum(row["correct"] for row in rows)
    heatmap.draw(right, heatmap.grid_of(rows), title=f"Passkey found, preset turbo: {found} of {len(rows)}")
    right.tick_params(axis="x", labelsize=8)
    figure.savefig(ROOT / "docs" / "images" / "results.svg", metadata={"Date": None})


def same_machine(name: str) -> bool:
    """Whether a record is of the processor that the dense times are of."""
    return machine(name) == machine("prefill_dense")


def machine(name: str) -> str:
    return str(heatmap.read_json(RESULTS / f"{name}.json")["machine"]["cpu"])


def points(preset: str | None) -> Points:
    """(tokens, seconds) of dense attention or a preset, ascending."""
    name = preset or "dense"
    found = {row["length"]: row["ttft_s"] for row in heatmap.read_json(RESULTS / f"prefill_{name}.json")["rows"]}
    # Dense times beside a preset whose other layers are those of dense attention, if there are any; those beside turbo's 8-bit layers are shorter.
    beside = [(f"marginal_128k_{reader}", reader) for reader in (preset or "balanced", preset or "turbo")]
    beside = [(record, reader) for record, reader in beside if (RESULTS / f"{record}.json").exists() and same_machine(record)][:1]
    if (RESULTS / f"{MILLION}.json").exists() and same_machine(MILLION):
        beside.append((MILLION, preset or "turbo"))
    for record, reader in beside:
        longest = max(found)
        for row in heatmap.read_json(RESULTS / f"{record}.json")["rows"]:
            if row["length"] > longest and row["preset"] == reader:
                found[row["length"]] = row["read_s"] if preset else row["dense_read_s"]
    return sorted(found.items())


def draw_times(axes: Axes, peers: list[dict[str, Any]]) -> None:
    dense = points(None)
    axes.plot(*zip(*dense, strict=True), color=OURS, marker="o", label="zen-turbo, dense")
    for preset, color in SHADES.items():
        times = points(preset)
        axes.plot(*zip(*times, strict=True), color=color, marker="o", markersize=4, label=f"zen-turbo, {preset}")
    if peers:
        axes.plot([row["length"] for row in peers], [row["ttft_s"] for row in peers], color=PEER, marker="s", label="llama.cpp, best setting")
    floor = [(row["length"], row["linear_floor_s"]) for row in heatmap.read_json(RESULTS / "prefill_dense.json")["rows"]]
    per_token = floor[-1][1] / floor[-1][0]
    lengths = [length for length, _ in dense]
    axes.plot(lengths, [per_token * length for length in lengths], color=FLOOR, linestyle="--", label="bf16 linear layers alone")
    for row in peers:
        axes.annotate(f"{row['ratio']:.1f}x", (row["length"], row["ttft_s"]), textcoords="offset points", xytext=(-6, 6), ha="right", color=PEER)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [heatmap.length_text(length) for length in lengths])
    axes.set_xlabel("prompt length in tokens")
    axes.set_ylabel("seconds to first token")
    axes.set_title(f"Time to first token, Qwen2.5-Coder 0.5B, 2 cores, {machine('prefill_dense')}", loc="left", fontsize=9)
    axes.grid(which="major", color="#e4e6ea")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="upper left", fontsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


if __name__ == "__main__":
    main()
