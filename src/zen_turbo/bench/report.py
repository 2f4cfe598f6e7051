"""What every benchmark and evaluation writes: an experiment report.

Standard output is a table for people and, as its very last line, one JSON object with the same rows plus everything needed to judge and to
repeat them: resolved settings, machine, kernel, versions, commit, times. Progress and estimates go to standard error, so
``zen-turbo bench ... | tail -n 1`` is always the record. ``--output FILE`` keeps that line in a file, which appears whole or not at all.

A record names no folders: models go by name, and the commit is that of the source tree this package runs from (None for an installed copy).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

import zen_turbo
from zen_turbo import native
from zen_turbo.errors import ConfigurationError
from zen_turbo.models.linear import packing_available

GIB = 2**30
_SIGNIFICANT_DIGITS = 6
# Paths, from the top of the source tree, that can change what is measured.
_MEASURED_PATHS = ("src", "csrc", "scripts", "CMakeLists.txt", "pyproject.toml", "constraints.txt")

Row = dict[str, Any]


def machine_facts() -> dict[str, Any]:
    """CPU, memory, kernel and versions. ``cores`` are the CPUs this process may use, ``threads`` what torch and the kernels run on."""
    kernel = native.describe()
    memory = psutil.virtual_memory()
    return {
        "cpu": _cpu_name(),
        "cpu_features": kernel["features"],
        "cores": native.usable_cpus(),
        "threads": torch.get_num_threads(),
        "load_average_1m": os.getloadavg()[0],
        "memory_gib": memory.total / GIB,
        "memory_available_gib": memory.available / GIB,
        "kernel_isa": kernel["isa"],
        "kernel_reason": kernel["reason"],
        "bf16_linear": "oneDNN" if packing_available() else "own, widened to fp32",
        "zen_turbo": zen_turbo.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_name() -> str:
    """Name, and on x86 family and model: virtual machines hide the name, and the generation decides what a rate means."""
    facts: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            facts.setdefault(name.strip(), value.strip())
    name = facts.get("model name") or platform.processor() or platform.machine()
    if "cpu family" in facts and "model" in facts:
        name += f" (family {facts['cpu family']}, model {facts['model']})"
    return name


def git_facts(source: Path = Path(__file__)) -> dict[str, Any] | None:
    """{"commit", "dirty"} of the tree that tracks ``source``; None outside git, without git, or where git does not know the file.

    dirty: a file that can change the measurement differs from the commit or is not in it.
    """

    def git(folder: Path, *arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    source = source.resolve()
    try:
        git(source.parent, "ls-files", "--error-unmatch", source.name)  # an installed copy may lie inside somebody else's repository
        top = Path(git(source.parent, "rev-parse", "--show-toplevel"))
        paths = [name for name in _MEASURED_PATHS if (top / name).exists()]
        return {"commit": git(top, "rev-parse", "HEAD"), "dirty": bool(git(top, "status", "--porcelain", "--", *paths))}
    except (OSError, subprocess.SubprocessError):
        return None


def check_output(output: Path | None) -> None:
    """Raise ConfigurationError now if ``output`` could not be written after hours of work."""
    if output is None:
        return
    folder = output.parent
    if output.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigurationError(f"{output} cannot be written: {folder} must be a folder that you may write to.", param="output")


def write_atomic(path: Path, text: str) -> None:
    """Write a whole file or nothing: a temporary file beside it, synced, then renamed."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


class Experiment:
    """One run of a benchmark (kind "bench") or an evaluation (kind "eval"). Made when the run starts: it notes time, machine and commit
    before anything changes. Raises ConfigurationError if ``output`` cannot be written."""

    def __init__(self, kind: str, name: str, *, settings: Mapping[str, Any], output: Path | None = None) -> None:
        check_output(output)
        self.kind = kind
        self.name = name
        self.settings = dict(settings)
        self.output = output
        self.git = git_facts()
        self._machine = machine_facts()
        self._started = datetime.now(UTC)

    def log(self, message: str) -> None:
        """One line of progress, on standard error."""
        print(message, file=sys.stderr, flush=True)

    def finish(self, rows: Sequence[Row], *, columns: Sequence[str], summary: Mapping[str, Any] | None = None, note: str = "") -> Row:
        """Print the table of ``columns`` and the record, write ``output``, return the record. ``summary`` joins the record's top level."""
        record = tidy(
            {
                self.kind: self.name,
                **(summary or {}),
                "rows": list(rows),
                "settings": self.settings,
                "machine": {**self._machine, "threads": torch.get_num_threads()},
                "git": self.git,
                "started": self._started.isoformat(timespec="seconds"),
                "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
        line = json.dumps(record, allow_nan=False, ensure_ascii=False)
        print_table(f"{self.kind} {self.name}", record["rows"], columns, note=note)
        if self.output is not None:
            write_atomic(self.output, line + "\n")
        print(line, flush=True)
        return record


def print_table(title: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, note: str = "") -> None:
    """Table on standard output; as wide as it needs to be when that is not a terminal, so that no number is cut."""
    table = Table(title=title, caption=note or None, title_justify="left", caption_justify="left")
    for name in columns:
        numeric = all(isinstance(row.get(name), int | float | None) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in columns))
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 400, highlight=False)
    console.print(table)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def tidy(value: Any) -> Any:
    """Plain JSON values: floats with six significant digits, a number that is not finite becomes None."""
    if isinstance(value, bool | int | str | None):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return float(f"{value:.{_SIGNIFICANT_DIGITS}g}")
    if isinstance(value, Mapping):
        return {str(key): tidy(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [tidy(item) for item in value]
    return str(value)
