"""Reading a prompt chunk by chunk below the engine's requests, for benchmarks that look inside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from zen_turbo.attention.decode import SparseDecode
from zen_turbo.attention.fidelity import Fidelity
from zen_turbo.engine.engine import Engine
from zen_turbo.kv.sequence import SequenceCache


def grid(engine: Engine, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The chunks of tokens [start, end) on the engine's grid, as (start, end) each."""
    size = engine.config.prefill_chunk_tokens
    while start < end:
        stop = min((start // size + 1) * size, end)
        yield start, stop
        start = stop


def read_chunk(
    engine: Engine,
    cache: SequenceCache,
    tokens: Sequence[int],
    start: int,
    end: int,
    *,
    fidelity: Fidelity | None = None,
    decode: SparseDecode | None = None,
    logits_from: int | None = None,
) -> torch.Tensor | None:
    """Compute tokens [start, end) of ``tokens``, the whole prompt, into reserved pages; the caller commits. Gives the logits of positions
    ``logits_from`` and later, float32 [rows, V], or None where there are none."""
    first = end if logits_from is None else max(start, logits_from)
    logits, _ = engine.decoder.forward(
        torch.tensor(tokens[start:end], dtype=torch.int64),
        cache.pages,
        first_position=start,
        logits_rows=slice(first - start, end - start) if first < end else None,
        rope_seq_len=len(tokens),
        fidelity=fidelity,
        decode=decode,
    )
    return logits
