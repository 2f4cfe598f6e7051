"""Draws docs/images/frontier.svg: density against what it costs, for every policy on the same kernels.

    .venv/bin/python scripts/measure.py --run 'frontier/*' 'fidelity_*k_*'
    .venv/bin/python scripts/frontier.py

The records are those of ``bench fidelity``: results/fidelity_* for the presets, results/frontier/ for everything else, at the lengths where there is
something else. A point is the mean over the texts that every policy was measured on. Linear layers are in bf16 everywhere, so ``turbo`` is drawn
without its 8-bit ones.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from zen_turbo.bench.corpora import NAMES
from zen_turbo.evals.heatmap import length_text, read_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
Row = dict[str, Any]
# What is drawn as one line, and its records.
KINDS = {
    "adaptive": [f"fidelity_*k_{text}_{preset}.json" for text in NAMES for preset in ("turbo_linear_full", "balanced", "faithful")],
    "one share for all heads": ["frontier/uniform_*.json"],
    **{name: [f"frontier/{name}_*.json"] for name in ("minference", "flexprefill", "xattention", "tri_shape")},
}
MEASURES = {"kl": "mean KL to dense, nats per token", "recall_mean": "share of exact attention mass kept"}


def means(kinds: dict[str, dict[str, dict[str, Row]]]) -> dict[str, list[Row]]:
    """By kind, what each of its settings has on average over the texts that all settings of all kinds have. kinds: kind -> setting -> text -> row."""
    texts = set.intersection(*(set(rows) for settings in kinds.values() for rows in settings.values()))
    return {
        kind: [{key: fmean(rows[text][key] for text in texts) for key in ("density", *MEASURES)} for rows in settings.values()]
        for kind, settings in kinds.items()
    }


def main() -> None:
    """A row of panels per measure, a column per length."""
    matplotlib.rcParams["svg.hashsalt"] = "zen-turbo"
    found: dict[int, dict[str, dict[str, dict[str, Row]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for kind, patterns in KINDS.items():
        for path in (path for pattern in patterns for path in sorted(RESULTS.glob(pattern))):
            parts = path.stem.split("_")
            (text,) = set(parts) & set(NAMES)
            for row in read_json(path)["rows"]:
                found[row["length"]][kind]["_".join(part for part in parts if part != text)][text] = row
    points = {length: means(kinds) for length, kinds in sorted(found.items()) if len(kinds) == len(KINDS)}
    if not points:
        raise SystemExit(f"There are no records in {RESULTS}.")
    figure = Figure(figsize=(5.5 * len(points), 4.2 * len(MEASURES)), layout="constrained")
    panels = figure.subplots(len(MEASURES), len(points), squeeze=False)
    for row, (key, label) in zip(panels, MEASURES.items(), strict=True):
        for axes, (length, kinds) in zip(row, points.items(), strict=True):
            for kind, values in kinds.items():
                axes.plot(*zip(*sorted((each["density"], each[key]) for each in values), strict=True), marker="o", label=kind)
            axes.set_yscale("log" if key == "kl" else "linear")
            axes.set_title(f"{length_text(length)} tokens", loc="left", fontsize=10)
            axes.set_xlabel("density: block pairs read")
            axes.set_ylabel(label)
            axes.grid(color="#e4e6ea")
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(ROOT / "docs" / "images" / "frontier.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
