"""Draws docs/images/frontier.svg: density against what it costs, for every policy on the same kernels.

    .venv/bin/python scripts/measure.py --run 'frontier/*'
    .venv/bin/python scripts/frontier.py

The records are those of ``bench fidelity``: results/fidelity_* for the presets, results/frontier/ for everything else. A point is the mean over the
texts that were measured.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from zen_turbo.bench.corpora import NAMES
from zen_turbo.config import PRESETS
from zen_turbo.evals.heatmap import length_text, read_json

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
# What is drawn as one line, and its records.
KINDS = {
    "adaptive": [f"fidelity_*k_{text}_{preset}.json" for text in NAMES for preset in PRESETS],
    "one share for all heads": ["frontier/uniform_*.json"],
    **{name: [f"frontier/{name}_*.json"] for name in ("minference", "flexprefill", "xattention", "tri_shape")},
}


def main() -> None:
    """One panel per length."""
    matplotlib.rcParams["svg.hashsalt"] = "zen-turbo"
    points: dict[int, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for kind, patterns in KINDS.items():
        settings: dict[tuple[int, str], list[dict[str, Any]]] = defaultdict(list)
        for path in (path for pattern in patterns for path in sorted(RESULTS.glob(pattern))):
            parts = [part for part in path.stem.split("_") if part not in NAMES]  # without the text
            for row in read_json(path)["rows"]:
                settings[row["length"], "_".join(parts)].append(row)
        for (length, _), rows in settings.items():
            points[length][kind].append((fmean(row["density"] for row in rows), fmean(row["kl"] for row in rows)))
    if not points:
        raise SystemExit(f"There are no records in {RESULTS}.")
    figure = Figure(figsize=(5.5 * len(points), 4.2), layout="constrained")
    for axes, (length, kinds) in zip(figure.subplots(1, len(points), squeeze=False)[0], sorted(points.items()), strict=True):
        for kind, values in kinds.items():
            axes.plot(*zip(*sorted(values), strict=True), marker="o", label=kind)
        axes.set_yscale("log")
        axes.set_title(f"{length_text(length)} tokens", loc="left", fontsize=10)
        axes.set_xlabel("density: block pairs read")
        axes.set_ylabel("mean KL to dense, nats per token")
        axes.grid(color="#e4e6ea")
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(ROOT / "docs" / "images" / "frontier.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
