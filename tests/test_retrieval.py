"""Retrieval contexts and scores, without a model."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from zen_turbo import LLM
from zen_turbo.engine.request import SamplingParams
from zen_turbo.errors import ConfigurationError
from zen_turbo.evals import retrieval
from zen_turbo.evals.retrieval_prompt import TASKS, Context, Question, make_context, score

LINES = [f"line {number} of a text that says nothing" for number in range(3000)]


def count(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))


def make(*tasks: str, length: int = 4000, num_questions: int = 6, seed: int = 0) -> Context:
    return make_context(dict.fromkeys(tasks, num_questions), length=length, lines=LINES, count=count, max_new_tokens=16, seed=seed)


@pytest.mark.parametrize("tasks", [*[(task,) for task in TASKS], TASKS], ids="+".join)
def test_a_context_fills_its_length_and_holds_every_answer_once(tasks: tuple[str, ...]) -> None:
    context = make(*tasks)
    assert 0.9 * 4000 < count(context.text) <= 4000 - 96 - 16
    assert [question.task for question in context.questions] == [task for task in tasks for _ in range(6)]
    assert len({question.text for question in context.questions}) == 6 * len(tasks)
    for question in context.questions:
        assert len(question.answers) == (4 if question.task == "multivalue" else 1)
        assert all(context.text.count(answer) == 1 for answer in question.answers)
    assert make(*tasks) == context, "it depends on tasks, length, text and seed alone"
    assert make(*tasks, seed=1).text != context.text


def test_needles_are_spread_and_look_alike() -> None:
    context = make(*TASKS, num_questions=20)
    lines = context.text.splitlines()
    for task, of_each in (("multikey", 1), ("multivalue", 4), ("kv", 1)):
        beginning = "The value of the key " if task == "kv" else "The access code of the "
        places = [place for place, line in enumerate(lines) if line.startswith(beginning)]
        assert len(places) == (20 if task == "kv" else 20 + 20 * 4)
        assert min(places) < 0.2 * len(lines) and max(places) > 0.8 * len(lines)
        asked = [question for question in context.questions if question.task == task]
        name = re.search(r"of the (?:key )?(.+)\?", asked[0].text)
        assert name is not None and len(asked[0].answers) == of_each
        assert all(f"{beginning}{name[1]} is {answer}." in lines for answer in asked[0].answers)
        assert name[1] in asked[0].begin


@pytest.mark.parametrize(
    ("answer", "points"),
    [
        ("12 and 34", 1.0),
        ("The codes are 34, 12.", 1.0),
        ("12", 0.5),
        ("123 and 345", 0.0),
        ("", 0.0),
    ],
)
def test_scores_count_whole_words(answer: str, points: float) -> None:
    assert score(answer, Question("kv", "", "", ("12", "34"))) == points


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="no retrieval task"):
        make("riddle")
    with pytest.raises(ConfigurationError, match="6 facts alone"):
        make("multikey", length=160)


def test_questions_are_dealt_out_to_as_few_contexts_as_can_be(tiny_folder: Path) -> None:
    engine = LLM(tiny_folder, kv_cache_bytes=16 << 20, max_model_len=8192).engine
    found = retrieval.questions_of(engine, [8000, 6000], ["multikey", "kv"], num_questions=71, text="code")
    assert sorted(found) == [6000, 8000]
    for asked in found.values():
        assert [sum(item.context == number for item in asked) for number in range(3)] == [24, 24, 23]
        assert {task: sum(item.question.task == task for item in asked) for task in ("multikey", "kv")} == {"multikey": 36, "kv": 35}
        assert len({item.text for item in asked}) == 3, "36 of a task are three contexts of 12"
    others = retrieval.questions_of(engine, [6000], ["multikey", "kv"], num_questions=71, text="code", seed=1)[6000]
    assert len(others) == 71 and not {item.question.text for item in others} & {item.question.text for item in found[6000]}
    with pytest.raises(ConfigurationError, match="17001 questions take 1001 contexts; a seed has 1000"):
        retrieval.questions_of(engine, [6000], ["kv"], num_questions=17001, text="code")
    engine.close()


def test_differences_are_paired() -> None:
    def rows(scores: list[float], probabilities: list[float | None]) -> list[dict[str, object]]:
        logs = [None if value is None else math.log(value) for value in probabilities]
        return [{"score": value, "log_probability": log} for value, log in zip(scores, logs, strict=True)]

    mine, dense = rows([1, 0, 1, 0], [0.5, 0.2, 0.75, 0.1]), rows([1, 1, 1, 0], [0.5, 0.4, 0.75, 0.1])
    found = retrieval.summarise(mine, dense)
    assert (found["n"], found["score"], found["versus_dense"]) == (4, 50, -25)
    assert found["standard_error"] == pytest.approx(25)
    assert [found[name] for name in retrieval.SCORED[3:]] == pytest.approx([38.75, -5, 5])
    assert found["log_probabilities"] == [row["log_probability"] for row in mine]
    alone = retrieval.summarise(mine[:2], None)
    assert alone["versus_dense"] is None and alone["probability"] == pytest.approx(35) and alone["probability_versus_dense"] is None
    several = retrieval.summarise(rows([1, 0], [0.5, None]), rows([1, 1], [0.25, None]))
    assert (several["versus_dense"], several["probability"], several["probability_versus_dense"]) == (-50, 50, 25)
    none = retrieval.summarise(rows([1, 0], [None, None]), rows([1, 1], [None, None]))
    assert (none["versus_dense"], none["probability"], none["probability_versus_dense"]) == (-50, None, None)


def test_records_are_compared_by_question() -> None:
    def record(scores: dict[str, list[float]]) -> dict[str, list[dict[str, object]]]:
        answers = {task: [{"score": score, "log_probability": math.log(0.5)} for score in each] for task, each in scores.items()}
        return {"rows": [{"task": task, "length": 4096, **retrieval.summarise(each, None)} for task, each in answers.items()]}

    dense = record({"multikey": [1] * 17 + [0] * 3, "kv": [0] * 20})
    assert retrieval.answers_of(dense, 4096)["kv"] == [{"score": 0, "log_probability": math.log(0.5)}] * 20
    assert retrieval.answers_of(dense, 8192) == {}
    assert retrieval.compare(record({"multikey": [1] * 20, "kv": [0] * 20}), dense, 4096)["versus_dense"] == pytest.approx(100 * 3 / 40)
    first = retrieval.compare(record({"multikey": [0] + [1] * 16, "kv": [0] * 17}), dense, 4096)
    assert first["n"] == 34 and first["versus_dense"] == pytest.approx(-100 / 34), "of the first context alone"
    assert first["probability_versus_dense"] == 0
    for other in ({"multikey": [1] * 16}, {"multivalue": [1] * 20}, {"kv": [1] * 21}):
        with pytest.raises(ValueError, match="questions"):
            retrieval.compare(record(other), dense, 4096)
    del dense["rows"][0]["log_probabilities"]
    assert retrieval.answers_of(dense, 4096)["multikey"][0]["log_probability"] is None, "a record of before they were there"


def test_the_probability_of_the_right_answer_is_that_of_its_tokens(tiny_folder: Path) -> None:
    llm = LLM(tiny_folder, kv_cache_bytes=16 << 20, max_model_len=4096)
    asked = dict(enumerate(retrieval.questions_of(llm.engine, [2000], TASKS, num_questions=6, text="code")[2000]))
    rows = retrieval.ask(llm, 2000, asked)
    assert [row["log_probability"] is None for row in rows] == [row["task"] == "multivalue" for row in rows]
    for number, one in asked.items():
        if rows[number]["log_probability"] is None:
            continue
        prompt = retrieval.prompt_of(llm.engine, one)
        answer = llm.engine.tokenizer.encode_continuation(f" {one.question.answers[0]}")
        whole = llm.generate([*prompt, *answer], SamplingParams(max_tokens=0, prompt_logprobs=0))
        assert whole.prompt_logprobs is not None
        expected = sum(token.logprob for token in whole.prompt_logprobs[-len(answer) :])
        assert rows[number]["log_probability"] == pytest.approx(expected, abs=0.05), "bf16, one by one and all at once"
    llm.engine.close()
