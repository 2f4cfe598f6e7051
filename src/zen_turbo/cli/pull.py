"""``zen-turbo pull``: fetch a model before it is needed."""

from __future__ import annotations

from typing import Annotated

import typer

from zen_turbo.cli.ask import DEFAULT_MODEL


def pull(
    model: Annotated[str, typer.Argument(help="Catalogue name or hub name.")] = DEFAULT_MODEL,
) -> None:
    """Download a model into the cache, check it, and print its path."""
    from zen_turbo.models.catalogue import resolve_model
    from zen_turbo.progress import download_bar

    with download_bar() as progress:
        path = resolve_model(model, progress=progress)
    print(path)
