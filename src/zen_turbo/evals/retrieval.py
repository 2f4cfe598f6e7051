"""``zen-turbo eval retrieval``: facts among look-alike facts, many questions about one context, policies against each other on the same ones.

Passkeys prove little about a sparse policy: one loud sentence in noise is what any selection finds. Here every needle has a hundred
near-copies, and the questions are paired: the same prompts go to every policy, so a difference of scores is a difference of policies, and its
standard error is that of the paired differences.

A context comes first and is read once for each policy; a question costs its own tokens and the prompt's end. Answers are greedy, and decoded
together, which changes none of them.

A score says right or wrong, so hundreds of questions cannot tell half a point from one. Where one answer is right, its probability is asked for
too: a grammar forces it over the same pages. It is in points as well, what would be scored on average were the tokens of an answer drawn, and it
moves where an answer is nearly lost or nearly found.
Every finished answer is kept in a journal per policy beside ``--output``, so an interrupted run continues.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zen_turbo.bench import corpora
from zen_turbo.bench.prefill import engine_facts, preset_of
from zen_turbo.bench.report import Experiment, Row
from zen_turbo.bench.text import read_tokens
from zen_turbo.config import EngineConfig
from zen_turbo.engine.engine import Engine
from zen_turbo.engine.guidance import literal
from zen_turbo.engine.request import Event, SamplingParams, TokenDelta
from zen_turbo.errors import ConfigurationError
from zen_turbo.evals.journal import Journal
from zen_turbo.evals.retrieval_prompt import GENERATOR_VERSION, TASKS, Question, make_context, score
from zen_turbo.llm import LLM
from zen_turbo.progress import prefill_bar

MAX_NEW_TOKENS = {"multikey": 16, "multivalue": 64, "kv": 48}
MOST_FACTS = 17  # of each task in a context: with more, a small model finds too little for a comparison
TOGETHER = 16  # questions about a context that is known
MOST_CONTEXTS = 1000  # of a seed
ROW_VERSION = 2  # of the journal: 2 has log_probability
SCORED = ("score", "versus_dense", "standard_error", "probability", "probability_versus_dense", "probability_standard_error")
COLUMNS = ("task", "length", "attention", "preset", "n", *SCORED, "density", "recall", "read_s")


class Item(NamedTuple):
    """What identifies an answer in the journal. question: counted through all contexts of a length."""

    length: int
    question: int


class Asked(NamedTuple):
    """context: its number, for the row."""

    context: int
    text: str
    question: Question


def messages(context: str, question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{context}\n\n{question}"}, {"role": "assistant", "content": answer}]


def prompt_of(engine: Engine, asked: Asked) -> list[int]:
    """A context, a question and the words that the answer is made to begin with, as tokens."""
    said = messages(asked.text, asked.question.text, asked.question.begin)
    return engine.chat_template.encode(said, add_generation_prompt=False, continue_final_message=True)


def questions_of(
    engine: Engine, lengths: Sequence[int], tasks: Sequence[str], *, num_questions: int, text: str, seed: int = 0
) -> dict[int, list[Asked]]:
    """What is asked at each length: ``num_questions`` are dealt out to the tasks, and those of each to as few contexts as ``MOST_FACTS`` allows.
    No two seeds have a context in common.

    Raises ConfigurationError where that takes more than ``MOST_CONTEXTS``.
    """
    found: dict[int, list[Asked]] = {}
    source = corpora.path_of(text)
    of_task = {task: share(num_questions, len(tasks), number) for number, task in enumerate(tasks)}
    num_contexts = -(-max(of_task.values()) // MOST_FACTS)
    if num_contexts > MOST_CONTEXTS:
        raise ConfigurationError(f"{num_questions} questions take {num_contexts} contexts; a seed has {MOST_CONTEXTS}.", param="questions")
    for length in sorted(set(lengths)):
        lines = engine.tokenizer.decode(read_tokens(engine.tokenizer, length, source)).splitlines()
        found[length] = []
        for number in range(num_contexts):
            context = make_context(
                {task: share(count, num_contexts, number) for task, count in of_task.items()},
                length=length,
                lines=lines,
                count=lambda body: len(engine.chat_template.encode(messages(body, "", ""))),
                max_new_tokens=max(MAX_NEW_TOKENS[task] for task in tasks),
                seed=MOST_CONTEXTS * seed + number,
            )
            found[length] += [Asked(number, context.text, question) for question in context.questions]
    return found


def share(total: int, parts: int, number: int) -> int:
    """Part ``number`` of ``total`` things dealt out evenly."""
    return total // parts + (number < total % parts)


def ask(llm: LLM, length: int, asked: Mapping[int, Asked]) -> list[Row]:
    """Answers as rows of the journal; asked: by the number of the question."""
    prompts, samplings = [], []
    for one in asked.values():
        prompts.append(prompt_of(llm.engine, one))
        max_tokens = MAX_NEW_TOKENS[one.question.task]
        samplings.append(SamplingParams(temperature=0.0, max_tokens=max_tokens))
        assert len(prompts[-1]) + max_tokens <= length, f"{len(prompts[-1])} tokens were made for a prompt of {length}"
    with prefill_bar(f"{length} tokens") as on_event:
        outputs = llm.generate_many(prompts, samplings, on_event=lambda number, event: None if number else on_event(event))
    found = log_probabilities(llm, prompts, [one.question for one in asked.values()])
    return [
        {
            **Item(length, number)._asdict(),
            "context": one.context,
            "task": one.question.task,
            "prompt_tokens": output.prompt_tokens,
            "cached_tokens": output.cached_tokens,
            "expected": list(one.question.answers),
            "answer": output.text,
            "score": score(output.text, one.question),
            "log_probability": log_probability,
            "ttft_s": output.metrics.ttft_s,
            "density": output.metrics.density,
            "recall": output.metrics.recall,
        }
        for (number, one), output, log_probability in zip(asked.items(), outputs, found, strict=True)
    ]


def log_probabilities(llm: LLM, prompts: Sequence[Sequence[int]], questions: Sequence[Question]) -> list[float | None]:
    """Natural logarithm of the probability with which the model goes on with a space and the answer after each prompt, were its tokens drawn at
    temperature 1; None where several answers are right, in whatever order."""
    asked = [number for number, question in enumerate(questions) if len(question.answers) == 1]
    sums = dict.fromkeys(asked, 0.0)

    def add(number: int, event: Event) -> None:
        if isinstance(event, TokenDelta):
            sums[asked[number]] += sum(token.logprob for token in event.logprobs)

    # The grammar leaves one text, of which the logarithms know nothing: they are of the model's own distribution.
    samplings = [
        SamplingParams(
            temperature=0.0, max_tokens=MAX_NEW_TOKENS[question.task], logprobs=0, grammar=f"start: {literal(' ' + question.answers[0])}"
        )
        for question in (questions[number] for number in asked)
    ]
    outputs = llm.generate_many([prompts[number] for number in asked], samplings, on_event=add)
    assert all(output.finish_reason == "stop" for output in outputs), "an answer has more tokens than there is room for"
    return [sums.get(number) for number in range(len(questions))]


def summarise(answers: Sequence[Row], dense: Sequence[Row] | None) -> Row:
    """answers: of one length and policy, by question; dense: the same questions, or None where dense was not asked. SCORED is in points of 100,
    of probabilities over those questions that have one on both sides; None where there is nothing to compare."""

    def paired(mine: Sequence[float], others: Sequence[float] = ()) -> tuple[float | None, float | None, float | None]:
        differences = [100 * (one - other) for one, other in zip(mine, others, strict=True)] if others else []
        error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
        return 100 * statistics.fmean(mine) if mine else None, statistics.fmean(differences) if differences else None, error

    rows = (answers,) if dense is None else (answers, dense)
    points = [[row["score"] for row in each] for each in rows]
    both = [number for number, pair in enumerate(zip(*rows, strict=True)) if all(row["log_probability"] is not None for row in pair)]
    probabilities = [[math.exp(each[number]["log_probability"]) for number in both] for each in rows]
    found = dict(zip(SCORED, (*paired(*points), *paired(*probabilities)), strict=True))
    return {"n": len(answers), **found, "scores": points[0], "log_probabilities": [row["log_probability"] for row in answers]}


def answers_of(record: Mapping[str, Any], length: int) -> dict[str, list[Row]]:
    """Of a finished record, by task: every question's answer as ``summarise`` takes them. Records of before ROW_VERSION 2 have no probabilities."""
    found = {}
    for row in record["rows"]:
        if row["length"] == length:
            logs = row.get("log_probabilities", [None] * row["n"])
            found[row["task"]] = [{"score": score, "log_probability": log} for score, log in zip(row["scores"], logs, strict=True)]
    return found


def compare(record: Mapping[str, Any], dense: Mapping[str, Any], length: int) -> Row:
    """``summarise`` of all tasks together. record: of the same questions as ``dense``, or of its first context alone, as many of each task.

    Raises ValueError for a record of other questions."""
    mine, others = answers_of(record, length), answers_of(dense, length)
    for task, rows in mine.items():
        there = len(others.get(task, ()))
        if not (len(rows) == there or len(rows) == MOST_FACTS < there):
            raise ValueError(f"The record has {len(rows)} questions of {task}, that of dense attention {there}.")
    return summarise([row for rows in mine.values() for row in rows], [row for task, rows in mine.items() for row in others[task][: len(rows)]])


def config_of(config: EngineConfig, policy: str) -> EngineConfig:
    """``policy``: the name of an attention policy, or adaptive:preset. Raises ConfigurationError for a name that is none."""
    name, _, preset = policy.partition(":")
    if preset and name != "adaptive":
        raise ConfigurationError(f"Only adaptive attention has presets, not {name!r}.", param="attention")
    return EngineConfig.from_dict({**config.to_dict(), "attention": name, **({"preset": preset} if preset else {})})


def run(
    *,
    model: str,
    lengths: Sequence[int],
    tasks: Sequence[str],
    policies: Sequence[str],
    num_questions: int,
    text: str,
    seed: int = 0,
    config: EngineConfig,
    output: Path | None = None,
) -> dict[str, Any]:
    """Ask every policy everything, print the report, return the record. Raises ConfigurationError for what cannot be asked."""
    if not lengths or min(lengths) < 1 or num_questions < len(tasks) or not tasks or not policies:
        raise ConfigurationError("lengths, tasks and policies must not be empty, and each task needs a question.", param="questions")
    if seed < 0:
        raise ConfigurationError(f"A seed is 0 or more, not {seed}.", param="seed")
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown:
        raise ConfigurationError(f"There is no retrieval task {unknown[0]!r}; known are {', '.join(TASKS)}.", param="tasks")
    configs = {policy: config_of(config, policy) for policy in policies}
    settings = {"lengths": sorted(set(lengths)), "tasks": list(tasks), "questions": num_questions, "text": text, "seed": seed}
    asked = {**settings, "generator_version": GENERATOR_VERSION}
    experiment = Experiment("eval", "retrieval", settings={**asked, "policies": list(policies)}, output=output)
    made: dict[int, list[Asked]] = {}
    answers: dict[str, dict[int, list[Row]]] = {}  # by policy and length
    presets: dict[str, str | None] = {}
    for policy, policy_config in configs.items():
        llm = LLM(model, config=policy_config)
        made = made or questions_of(llm.engine, lengths, tasks, num_questions=num_questions, text=text, seed=seed)
        presets[policy] = preset_of(llm.engine)
        facts = engine_facts(llm.engine)
        experiment.settings[policy] = facts
        key = {"eval": "retrieval", "row_version": ROW_VERSION, **asked, **facts}
        path = output.with_name(f"{output.name}.{policy.replace(':', '_')}.rows.jsonl") if output else None
        with Journal(path, key, Item._fields, commit=experiment.git["commit"] if experiment.git else None) as journal:
            answers[policy] = {length: _answers(experiment, llm, policy, length, asked, journal) for length, asked in made.items()}
        llm.engine.close()
    rows = []
    for length, task, policy in itertools.product(made, tasks, policies):
        mine, dense = ([row for row in answers[name][length] if row["task"] == task] if name in answers else None for name in (policy, "dense"))
        assert mine is not None
        by_context = itertools.groupby(answers[policy][length], key=lambda row: row["context"])
        cold = [max(rows, key=lambda row: row["prompt_tokens"] - row["cached_tokens"]) for _, rows in by_context]  # those that read a context
        head = {"task": task, "length": length, "attention": configs[policy].attention, "preset": presets[policy]}
        read = {"read_s": statistics.median(row["ttft_s"] for row in cold)}
        for name in ("density", "recall"):
            read[name] = statistics.fmean(row[name] for row in cold) if all(row[name] is not None for row in cold) else None
        rows.append({**head, **summarise(mine, dense if policy != "dense" else None), **read})
    return experiment.finish(rows, columns=COLUMNS, note="Points of 100; versus_dense: mean of paired differences.")


def _answers(experiment: Experiment, llm: LLM, policy: str, length: int, asked: Sequence[Asked], journal: Journal) -> list[Row]:
    began = time.perf_counter()
    for _, of_context in itertools.groupby(enumerate(asked), key=lambda numbered: numbered[1].context):
        missing = [(number, one) for number, one in of_context if journal.get(Item(length, number)) is None]
        if not missing:
            continue
        # The first one alone: it reads the context, and its time is what that took.
        for part in (missing[:1], *(missing[at : at + TOGETHER] for at in range(1, len(missing), TOGETHER))):
            for row in ask(llm, length, dict(part)):
                journal.add(row)
    rows = [row for number in range(len(asked)) if (row := journal.get(Item(length, number))) is not None]
    mean = 100 * statistics.fmean(row["score"] for row in rows)
    experiment.log(f"{policy}: {length} tokens, {len(rows)} questions: {mean:.1f} points, {time.perf_counter() - began:.0f} s")
    return rows
