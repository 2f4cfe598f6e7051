"""``zen-turbo bench decode``: time per output token against context length, every page read or the pages that matter.

A real text is read once with the engine's prefill policy, as a prompt of every length; with --store what the store knows of it is not read
again. At every context length the text's own next tokens are fed one at a time (teacher forcing), once for each way of decoding from the
same pages. What is not known of the context then is computed again, reading everything, as the end of a prompt: its last page, and of a
policy whose pages depend on their chunk the last chunk and the prompt's end:

    read_s, cached_tokens   what reading the context took, and what of it was known
    tpot_ms          median time of one token, output head included; tpot_ratio: over that of the first context
    recall           attention mass that sparse tokens kept where it was sampled
    top1_agreement, kl   sparse against dense: the same next token said, and mean divergence in nats
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from zen_turbo.attention.answer import Answer
from zen_turbo.attention.decode import DECODERS
from zen_turbo.bench import corpora
from zen_turbo.bench.fidelity import compare
from zen_turbo.bench.prefill import engine_facts
from zen_turbo.bench.reading import grid, read_chunk
from zen_turbo.bench.report import GIB, Experiment, Row
from zen_turbo.bench.text import fingerprint, read_tokens
from zen_turbo.config import PAGE_TOKENS, EngineConfig
from zen_turbo.engine.engine import Engine
from zen_turbo.engine.memory import peak_rss_bytes
from zen_turbo.engine.request import SamplingParams
from zen_turbo.errors import ConfigurationError
from zen_turbo.kv.sequence import SequenceCache
from zen_turbo.llm import LLM
from zen_turbo.models.decoder import TokenRow
from zen_turbo.progress import prefill_bar

MODES = ("dense", *DECODERS)
COLUMNS = ("context", "attention", "read_s", "tpot_ms", "tpot_ratio", "recall", "top1_agreement", "kl", "peak_rss_gib")


def run(
    *,
    model: str,
    contexts: Sequence[int],
    modes: Sequence[str],
    prefill: str,
    num_tokens: int,
    text: str,
    config: EngineConfig,
    output: Path | None = None,
) -> dict[str, Any]:
    """Measure every context, print the report, return the record. Raises ConfigurationError for what cannot be measured, what fetching texts
    raises, and the engine's own errors."""
    contexts = sorted(set(contexts))
    if not contexts or contexts[0] < PAGE_TOKENS or any(context % PAGE_TOKENS for context in contexts):
        raise ConfigurationError(f"contexts must be multiples of the page, {PAGE_TOKENS} tokens.", param="contexts")
    if not modes or set(modes) - set(MODES) or num_tokens < 2:
        raise ConfigurationError(f"attention must be of {', '.join(MODES)}, and tokens at least 2.", param="attention")
    source = corpora.path_of(text)
    settings = {"model": model, "contexts": contexts, "attention": list(modes), "tokens": num_tokens, "text": text}
    experiment = Experiment("bench", "decode", settings=settings, output=output)
    llm = LLM(model, config=EngineConfig.from_dict({**config.to_dict(), "attention": prefill, "decode_attention": "sparse"}))
    engine = llm.engine
    experiment.settings |= engine_facts(engine)
    tokens = read_tokens(engine.tokenizer, contexts[-1] + num_tokens, source)
    rows: list[Row] = []
    for context in contexts:
        # The answer is not what the text goes on with: a longer context would continue a conversation, whose pages are its own and not stored.
        answer = SamplingParams(temperature=0.0, max_tokens=1, logit_bias={tokens[context]: -100.0})
        with prefill_bar(f"{context:,} tokens") as on_event:
            read = llm.generate(tokens[:context], answer, on_event=on_event)
        measured = _at(engine, tokens[: context + num_tokens], context, modes)
        rows += [{**row, "read_s": read.metrics.ttft_s, "cached_tokens": read.cached_tokens} for row in measured]
        experiment.log(f"{context:,} tokens: " + "; ".join(f"{row['attention']} {row['tpot_ms']:.1f} ms" for row in measured))
    engine.close()
    for row in rows:
        first = next(other for other in rows if other["attention"] == row["attention"])
        row["tpot_ratio"] = row["tpot_ms"] / first["tpot_ms"]
    return experiment.finish(rows, columns=COLUMNS, note="Median time of a token; agreement and KL of sparse tokens against dense ones.")


def _at(engine: Engine, tokens: Sequence[int], context: int, modes: Sequence[str]) -> list[Row]:
    """Feed what ``tokens`` has after the first ``context`` ones, which the engine has read as a prompt, once per mode."""
    rows: list[Row] = []
    logits: dict[str, torch.Tensor] = {}
    known = engine.reuse.find(tokens[:context])
    fidelity = engine.new_fidelity(dense_from=context) if engine.config.attention != "dense" else None
    if fidelity is not None:
        fidelity.resume(known.notes)
    for mode in sorted(modes):  # dense comes first: the others are compared with it
        decode = engine.new_decode(prompt_tokens=context, fidelity=fidelity, policy=mode)
        cache = SequenceCache(engine.pool)
        times, parts = [], []
        try:
            cache.adopt(known.slots)
            cache.reserve(len(tokens))
            for start, end in grid(engine, cache.num_tokens, context):
                read_chunk(engine, cache, tokens, start, end, decode=decode)
                cache.commit(end)
            answer = Answer(cache.pages, decode, rope_seq_len=context)
            for position in range(context, len(tokens)):
                began = time.perf_counter()
                parts.append(engine.decoder.decode_tokens([TokenRow(tokens[position], position, answer)]))
                times.append(time.perf_counter() - began)
                cache.commit(position + 1)
        finally:
            cache.release()
        logits[mode] = torch.cat(parts)
        difference = compare(logits["dense"], logits[mode]) if mode != "dense" and "dense" in logits else None
        rows.append(
            {
                "context": context,
                "attention": mode,
                "tpot_ms": 1e3 * statistics.median(times[1:]),  # the first one finds cold caches
                "tpot_p95_ms": 1e3 * sorted(times[1:])[int(0.95 * (len(times) - 1))],
                "recall": decode.recall if decode else None,
                "top1_agreement": difference.top1_agreement if difference else None,
                "kl": difference.kl if difference else None,
                "peak_rss_gib": peak_rss_bytes() / GIB,
                "prompt_sha256": fingerprint(tokens),
            }
        )
    return rows
