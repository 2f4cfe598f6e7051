"""``zen-turbo bench reuse``: what the second question about a document costs.

A real text of N tokens is the document; two questions about it are asked through the chat template, greedily.

    cold    the first question, nothing known; with --store, pages are written behind meanwhile
    warm    the second question, in the same process; then the first one again, whose answer ``identical`` compares
    restart the first question in a new engine, from the store on disk; with --store only

So a document is read once. ``identical`` says whether the answer is the cold run's, token for token; ``share`` is TTFT over the cold run's;
``tpot_ms`` is the mean time of the answer's tokens after the first, ``tpot_ratio`` over that of the first length's same case.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zen_turbo.bench import corpora
from zen_turbo.bench.prefill import engine_facts, preset_of
from zen_turbo.bench.report import GIB, Experiment, Row
from zen_turbo.bench.text import read_tokens
from zen_turbo.config import EngineConfig
from zen_turbo.engine.memory import peak_rss_bytes
from zen_turbo.engine.request import RequestOutput, SamplingParams
from zen_turbo.errors import ConfigurationError
from zen_turbo.llm import LLM
from zen_turbo.progress import prefill_bar

COLUMNS = ("length", "case", "attention", "preset", "ttft_s", "share", "cached_tokens", "identical", "tpot_ms", "tpot_ratio", "peak_rss_gib")
ANSWER_TOKENS = 32
QUESTIONS = ("What is this text about? Answer in one sentence.", "Which names appear in this text? List three of them.")
_ROOM = 96  # tokens of template and question


def run(
    *, model: str, lengths: Sequence[int], text: str, config: EngineConfig, output: Path | None = None
) -> dict[str, Any]:
    """Measure every length, print the report, return the record. Raises ConfigurationError for lengths without room for a document and for a
    store that knows a document already, what fetching texts raises, and the engine's own errors."""
    if not lengths or min(lengths) <= _ROOM:
        raise ConfigurationError(f"lengths must be greater than {_ROOM}, the room of a question.", param="lengths")
    source = corpora.path_of(text)
    experiment = Experiment("bench", "reuse", settings={"model": model, "lengths": list(lengths), "text": text}, output=output)
    llm = LLM(model, config=config)
    experiment.settings |= engine_facts(llm.engine)
    greedy = SamplingParams(temperature=0.0, max_tokens=ANSWER_TOKENS, ignore_eos=True)
    rows: list[Row] = []

    def ask(document: str, question: str, label: str) -> RequestOutput:
        prompt = llm.engine.chat_template.encode([{"role": "user", "content": f"{document}\n\n{question}"}])
        with prefill_bar(label) as on_event:
            return llm.generate(prompt, greedy, on_event=on_event)

    for number, length in enumerate(sorted(set(lengths))):
        if number:
            llm.engine.close()
            llm = LLM(model, config=config)
        # A document of its own for every length: a longer one that began with a shorter one would find its pages in the store.
        document = llm.engine.tokenizer.decode(read_tokens(llm.engine.tokenizer, length - _ROOM, source))
        document = f"{length:,} tokens of text.\n\n{document}"
        cold = ask(document, QUESTIONS[0], f"{length} tokens, cold")
        if cold.cached_tokens:
            raise ConfigurationError(
                f"The store knows {cold.cached_tokens:,} tokens of this text already, so nothing cold can be measured: name an empty folder.",
                param="store",
            )
        warm = ask(document, QUESTIONS[1], f"{length} tokens, warm")
        cases = [("cold", cold, cold), ("warm", warm, ask(document, QUESTIONS[0], f"{length} tokens, warm again"))]
        if config.store is not None:
            llm.engine.close()
            llm = LLM(model, config=config)
            restart = ask(document, QUESTIONS[0], f"{length} tokens, restart")
            cases.append(("restart", restart, restart))
        for case, timed, compared in cases:
            metrics = timed.metrics
            row: Row = {
                "length": length,
                "case": case,
                "attention": config.attention,
                "preset": preset_of(llm.engine),
                "ttft_s": metrics.ttft_s,
                "share": metrics.ttft_s / cold.metrics.ttft_s,
                "cached_tokens": timed.cached_tokens,
                "prompt_tokens": timed.prompt_tokens,
                "identical": compared.token_ids == cold.token_ids,
                "answer": timed.text,
                "tpot_ms": 1e3 * metrics.decode_s / (ANSWER_TOKENS - 1),
                "decode_recall": metrics.decode_recall,
                "attend_s": metrics.attend_s,
                "linear_s": metrics.linear_s,
                "select_s": metrics.select_s,
                "density": metrics.density,
                "recall": metrics.recall,
                "recall_p5": metrics.recall_p5,
                "peak_rss_gib": peak_rss_bytes() / GIB,
            }
            first = next((other for other in rows if other["case"] == case), row)
            row["tpot_ratio"] = row["tpot_ms"] / first["tpot_ms"]
            rows.append(row)
            experiment.log(f"{length:,} tokens, {case}: {row['ttft_s']:.2f} s to the first token, {row['cached_tokens']:,} cached")
    llm.engine.close()
    return experiment.finish(rows, columns=COLUMNS, note="share: time to first token over that of the cold run.")
