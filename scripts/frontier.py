"""Draws docs/images/frontier.svg: density against what it costs, for every policy on the same kernels.

    .venv/bin/python scripts/measure.py --run 'frontier/*' 'fidelity_*k_*' 'retrieval_*k_*'
    .venv/bin/python scripts/frontier.py

The records are those of ``bench fidelity`` and ``eval retrieval``: results/fidelity_* and results/retrieval_* for the presets, results/frontier/ for
everything else. A length is drawn where every policy was measured on the same text; a point is the mean over the texts that all of them have. Linear
layers are in bf16, so ``turbo`` is drawn without its 8-bit ones, but for what ``balanced`` reads beyond 32K tokens, and for ``turbo`` in retrieval.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from zen_turbo.bench.corpora import NAMES
from zen_turbo.config import PRESETS
from zen_turbo.evals.heatmap import length_text, read_json
from zen_turbo.evals.retrieval import compare

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
Row = dict[str, Any]
RIVALS = ("minference", "flexprefill", "xattention", "tri_shape")
# What is drawn as one line, and its records.
KINDS = {
    "adaptive": [f"fidelity_*k_{text}_{preset}.json" for text in NAMES for preset in ("turbo_linear_full", "balanced", "faithful")],
    "one share for all heads": ["frontier/uniform_*.json"],
    **{name: [f"frontier/{name}_*.json"] for name in RIVALS},
}
MEASURES = {"kl": "mean KL to dense, nats per token", "recall_mean": "share of exact attention mass kept"}
ASKED = {
    "versus_dense": "retrieval: points of 100 against dense",
    "probability_versus_dense": "probability of the right answer, times 100, against dense",
}
RETRIEVAL = {
    "adaptive": [f"retrieval_[0-9]*k_{preset}.json" for preset in PRESETS],
    "one share for all heads": ["frontier/retrieval_uniform_*.json"],
    **{name: [f"frontier/retrieval_{name}_*.json"] for name in RIVALS},
}


def means(kinds: dict[str, dict[str, dict[str, Row]]]) -> dict[str, list[Row]]:
    """By kind, what each of its settings has on average over the texts that all settings of all kinds have; nothing where they have none in
    common. kinds: kind -> setting -> text -> row."""
    texts = set.intersection(*(set(rows) for settings in kinds.values() for rows in settings.values()))
    if not texts:
        return {}
    return {
        kind: [{key: fmean(rows[text][key] for text in texts) for key in ("density", *MEASURES)} for rows in settings.values()]
        for kind, settings in kinds.items()
    }


def fidelity() -> dict[int, dict[str, list[Row]]]:
    """By length and kind, the points of ``bench fidelity``."""
    found: dict[int, dict[str, dict[str, dict[str, Row]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for kind, patterns in KINDS.items():
        for path in (path for pattern in patterns for path in sorted(RESULTS.glob(pattern))):
            parts = path.stem.split("_")
            (text,) = set(parts) & set(NAMES)
            for row in read_json(path)["rows"]:
                found[row["length"]][kind]["_".join(part for part in parts if part != text)][text] = row
    points = {length: means(kinds) for length, kinds in sorted(found.items()) if len(kinds) == len(KINDS)}
    return {length: kinds for length, kinds in points.items() if kinds}


def retrieval() -> dict[int, dict[str, list[Row]]]:
    """By length and kind: density, and the mean differences to dense attention on the same questions."""
    found: dict[int, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for dense in map(read_json, sorted(RESULTS.glob("retrieval_[0-9]*k_dense.json"))):
        (length,) = {row["length"] for row in dense["rows"]}
        for kind, patterns in RETRIEVAL.items():
            for path in (path for pattern in patterns for path in sorted(RESULTS.glob(pattern))):
                record = read_json(path)
                density = [row["density"] for row in record["rows"] if row["length"] == length]  # that of the same reads for every task
                if density:
                    found[length][kind].append({"density": density[0], **compare(record, dense, length)})
    return found


def draw(axes: Axes, kinds: dict[str, list[Row]], key: str, *, length: int, label: str, error: str | None = None) -> None:
    """One panel; a kind has its colour in all of them. error: the key of a standard error."""
    for number, kind in enumerate(KINDS):
        if kind in kinds:
            rows = sorted(kinds[kind], key=lambda row: row["density"])
            x, y = ([row[name] for row in rows] for name in ("density", key))
            spread = None if error is None else [row[error] for row in rows]
            axes.errorbar(x, y, yerr=spread, marker="o", color=f"C{number}", label=kind, capsize=2, elinewidth=0.8)
    axes.set_title(f"{length_text(length)} tokens", loc="left", fontsize=10)
    axes.set_xlabel("density: block pairs read")
    axes.set_ylabel(label)
    axes.grid(color="#e4e6ea")
    axes.legend(frameon=False, fontsize=8)


def main() -> None:
    """A row of panels per measure, a column per length."""
    matplotlib.rcParams["svg.hashsalt"] = "zen-turbo"
    points = fidelity()
    asked = {length: kinds for length, kinds in retrieval().items() if length in points and len(kinds) == len(RETRIEVAL)}
    if not points:
        raise SystemExit(f"There are no records in {RESULTS}.")
    measures = MEASURES | (ASKED if asked else {})
    figure = Figure(figsize=(5.5 * len(points), 4.2 * len(measures)), layout="constrained")
    panels = figure.subplots(len(measures), len(points), squeeze=False)
    for row, (key, label) in zip(panels, measures.items(), strict=True):
        for axes, length in zip(row, points, strict=True):
            kinds = asked.get(length) if key in ASKED else points[length]
            if kinds is None:
                axes.set_axis_off()
                continue
            draw(axes, kinds, key, length=length, label=label, error=key.replace("versus_dense", "standard_error") if key in ASKED else None)
            if key in ASKED:
                axes.axhline(0, color="#888888", linewidth=0.8)
            axes.set_yscale("log" if key == "kl" else "linear")
    figure.savefig(ROOT / "docs" / "images" / "frontier.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
