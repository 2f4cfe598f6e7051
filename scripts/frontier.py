"""Density against what it costs, for every policy on the same kernels: runs ``bench fidelity`` for each and draws docs/images/frontier.svg.

    .venv/bin/python scripts/frontier.py --lengths 32768 --texts code,novel,qa

Each policy and setting is a command of its own whose record goes to results/frontier/; one that is there already is not run again. The dense
pass is shared (--keep-dense). With ``--draw`` nothing is measured.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import matplotlib
from matplotlib.figure import Figure

from zen_turbo.config import PRESETS
from zen_turbo.evals.heatmap import length_text, read_json

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "results" / "frontier"

# name -> (what it is, flags)
SETTINGS: dict[str, tuple[str, list[str]]] = {
    **{f"adaptive_{preset}": ("adaptive", ["--attention", "adaptive", "--preset", preset]) for preset in PRESETS},
    **{f"uniform_{mass}": ("one share for all heads", ["--attention", "adaptive", "--fidelity", f"0.{mass}"]) for mass in (80, 90, 95, 98)},
    **{name: (name, ["--attention", name]) for name in ("minference", "flexprefill", "xattention", "tri_shape")},
}


def measure(name: str, flags: list[str], options: argparse.Namespace) -> None:
    output = FOLDER / f"{name}_{options.lengths.replace(',', '_')}.json"
    if output.exists():
        return
    command = [sys.executable, "-m", "zen_turbo", "bench", "fidelity", "--lengths", options.lengths, "--texts", options.texts, *flags]
    subprocess.run([*command, "--keep-dense", str(options.keep_dense), "--output", str(output)], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def draw() -> None:
    """One panel per length; a point is the mean over texts."""
    matplotlib.rcParams["svg.hashsalt"] = "zen-turbo"
    points: dict[int, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for name, (kind, _) in SETTINGS.items():
        for path in sorted(FOLDER.glob(f"{name}_[0-9]*.json")):
            rows = read_json(path)["rows"]
            for length in {row["length"] for row in rows}:
                mine = [row for row in rows if row["length"] == length]
                points[length][kind].append((fmean(row["density"] for row in mine), fmean(row["kl"] for row in mine)))
    if not points:
        raise SystemExit(f"There are no records in {FOLDER}.")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lengths", default="32768", help="prompt lengths in tokens, comma-separated (default: 32768)")
    parser.add_argument("--texts", default="code,novel,qa", help="kinds of text (default: code,novel,qa)")
    parser.add_argument("--keep-dense", type=Path, default=Path("logs/dense"), help="folder for the dense passes (default: logs/dense)")
    parser.add_argument("--draw", action="store_true", help="only draw what was measured")
    options = parser.parse_args()
    if not options.draw:
        FOLDER.mkdir(parents=True, exist_ok=True)
        for name, (_, flags) in SETTINGS.items():
            measure(name, flags, options)
    draw()


if __name__ == "__main__":
    main()
