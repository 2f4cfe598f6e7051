"""What people see on standard error while they wait: a bar on a terminal, a line now and then where it is a file."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from zen_turbo.engine.request import Event, Finished, PrefillProgress, TokenDelta

LINE_EVERY_S = 10.0


class Forecast:
    """Seconds until a prompt is read. Time to read n tokens is modelled as a*n + b*n^2 (linear layers and dense attention), both fitted to
    what has been seen; a constant speed would promise far too little at long contexts."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, float]] = []

    def add(self, processed_tokens: int, elapsed_s: float) -> None:
        self._seen.append((float(processed_tokens), elapsed_s))

    def remaining_s(self, total_tokens: int) -> float | None:
        """None until two chunks are done."""
        if len(self._seen) < 3:
            return None
        start, began = self._seen[0]
        points = [(n - start, n * n - start * start, t - began) for n, t in self._seen[1:]]
        # Normal equations of two unknowns; a negative b is noise, and then the speed seen so far is the best guess.
        xx, xy, yy = sum(x * x for x, _, _ in points), sum(x * y for x, y, _ in points), sum(y * y for _, y, _ in points)
        xt, yt = sum(x * t for x, _, t in points), sum(y * t for _, y, t in points)
        determinant = xx * yy - xy * xy
        b = (xx * yt - xy * xt) / determinant if determinant > 0 else 0.0
        a = (xt - b * xy) / xx
        if a < 0 or b < 0:
            a, b = xt / xx, 0.0
        last = self._seen[-1][0]
        return a * (total_tokens - last) + b * (total_tokens**2 - last**2)


class PrefillDisplay:
    """Receives the events of one request. Shows nothing after the first token."""

    def __init__(self, label: str, *, console: Console) -> None:
        self._label = label
        self._forecast = Forecast()
        self._bar: Progress | None = None
        self._next_line = time.monotonic() + LINE_EVERY_S
        if console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"))
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task(label, total=None, figures="")
            self._bar.start()

    def __call__(self, event: Event) -> None:
        if isinstance(event, PrefillProgress):
            self._forecast.add(event.processed_tokens, event.elapsed_s)
            figures = self._figures(event)
            if self._bar is not None:
                self._bar.update(self._task, total=event.total_tokens, completed=event.processed_tokens, figures=figures)
            elif time.monotonic() >= self._next_line:
                self._next_line = time.monotonic() + LINE_EVERY_S
                print(f"{self._label}: {figures}", file=sys.stderr, flush=True)
        elif isinstance(event, TokenDelta | Finished):
            self.close()

    def _figures(self, event: PrefillProgress) -> str:
        figures = f"{event.processed_tokens:,} of {event.total_tokens:,} tokens"
        fresh = event.processed_tokens - event.cached_tokens
        if fresh and event.elapsed_s > 0:
            figures += f", {fresh / event.elapsed_s:,.0f} tokens/s"
        remaining = self._forecast.remaining_s(event.total_tokens)
        return figures if remaining is None else f"{figures}, {duration(remaining)} left"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def duration(seconds: float) -> str:
    """'8 s', '2 min 05 s', '1 h 20 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@contextlib.contextmanager
def prefill_bar(label: str) -> Iterator[Callable[[Event], None]]:
    """Gives the ``on_event`` that moves the bar of one request; the bar goes away at its first token."""
    display = PrefillDisplay(label, console=Console(stderr=True))
    try:
        yield display
    finally:
        display.close()


@contextlib.contextmanager
def download_bar() -> Iterator[Callable[[int, int, str], None]]:
    """Gives the ``progress(done, total, label)`` of the catalogue, in bytes. Nothing is shown if it is never called."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, visible=False)
        said = ""

        def report(done: int, total: int, label: str) -> None:
            nonlocal said
            bar.update(task, completed=done, total=total, description=label, visible=True)
            if not console.is_terminal and label != said:
                said = label
                print(f"{label} ({done / 2**20:,.0f} of {total / 2**20:,.0f} MiB)", file=sys.stderr, flush=True)

        yield report


@contextlib.contextmanager
def layer_bar(label: str) -> Iterator[Callable[[int, int], None]]:
    """Gives the ``on_layer(done, total)`` of the engine's loading."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("layer {task.completed:.0f} of {task.total:.0f}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(label, total=1)
        yield lambda done, total: bar.update(task, completed=done, total=total)
