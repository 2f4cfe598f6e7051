"""``zen-turbo bench fidelity``: what a sparse policy, int8 pages and int8 linear layers change, against dense attention with nothing quantised.

A real text is cut to N tokens and read twice, that way and with the engine's settings, and the next-token distributions of its last
``NUM_ROWS`` positions are compared. These rows are sparse too, so the figures show the settings and nothing else. A prompt's end reads more, and
from there an answer begins; so the same positions are read once more, each as the end of a prompt that ends with it or soon after:

    top1_agreement     share of positions at which both would say the same token
    kl                 mean Kullback-Leibler divergence from dense to sparse, in nats per token
    output_rel_error   relative L2 difference of the logits, after taking each row's mean away
    end_top1_agreement, end_kl   the first two, of positions that are read as a prompt's end
    recall_mean, _p5   attention mass kept, measured exactly on sampled rows; density: block pairs read

The dense pass takes long and depends on neither policy nor preset: ``--keep-dense FOLDER`` keeps its logits (0.3 GB per prompt) for the next
measurement of the same model, text, length and settings.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from zen_turbo.attention.fidelity import Fidelity
from zen_turbo.bench import corpora
from zen_turbo.bench.prefill import engine_facts, preset_of
from zen_turbo.bench.reading import grid, read_chunk
from zen_turbo.bench.report import Experiment, Row
from zen_turbo.bench.text import fingerprint, read_tokens
from zen_turbo.config import PAGE_TOKENS, EngineConfig
from zen_turbo.engine.engine import DENSE_TAIL_TOKENS, Engine
from zen_turbo.errors import ConfigurationError
from zen_turbo.kv.sequence import SequenceCache
from zen_turbo.llm import LLM
from zen_turbo.models.linear import linear_arithmetic

NUM_ROWS = 512
# Settings that decide the dense pass.
_DENSE_KNOBS = ("context_extension", "dtype", "dca_chunk_size", "dca_local_size", "attention_temperature")
COLUMNS = (
    "length",
    "text",
    "attention",
    "preset",
    "kv_dtype",
    "linear_dtype",
    "density",
    "recall_mean",
    "recall_p5",
    "output_rel_error",
    "top1_agreement",
    "kl",
    "end_top1_agreement",
    "end_kl",
    "prefill_s",
    "dense_prefill_s",
)


class Difference(NamedTuple):
    top1_agreement: float
    kl: float
    output_rel_error: float


def compare(dense: torch.Tensor, sparse: torch.Tensor) -> Difference:
    """Logits, float32 [rows, V] each; row by row, so that nothing of their size is copied."""
    same, kl, error, scale = 0, 0.0, 0.0, 0.0
    for first, second in zip(dense, sparse, strict=True):
        a, b = first.double(), second.double()
        same += int(a.argmax() == b.argmax())
        log_p, log_q = a.log_softmax(dim=0), b.log_softmax(dim=0)
        kl += float((log_p.exp() * (log_p - log_q)).sum())
        a, b = a - a.mean(), b - b.mean()
        error += float((a - b).square().sum())
        scale += float(a.square().sum())
    return Difference(same / len(dense), kl / len(dense), (error / scale) ** 0.5)


def last_logits(engine: Engine, tokens: Sequence[int], *, num_rows: int = NUM_ROWS) -> torch.Tensor:
    """Logits of the last ``num_rows`` positions, float32 [num_rows, V], read on the engine's grid of chunks and densely."""
    return measured_pass(engine, tokens, None, num_rows=num_rows).logits


def _read_on(engine: Engine, cache: SequenceCache, tokens: Sequence[int], fidelity: Fidelity | None, *, logits_from: int) -> torch.Tensor:
    """What ``cache`` does not have of ``tokens``; logits of positions from ``logits_from`` on."""
    parts = []
    cache.reserve(len(tokens))
    for start, end in grid(engine, cache.num_tokens, len(tokens)):
        logits = read_chunk(engine, cache, tokens, start, end, fidelity=fidelity, logits_from=logits_from)
        cache.commit(end)
        if logits is not None:
            parts.append(logits)
    return torch.cat(parts)


class MeasuredPass(NamedTuple):
    """Logits of the last positions, float32 [rows, V]: of rows like all others, and of the same ones as ends of prompts (None where attention is
    dense); and the seconds that the former took."""

    logits: torch.Tensor
    end_logits: torch.Tensor | None
    seconds: float


def measured_pass(engine: Engine, tokens: Sequence[int], fidelity: Fidelity | None, *, num_rows: int = NUM_ROWS) -> MeasuredPass:
    """fidelity: of this prompt, without an end; None where attention is dense. A prompt's end is ``DENSE_TAIL_TOKENS`` long, so the positions are
    dealt out to as many prompts as that takes, which share the pages before their ends."""
    cache, length = SequenceCache(engine.pool), len(tokens)
    ends = []
    try:
        began = time.perf_counter()
        logits = _read_on(engine, cache, tokens, fidelity, logits_from=length - num_rows)
        seconds = time.perf_counter() - began
        if fidelity is None:
            return MeasuredPass(logits, None, seconds)
        for first in range(length - num_rows, length, DENSE_TAIL_TOKENS):
            last = min(first + DENSE_TAIL_TOKENS, length)
            own = SequenceCache(engine.pool)
            try:
                shared = engine.new_fidelity(dense_from=last - DENSE_TAIL_TOKENS)
                known = shared.dense_from // PAGE_TOKENS
                shared.resume([fidelity.note(page) for page in range(known)])
                own.adopt(cache.slots[:known])
                ends.append(_read_on(engine, own, tokens[:last], shared, logits_from=first))
            finally:
                own.release()
    finally:
        cache.release()
    return MeasuredPass(logits, torch.cat(ends), seconds)


class DensePass(NamedTuple):
    """Logits as ``last_logits`` gives them, and the seconds that reading took."""

    logits: torch.Tensor
    seconds: float


def dense_pass(engine: Engine, model: str, tokens: Sequence[int], keep: Path | None) -> DensePass:
    """``last_logits`` of dense attention with nothing quantised and the engine's other settings, from ``keep`` if they are there."""
    settings = engine.config.to_dict()
    facts = [engine.model_fingerprint, fingerprint(tokens), len(tokens), NUM_ROWS, {name: settings[name] for name in _DENSE_KNOBS}]
    path = None if keep is None else keep / f"{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]}.timed.pt"
    if path is not None and path.exists():
        return DensePass(**torch.load(path, weights_only=True))
    plain = {"attention": "dense", "kv_dtype": "auto", "linear_dtype": "full", "decode_attention": "dense", "store": None}
    reference = LLM(model, config=EngineConfig.from_dict({**settings, **plain})).engine
    try:
        read = measured_pass(reference, tokens, None)
        found = DensePass(read.logits, read.seconds)
    finally:
        reference.close()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(found._asdict(), path.with_suffix(".partial"))
        path.with_suffix(".partial").replace(path)
    return found


def run(
    *,
    model: str,
    lengths: Sequence[int],
    texts: Sequence[str],
    config: EngineConfig,
    keep_dense: Path | None = None,
    output: Path | None = None,
) -> dict[str, Any]:
    """Measure every length and text, print the report, return the record. Raises ConfigurationError for dense attention with nothing
    quantised (there is nothing to compare) and for lengths without enough rows, what fetching texts raises, and the engine's own errors."""
    if (config.attention, config.kv_dtype, linear_arithmetic(config)) == ("dense", "auto", "full"):
        raise ConfigurationError(
            "bench fidelity compares with dense attention and nothing quantised; say what with --attention, --kv-dtype or --linear-dtype.",
            param="attention",
        )
    if not lengths or min(lengths) <= NUM_ROWS:
        raise ConfigurationError(f"lengths must be greater than {NUM_ROWS}, the rows that are compared.", param="lengths")
    sources = {name: corpora.path_of(name) for name in texts}
    settings = {"model": model, "lengths": list(lengths), "texts": list(texts), "rows": NUM_ROWS}
    experiment = Experiment("bench", "fidelity", settings=settings, output=output)
    engine = LLM(model, config=config).engine
    experiment.settings |= engine_facts(engine)
    rows: list[Row] = []
    for length in lengths:
        for name, source in sources.items():
            tokens = read_tokens(engine.tokenizer, length, source)
            dense = dense_pass(engine, model, tokens, keep_dense)
            experiment.log(f"{length} tokens of {name}: dense, {dense.seconds:.1f} s")
            state = engine.new_fidelity(dense_from=length) if engine.config.attention != "dense" else None
            sparse = measured_pass(engine, tokens, state)
            end = None if sparse.end_logits is None else compare(dense.logits, sparse.end_logits)
            row: Row = {
                "length": length,
                "text": name,
                "attention": engine.config.attention,
                "preset": preset_of(engine),
                "kv_dtype": engine.config.kv_dtype,
                "linear_dtype": linear_arithmetic(engine.config),
                "density": state.density if state else 1.0,
                "recall_mean": state.recall if state else None,
                "recall_p5": state.recall_p5 if state else None,
                **compare(dense.logits, sparse.logits)._asdict(),
                "end_top1_agreement": end.top1_agreement if end else None,
                "end_kl": end.kl if end else None,
                "prefill_s": sparse.seconds,
                "dense_prefill_s": dense.seconds,
                "prompt_sha256": fingerprint(tokens),
            }
            shown = ", ".join(f"{key} {row[key]:.4g}" for key in ("density", "recall_mean", "top1_agreement", "kl", "end_kl") if row[key] is not None)
            experiment.log(f"{length} tokens of {name}: {shown}")
            rows.append(row)
    return experiment.finish(rows, columns=COLUMNS, note=f"Last {NUM_ROWS} positions against dense attention on the same prompt.")
