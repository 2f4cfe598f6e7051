"""A progress bar on standard error while a prompt is read; nothing where standard error is not a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from zen_turbo.engine.request import Event, PrefillProgress


@contextlib.contextmanager
def prefill_bar(label: str) -> Iterator[Callable[[Event], None]]:
    """Gives the ``on_event`` that moves the bar; the bar goes away at the end."""
    if not sys.stderr.isatty():
        yield lambda event: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(label, total=None)

        def on_event(event: Event) -> None:
            if isinstance(event, PrefillProgress):
                progress.update(task, total=event.total_tokens, completed=event.processed_tokens)

        yield on_event
