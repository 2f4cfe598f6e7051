"""``zen-turbo bench decode``: time per output token against context length, every page read or the pages that matter.

A real text is read once with the engine's prefill policy, as a prompt of every length; with --store what the store knows of it is not read
again. At every context length the text's own next tokens are fed one at a time (teacher forcing), once for each way of decoding from the
same pages: ``TURN_TOKENS`` at a time, all contexts and ways in turns, because what a machine does in one minute says nothing of the next. What is
not known of the context then is computed again, reading everything, as the end of a prompt: its last page, and of a policy whose pages depend on
their chunk the last chunk and the prompt's end:

    read_s, cached_tokens   what reading the context took, and what of it was known
    tpot_ms          median time of one token, output head included; tpot_ratio: over that of the first context
    recall           attention mass that sparse tokens kept where it was sampled
    top1_agreement, kl   sparse against dense: the same next token said, and mean divergence in nats
    peak_rss_gib     of the process, all contexts together
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
TURN_TOKENS = 25
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
    decodings: list[Decoding] = []
    try:
        for context in contexts:
            # The answer is not what the text goes on with: a longer context would continue a conversation, whose pages are its own and not stored.
            answer = SamplingParams(temperature=0.0, max_tokens=1, logit_bias={tokens[context]: -100.0})
            with prefill_bar(f"{context:,} tokens") as on_event:
                read = llm.generate(tokens[:context], answer, on_event=on_event)
            facts = {"read_s": read.metrics.ttft_s, "cached_tokens": read.cached_tokens}
            # Dense comes first: the others are compared with it.
            decodings += [Decoding(engine, tokens[: context + num_tokens], context, mode, facts) for mode in sorted(modes)]
        for end in range(TURN_TOKENS, num_tokens + TURN_TOKENS, TURN_TOKENS):
            for decoding in decodings:
                decoding.feed(decoding.context + min(end, num_tokens))
            experiment.log(f"{min(end, num_tokens)} of {num_tokens} tokens: " + "; ".join(map(str, decodings)))
        rows = [decoding.row(_densely(decoding, decodings)) for decoding in decodings]
    finally:
        for decoding in decodings:
            decoding.cache.release()
        engine.close()
    for row in rows:
        first = next(other for other in rows if other["attention"] == row["attention"])
        row["tpot_ratio"] = row["tpot_ms"] / first["tpot_ms"]
    return experiment.finish(rows, columns=COLUMNS, note="Median time of a token; agreement and KL of sparse tokens against dense ones.")


class Decoding:
    """What ``tokens`` has after its first ``context`` ones, which the engine has read as a prompt, fed in one way. facts: of that reading."""

    def __init__(self, engine: Engine, tokens: Sequence[int], context: int, mode: str, facts: Row) -> None:
        self.context, self.mode, self._facts = context, mode, facts
        self._engine, self._tokens, self._next = engine, tokens, context
        self._times: list[float] = []
        self._logits: list[torch.Tensor] = []
        known = engine.reuse.find(tokens[:context])
        fidelity = engine.new_fidelity(dense_from=context) if engine.config.attention != "dense" else None
        if fidelity is not None:
            fidelity.resume(known.notes)
        self._decode = engine.new_decode(prompt_tokens=context, fidelity=fidelity, policy=mode)
        self.cache = cache = SequenceCache(engine.pool)
        try:
            cache.adopt(known.slots)
            cache.reserve(len(tokens))
            for start, end in grid(engine, cache.num_tokens, context):
                read_chunk(engine, cache, tokens, start, end, decode=self._decode)
                cache.commit(end)
        except BaseException:
            cache.release()
            raise
        self._answer = Answer(cache.pages, self._decode, rope_seq_len=context)

    def feed(self, end: int) -> None:
        """Tokens up to ``end``, each timed but the first, which finds the processor's caches full of something else."""
        for position in range(self._next, end):
            began = time.perf_counter()
            self._logits.append(self._engine.decoder.decode_tokens([TokenRow(self._tokens[position], position, self._answer)]))
            if position > self._next:
                self._times.append(time.perf_counter() - began)
            self.cache.commit(position + 1)
        self._next = end

    @property
    def logits(self) -> torch.Tensor:
        """Of all tokens that were fed, float32 [tokens, V]."""
        return torch.cat(self._logits)

    def __str__(self) -> str:
        return f"{self.context:,} {self.mode} {1e3 * statistics.median(self._times):.1f} ms"

    def row(self, dense: Decoding | None) -> Row:
        """dense: the same context with every page read, None where that was not asked for."""
        difference = compare(dense.logits, self.logits) if dense is not None and dense is not self else None
        return {
            "context": self.context,
            "attention": self.mode,
            "tpot_ms": 1e3 * statistics.median(self._times),
            "tpot_p95_ms": 1e3 * sorted(self._times)[int(0.95 * (len(self._times) - 1))],
            "recall": self._decode.recall if self._decode else None,
            "top1_agreement": difference.top1_agreement if difference else None,
            "kl": difference.kl if difference else None,
            "peak_rss_gib": peak_rss_bytes() / GIB,
            "prompt_sha256": fingerprint(self._tokens),
            **self._facts,
        }


def _densely(decoding: Decoding, decodings: Sequence[Decoding]) -> Decoding | None:
    return next((other for other in decodings if (other.context, other.mode) == (decoding.context, "dense")), None)
