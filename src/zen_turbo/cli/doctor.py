"""``zen-turbo doctor``: what was found on this machine and what was chosen because of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """Show CPU features, the kernel chosen and why, threads, memory, cache folder and models present."""
    facts = findings()
    if as_json:
        print(json.dumps(facts))
        return
    for title, value in lines(facts):
        print(f"{title:<14}{value}")


def findings() -> dict[str, Any]:
    from zen_turbo import native
    from zen_turbo.bench.report import machine_facts
    from zen_turbo.engine.memory import available_bytes
    from zen_turbo.models.catalogue import CATALOGUE, cache_folder, cached_path

    folder = cache_folder()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    models = []
    for name, model in CATALOGUE.items():
        path = cached_path(model)
        present = path.exists() and path.stat().st_size == model.num_bytes
        models.append({"name": name, "description": model.description, "present": present, "path": str(path), "num_bytes": model.num_bytes})
    return {
        **machine_facts(),
        "kernels": native.describe(),
        "threads": native.usable_cpus(),
        "memory_usable_gib": available_bytes() / 2**30,
        "cache_folder": str(folder),
        "cache_free_gib": shutil.disk_usage(existing).free / 2**30,
        "models": models,
        "other_models": sorted(path.name for path in Path(folder, "models").glob("*.gguf") if path.name not in _catalogue_files()),
    }


def _catalogue_files() -> set[str]:
    from zen_turbo.models.catalogue import CATALOGUE

    return {model.file_name for model in CATALOGUE.values()}


def lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    kernel = facts["kernels"]
    result = [
        ("zen-turbo", f"{facts['zen_turbo']} (torch {facts['torch']}, Python {facts['python']}, {facts['system']})"),
        ("CPU", facts["cpu"]),
        ("features", " ".join(kernel["features"]) or "none that matter here"),
        ("kernel", f"{kernel['isa']}: {kernel['reason']} (available: {', '.join(kernel['available'])})"),
        ("linear layers", f"bf16: {facts['bf16_linear']}"),
        ("library", kernel["library"]),
        ("threads", f"{facts['threads']} (CPUs this process may use)"),
        ("memory", f"{facts['memory_gib']:.1f} GiB, {facts['memory_usable_gib']:.1f} GiB can be used now"),
        ("cache", f"{facts['cache_folder']} ({facts['cache_free_gib']:.1f} GiB free on that disk)"),
    ]
    for model in facts["models"]:
        state = "present" if model["present"] else f"not here ({model['num_bytes'] / 2**20:,.0f} MiB to download)"
        result.append(("model", f"{model['name']}: {state}; {model['description']}"))
    result += [("model", f"{name}: present, not of the catalogue") for name in facts["other_models"]]
    return result
