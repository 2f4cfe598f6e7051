"""``zen-turbo bench marginal``: what one more chunk costs at a position, sparse and dense, and what a dense read would have cost in all.

A dense read of a million tokens takes days here, so nobody measures it. But its chunks are alike: a chunk at position p costs a part that does
not depend on p (linear layers) and a part that grows with p (attention). A prompt is read once with the engine's policy, every chunk timed; at
the positions asked for, the chunk is first run densely over the same pages and timed too, and its result thrown away.

    read_s        the policy's own chunks up to and including this one, added up: what was measured
    chunk_s       the policy's chunk at this position; dense_chunk_s the same chunk, dense
    dense_read_s  a dense read up to here, from the measured dense chunks: chunk time is interpolated linearly in the position between them
                  and extended by the first line below the first; speedup = dense_read_s / read_s
    linear_floor_s  the linear layers alone for all tokens up to here, at the bf16 GEMM rate of this run

A dense chunk's queries see keys that a sparse prefix wrote. That changes numbers, not time.

With ``--also`` other presets have a row each at these positions. They read the two windows before a position on pages that the engine's preset
left, with what it had learnt of the heads and their own prices and linear layers; their last chunk is timed, and all of it thrown away. Their
``read_s`` and ``density`` are added up from these chunks as ``dense_read_s`` is. Dense chunks have the linear layers of the engine's preset,
which can only make them faster.
"""

from __future__ import annotations

import bisect
import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zen_turbo.attention.fidelity import WINDOW_TOKENS, Fidelity
from zen_turbo.bench import corpora
from zen_turbo.bench.gemm import GemmBenchmark, shapes_of_model
from zen_turbo.bench.prefill import engine_facts, linear_flops, preset_of
from zen_turbo.bench.reading import read_chunk
from zen_turbo.bench.report import GIB, Experiment, Row
from zen_turbo.bench.text import fingerprint, read_tokens
from zen_turbo.config import PAGE_TOKENS, EngineConfig
from zen_turbo.engine.engine import Engine
from zen_turbo.engine.memory import peak_rss_bytes
from zen_turbo.errors import ConfigurationError
from zen_turbo.kv.sequence import SequenceCache
from zen_turbo.llm import LLM

COLUMNS = (
    "length",
    "attention",
    "preset",
    "measured",
    "read_s",
    "dense_read_s",
    "speedup",
    "chunk_s",
    "dense_chunk_s",
    "linear_floor_s",
    "floor_ratio",
    "density",
    "recall",
    "peak_rss_gib",
)


# Windows that another preset reads before its chunk is timed: a share moves by a factor of four from one to the next, so two suffice for sixteen.
_WARM_WINDOWS = 2


class ChunkTime(NamedTuple):
    """A chunk that ends at token ``end``."""

    end: int
    seconds: float


def read_s(chunks: Sequence[ChunkTime], end: int, chunk_tokens: int) -> float:
    """Seconds of a read of ``end`` tokens in chunks of ``chunk_tokens``, from at least two measured ones, ascending: between two the time is linear
    in the position, beyond the outer ones it goes on as between the nearest two."""
    return sum(max(_between(chunks, at), 0.0) for at in range(chunk_tokens, end + 1, chunk_tokens))


def _between(points: Sequence[tuple[int, float]], at: int) -> float:
    right = min(max(bisect.bisect_left([point[0] for point in points], at), 1), len(points) - 1)
    (first, value), (second, other) = points[right - 1], points[right]
    return value + (other - value) / (second - first) * (at - first)


def _read_density(densities: Sequence[tuple[int, float]], end: int, chunk_tokens: int) -> float:
    """Of a whole read, from the densities of single chunks as (end, density): a chunk counts for the keys before it."""
    ends = range(chunk_tokens, end + 1, chunk_tokens)
    return sum(min(max(_between(densities, at), 0.0), 1.0) * at for at in ends) / sum(ends)


def run(
    *,
    model: str,
    positions: Sequence[int],
    text: str,
    config: EngineConfig,
    also: Sequence[str] = (),
    output: Path | None = None,
) -> dict[str, Any]:
    """Read up to the last position, print the report, return the record. Raises ConfigurationError for fewer than two positions or ones that
    are no ends of chunks, for other presets (``also``) without adaptive attention or where positions are no ends of windows, what fetching
    texts raises, and the engine's own errors."""
    grid, positions = config.prefill_chunk_tokens, sorted(set(positions))
    if len(positions) < 2 or any(position < grid or position % grid for position in positions):
        raise ConfigurationError(f"positions must be at least two multiples of the chunk, {grid} tokens.", param="positions")
    if also and (config.attention != "adaptive" or any(position % WINDOW_TOKENS for position in positions)):
        raise ConfigurationError(
            f"Other presets need adaptive attention and positions that are multiples of {WINDOW_TOKENS} tokens.", param="also"
        )
    source = corpora.path_of(text)
    settings = {"model": model, "positions": positions, "text": text, "also": list(also)}
    experiment = Experiment("bench", "marginal", settings=settings, output=output)
    engine = LLM(model, config=config).engine
    # Others compute into this engine's pages and own none.
    without_room = dataclasses.replace(config, kv_cache_bytes=engine.geometry.slot_bytes, store=None)
    others = [LLM(model, config=dataclasses.replace(without_room, preset=preset)).engine for preset in also]
    experiment.settings |= engine_facts(engine)
    tokens = read_tokens(engine.tokenizer, positions[-1], source)
    gemm = GemmBenchmark(shapes_of_model(engine.decoder.linear_shapes()))
    gemm.sample()
    rows = _read(experiment, engine, others, tokens, positions)
    gemm.sample()
    rate = gemm.rate().gflops * 1e9
    dense = [ChunkTime(row["length"], row["dense_chunk_s"]) for row in rows if row["measured"]]
    for row in rows:
        if not row["measured"]:
            row["dense_chunk_s"] = dict(dense)[row["length"]]
            mine = [other for other in rows if other["preset"] == row["preset"] and not other["measured"]]
            row["read_s"] = read_s([ChunkTime(other["length"], other["chunk_s"]) for other in mine], row["length"], grid)
            row["density"] = _read_density([(other["length"], other["window_density"]) for other in mine], row["length"], grid)
        row["dense_read_s"] = read_s(dense, row["length"], grid)
        row["speedup"] = row["dense_read_s"] / row["read_s"]
        row["linear_floor_s"] = linear_flops(engine, row["length"]) / rate
        row["floor_ratio"] = row["read_s"] / row["linear_floor_s"]
        row["prompt_sha256"] = fingerprint(tokens[: row["length"]])
    note = "dense_read_s, and read_s and density where measured is no, are added up from measured chunks; everything else is measured."
    return experiment.finish(rows, columns=COLUMNS, note=note)


def _read(experiment: Experiment, engine: Engine, others: Sequence[Engine], tokens: list[int], positions: Sequence[int]) -> list[Row]:
    grid = engine.config.prefill_chunk_tokens
    state = engine.new_fidelity(dense_from=len(tokens)) if engine.config.attention != "dense" else None
    cache = SequenceCache(engine.pool)
    rows: list[Row] = []
    read = 0.0

    def chunk(reader: Engine, start: int, fidelity: Fidelity | None) -> float:
        began = time.perf_counter()
        read_chunk(reader, cache, tokens, start, start + grid, fidelity=fidelity)
        return time.perf_counter() - began

    try:
        cache.reserve(len(tokens))
        for start in range(0, len(tokens), grid):
            end = start + grid
            for position in positions:
                if others and start == max(position - _WARM_WINDOWS * WINDOW_TOKENS, 0):
                    assert state is not None
                    rows += [_other_row(experiment, other, state, chunk, start, position) for other in others]
            dense_s = chunk(engine, start, None) if end in positions else None
            seconds = chunk(engine, start, state)
            cache.commit(end)
            read += seconds
            if dense_s is not None:
                row: Row = {
                    "length": end,
                    "attention": engine.config.attention,
                    "preset": preset_of(engine),
                    "measured": True,
                    "read_s": read,
                    "chunk_s": seconds,
                    "dense_chunk_s": dense_s,
                    "density": state.density if state else 1.0,
                    "recall": state.recall if state else None,
                    "recall_p5": state.recall_p5 if state else None,
                    "peak_rss_gib": peak_rss_bytes() / GIB,
                }
                rows.append(row)
                experiment.log(f"{end:,} tokens: read in {read:.0f} s; this chunk {seconds:.2f} s, dense {dense_s:.2f} s")
            elif end // grid % 16 == 0:
                experiment.log(f"{end:,} tokens: read in {read:.0f} s; this chunk {seconds:.2f} s")
    finally:
        cache.release()
    return sorted(rows, key=lambda row: (row["length"], not row["measured"]))


def _other_row(
    experiment: Experiment, other: Engine, reader: Fidelity, chunk: Callable[[Engine, int, Fidelity | None], float], start: int, end: int
) -> Row:
    """Another preset from ``start`` on, which begins a window: nothing is committed, so whoever reads on writes these pages again."""
    state = other.new_fidelity(dense_from=end)
    state.resume([reader.note(page) for page in range(start // PAGE_TOKENS)])
    times = [chunk(other, at, state) for at in range(start, end, other.config.prefill_chunk_tokens)]
    experiment.log(f"{end:,} tokens, {preset_of(other)}: this chunk {times[-1]:.2f} s, density of its last windows {state.density:.2%}")
    return {
        "length": end,
        "attention": other.config.attention,
        "preset": preset_of(other),
        "measured": False,
        "chunk_s": times[-1],
        "window_density": state.density,
        "recall": state.recall,
        "recall_p5": state.recall_p5,
        "peak_rss_gib": peak_rss_bytes() / GIB,
    }
