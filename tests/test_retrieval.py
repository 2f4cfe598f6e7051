"""Retrieval contexts and scores, without a model."""

from __future__ import annotations

import re

import pytest

from zen_turbo.errors import ConfigurationError
from zen_turbo.evals import retrieval
from zen_turbo.evals.retrieval_prompt import TASKS, Context, Question, make_context, score

LINES = [f"line {number} of a text that says nothing" for number in range(3000)]


def count(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))


def make(*tasks: str, length: int = 4000, num_questions: int = 6) -> Context:
    return make_context(dict.fromkeys(tasks, num_questions), length=length, lines=LINES, count=count, max_new_tokens=16)


@pytest.mark.parametrize("tasks", [*[(task,) for task in TASKS], TASKS], ids="+".join)
def test_a_context_fills_its_length_and_holds_every_answer_once(tasks: tuple[str, ...]) -> None:
    context = make(*tasks)
    assert 0.9 * 4000 < count(context.text) <= 4000 - 96 - 16
    assert [question.task for question in context.questions] == [task for task in tasks for _ in range(6)]
    assert len({question.text for question in context.questions}) == 6 * len(tasks)
    for question in context.questions:
        assert len(question.answers) == (4 if question.task == "multivalue" else 1)
        assert all(context.text.count(answer) == 1 for answer in question.answers)
    assert make(*tasks) == context, "it depends on tasks, length and text alone"
    assert make(*tasks, num_questions=3).text == context.text


def test_needles_are_spread_and_look_alike() -> None:
    context = make("multikey")
    places = [place for place, line in enumerate(context.text.splitlines()) if line.startswith("The access code of the ")]
    total = len(context.text.splitlines())
    assert len(places) == (4000 - 96 - 16) // 40
    assert min(places) < 0.2 * total and max(places) > 0.8 * total
    asked = re.search(r"of the ([a-z]+ [a-z]+)\?", context.questions[0].text)
    assert asked is not None and f"of the {asked[1]} is {context.questions[0].answers[0]}." in context.text


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
    assert score(answer, Question("kv", "", ("12", "34"))) == points


def test_what_cannot_be_asked_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="only 97 facts"):
        make("multikey", num_questions=98)
    with pytest.raises(ConfigurationError, match="no retrieval task"):
        make("riddle")
    with pytest.raises(ConfigurationError, match="facts alone"):
        make("multikey", length=115, num_questions=1)


def test_differences_are_paired() -> None:
    def rows(scores: list[float]) -> list[dict[str, object]]:
        return [
            {"score": value, "prompt_tokens": 100, "cached_tokens": 90 * (number > 0), "density": 0.5, "recall": 0.9, "ttft_s": 1.0}
            for number, value in enumerate(scores)
        ]

    found = retrieval.summarise(rows([1, 0, 1, 0]), rows([1, 1, 1, 0]))
    assert (found["n"], found["score"], found["versus_dense"]) == (4, 50, -25)
    assert found["standard_error"] == pytest.approx(25)
    assert retrieval.summarise(rows([1, 0]), None)["versus_dense"] is None
