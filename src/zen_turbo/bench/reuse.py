"""``zen-turbo bench reuse``: what the second question about a document costs.

A real text of N tokens is the document; two questions about it are asked through the chat template, greedily.

    cold    the second question alone, nothing known (measured last)
    warm    the same after the first question, in the same process
    restart the same in a new engine, from the store on disk; with --store only

``identical`` says whether the answer is the cold run's, token for token; ``share`` is TTFT over the cold run's.
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

COLUMNS = ("length", "case", "attention", "preset", "ttft_s", "share", "cached_tokens", "prompt_tokens", "identical")
ANSWER_TOKENS = 32
QUESTIONS = ("What is this text about? Answer in one sentence.", "Which names appear in this text? List three of them.")
_ROOM = 96  # tokens of template and question


def run(
    *, model: str, lengths: Sequence[int], text: str, config: EngineConfig, output: Path | None = None
) -> dict[str, Any]:
    """Measure every length, print the report, return the record. Raises ConfigurationError for lengths without room for a document, what
    fetching texts raises, and the engine's own errors."""
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
        document = llm.engine.tokenizer.decode(read_tokens(llm.engine.tokenizer, length - _ROOM, source))
        answers = {}
        for case, question in (("first", QUESTIONS[0]), ("warm", QUESTIONS[1])):
            answers[case] = ask(document, question, f"{length} tokens, {case}")
        if config.store is not None:
            llm.engine.close()
            llm = LLM(model, config=config)
            answers["restart"] = ask(document, QUESTIONS[1], f"{length} tokens, restart")
        # Last, because it must find nothing.
        llm.engine.close()
        llm = LLM(model, config=EngineConfig.from_dict({**config.to_dict(), "store": None}))
        cold = ask(document, QUESTIONS[1], f"{length} tokens, cold")
        for case, answer in (("cold", cold), *((case, answers[case]) for case in ("warm", "restart") if case in answers)):
            row: Row = {
                "length": length,
                "case": case,
                "attention": config.attention,
                "preset": preset_of(llm.engine),
                "ttft_s": answer.metrics.ttft_s,
                "share": answer.metrics.ttft_s / cold.metrics.ttft_s,
                "cached_tokens": answer.cached_tokens,
                "prompt_tokens": answer.prompt_tokens,
                "identical": answer.token_ids == cold.token_ids,
                "answer": answer.text,
                "peak_rss_gib": peak_rss_bytes() / GIB,
            }
            rows.append(row)
            experiment.log(f"{length:,} tokens, {case}: {row['ttft_s']:.2f} s to the first token, {row['cached_tokens']:,} cached")
    return experiment.finish(rows, columns=COLUMNS, note="share: time to first token over that of the cold run.")
