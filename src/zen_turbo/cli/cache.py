"""``zen-turbo cache``: what the store on disk holds, and whether it is sound."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from zen_turbo.errors import ConfigurationError

cache_app = typer.Typer(no_args_is_help=True, help="Look after the store of computed pages.", rich_markup_mode=None)
Store = Annotated[Path | None, typer.Option(help="Folder of the store. Default: store in the cache folder.")]


def _folder(store: Path | None) -> Path:
    from zen_turbo.models.catalogue import cache_folder

    folder = (store or cache_folder() / "store").expanduser()
    if not folder.is_dir():
        raise ConfigurationError(f"There is no store in {folder}.", param="store")
    return folder


def _facts(folder: Path, identity: str) -> dict[str, Any]:
    try:
        facts = json.loads((folder / identity / "identity.json").read_text("utf-8"))
    except (OSError, ValueError):
        facts = None
    return facts if isinstance(facts, dict) else {}


@cache_app.command("ls")
def list_store(store: Store = None) -> None:
    """One line for each model and setting: how much is stored, and when it was used last."""
    from zen_turbo.kv.store import segments_of

    folder = _folder(store)
    segments = segments_of(folder)
    for identity in sorted({segment.identity for segment in segments}):
        mine = [segment for segment in segments if segment.identity == identity]
        facts = _facts(folder, identity)
        engine = facts.get("engine") or {}
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(max(segment.last_used for segment in mine)))
        what = f"{facts.get('model', 'unknown model')}, {engine.get('attention', '?')} attention, {engine.get('kv_dtype', '?')} pages"
        print(f"{identity[:12]}  {sum(segment.num_bytes for segment in mine) / 2**30:8.2f} GiB  {len(mine):5} segments  used {used}  {what}")


@cache_app.command("stats")
def stats(store: Store = None) -> None:
    """The whole store as one JSON object."""
    from zen_turbo.kv.store import segments_of

    folder = _folder(store)
    segments = segments_of(folder)
    print(
        json.dumps(
            {
                "folder": str(folder),
                "identities": len({segment.identity for segment in segments}),
                "segments": len(segments),
                "bytes": sum(segment.num_bytes for segment in segments),
            }
        )
    )


@cache_app.command("verify")
def verify_store(store: Store = None) -> None:
    """Read everything and check it; exits with 1 if anything is damaged. Damaged segments are never used: they are computed again."""
    from zen_turbo.kv.store import SegmentFacts, verify

    seen: list[SegmentFacts] = []

    def on_segment(facts: SegmentFacts) -> None:
        seen.append(facts)
        if facts.problem:
            print(f"{facts.identity[:12]}/{facts.name}: {facts.problem}")

    verify(_folder(store), on_segment)
    bad = sum(facts.problem is not None for facts in seen)
    print(f"{len(seen)} segments, {sum(facts.num_pages for facts in seen)} pages, {bad} damaged")
    if bad:
        raise typer.Exit(1)


@cache_app.command("rm")
def remove(
    identity: Annotated[str | None, typer.Argument(help="Beginning of an identity that ls shows. Default: with --all, everything.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Remove everything.")] = False,
    store: Store = None,
) -> None:
    """Remove what is stored for a model and setting, or everything."""
    from zen_turbo.kv.store import remove_segment, segments_of

    if (identity is None) != everything:
        raise ConfigurationError("Say either which identity to remove, as ls shows it, or --all.", param="identity")
    folder = _folder(store)
    chosen = [segment for segment in segments_of(folder) if everything or segment.identity.startswith(identity or "")]
    if not chosen and not everything:
        raise ConfigurationError(f"Nothing is stored under {identity!r}.", param="identity")
    for segment in chosen:
        remove_segment(folder / segment.identity / segment.name)
    print(f"removed {len(chosen)} segments, {sum(segment.num_bytes for segment in chosen) / 2**30:.2f} GiB")
