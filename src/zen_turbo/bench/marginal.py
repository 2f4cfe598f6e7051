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
"""

from __future__ import annotations

import bisect
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zen_turbo.bench import corpora
from zen_turbo.bench.gemm import GemmBenchmark, shapes_of_model
from zen_turbo.bench.prefill import engine_facts, linear_flops, preset_of
from zen_turbo.bench.reading import read_chunk
from zen_turbo.bench.report import GIB, Experiment, Row
from zen_turbo.bench.text import fingerprint, read_tokens
from zen_turbo.config import EngineConfig
from zen_turbo.engine.engine import Engine
from zen_turbo.engine.memory import peak_rss_bytes
from zen_turbo.errors import ConfigurationError
from zen_turbo.kv.sequence import SequenceCache
from zen_turbo.llm import LLM

COLUMNS = (
    "length",
    "attention",
    "preset",
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


class ChunkTime(NamedTuple):
    """A dense chunk that ends at token ``end``."""

    end: int
    seconds: float


def dense_read_s(chunks: Sequence[ChunkTime], end: int, chunk_tokens: int) -> float:
    """Seconds of a dense read of ``end`` tokens in chunks of ``chunk_tokens``, from at least two measured ones, ascending."""
    ends = [chunk.end for chunk in chunks]
    total = 0.0
    for at in range(chunk_tokens, end + 1, chunk_tokens):
        right = min(max(bisect.bisect_left(ends, at), 1), len(chunks) - 1)
        first, second = chunks[right - 1], chunks[right]
        slope = (second.seconds - first.seconds) / (second.end - first.end)
        total += max(first.seconds + slope * (at - first.end), 0.0)
    return total


def run(
    *,
    model: str,
    positions: Sequence[int],
    text: str,
    config: EngineConfig,
    output: Path | None = None,
) -> dict[str, Any]:
    """Read up to the last position, print the report, return the record. Raises ConfigurationError for fewer than two positions or ones that
    are no ends of chunks, what fetching texts raises, and the engine's own errors."""
    grid, positions = config.prefill_chunk_tokens, sorted(set(positions))
    if len(positions) < 2 or any(position < grid or position % grid for position in positions):
        raise ConfigurationError(f"positions must be at least two multiples of the chunk, {grid} tokens.", param="positions")
    source = corpora.path_of(text)
    experiment = Experiment("bench", "marginal", settings={"model": model, "positions": positions, "text": text}, output=output)
    engine = LLM(model, config=config).engine
    experiment.settings |= engine_facts(engine)
    tokens = read_tokens(engine.tokenizer, positions[-1], source)
    gemm = GemmBenchmark(shapes_of_model(engine.decoder.linear_shapes()))
    gemm.sample()
    rows = _read(experiment, engine, tokens, positions)
    gemm.sample()
    rate = gemm.rate().gflops * 1e9
    dense = [ChunkTime(row["length"], row["dense_chunk_s"]) for row in rows]
    for row in rows:
        row["dense_read_s"] = dense_read_s(dense, row["length"], grid)
        row["speedup"] = row["dense_read_s"] / row["read_s"]
        row["linear_floor_s"] = linear_flops(engine, row["length"]) / rate
        row["floor_ratio"] = row["read_s"] / row["linear_floor_s"]
        row["prompt_sha256"] = fingerprint(tokens[: row["length"]])
    return experiment.finish(rows, columns=COLUMNS, note="dense_read_s is added up from measured dense chunks; everything else is measured.")


def _read(experiment: Experiment, engine: Engine, tokens: list[int], positions: Sequence[int]) -> list[Row]:
    grid = engine.config.prefill_chunk_tokens
    state = engine.new_fidelity(dense_from=len(tokens)) if engine.config.attention != "dense" else None
    cache = SequenceCache(engine.pool)
    rows: list[Row] = []
    read = 0.0
    try:
        cache.reserve(len(tokens))

        def chunk(start: int, *, sparse: bool) -> float:
            began = time.perf_counter()
            read_chunk(engine, cache, tokens, start, start + grid, fidelity=state if sparse else None)
            return time.perf_counter() - began

        for start in range(0, len(tokens), grid):
            end = start + grid
            dense_s = chunk(start, sparse=False) if end in positions else None
            seconds = chunk(start, sparse=True)
            cache.commit(end)
            read += seconds
            if dense_s is not None:
                row: Row = {
                    "length": end,
                    "attention": engine.config.attention,
                    "preset": preset_of(engine),
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
    return rows
