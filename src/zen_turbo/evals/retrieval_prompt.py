"""Contexts in which facts look alike, and many questions about each: harder than a passkey, because every needle is a distractor of every other.

    multikey     "The access code of the {adjective} {noun} is {7 digits}." hundreds of times, different names; one is asked (RULER, 2404.06654)
    multivalue   four codes for one name, scattered; all four are asked, the score is the share found (RULER)
    kv           a JSON object of UUID pairs from the first brace to the last; the value of one key is asked (Lost in the Middle, 2307.03172)

multikey and multivalue hide their sentences between lines of a real text, which comes first; the JSON object follows it, each half of the
context where both are wanted. So one context serves all tasks, depends on (tasks, length, text) only and is the same for all its questions:
an engine that keeps pages reads it once. Lengths are of the whole prompt in tokens, chat template included, at most and as near as a whole
number of lines allows.
"""

from __future__ import annotations

import bisect
import itertools
import random
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from zen_turbo.errors import ConfigurationError

GENERATOR_VERSION = 2
TASKS = ("multikey", "multivalue", "kv")
VALUES_PER_NAME = 4
# One needle per so many tokens of context.
_TOKENS_PER_NEEDLE = 40
_QUESTION_TOKENS = 96  # room for the question when the context is sized
_ASK = {
    "multikey": "What is the access code of the {}? Answer with the number only.",
    "multivalue": "The text gives {1} access codes of the {0}. List all {1} numbers.",
    "kv": 'What is the value of the key "{}" in the JSON object above? Answer with the value only.',
}

_ADJECTIVES = (
    "amber ancient autumn bitter blue brave bright broken calm careful clever cold coral crimson curious dapper dark distant dusty eager "
    "early eastern elegant faint fancy fearless feral frosty gentle giant golden grand hidden hollow honest humble icy idle ivory jolly "
    "keen kind lazy lively lonely lucky mellow merry mighty misty modest narrow nimble noble northern odd olive patient plain polite proud "
    "quick quiet rapid rare restless rosy rough royal rusty sandy scarlet secret shy silent silver simple sleepy slow smooth solemn steady "
    "stormy sunny swift tall tender tiny tough vivid warm western wild windy wise young"
).split()
_NOUNS = (
    "anchor arrow badger barrel beacon beaver bridge button cabin candle canyon castle cedar cellar chapel cliff compass copper cottage "
    "cradle crane cricket crystal dagger desert dolphin dragon eagle engine falcon feather ferry fiddle forest fountain fox garden gate "
    "glacier hammer harbor harvest hawk helmet heron island jacket kettle lantern ladder lagoon library lighthouse lizard locket magnet "
    "maple market meadow mirror monkey mountain needle oak ocean orchard otter owl palace parrot pebble pelican pepper piano pilot planet "
    "prairie rabbit raven ribbon river rocket saddle sailor salmon shadow shelter spider statue stone sword temple thunder tiger tower "
    "tunnel turtle valley violin wagon walrus window wolf"
).split()


class Question(NamedTuple):
    """text: what follows the context. answers: strings that a right answer contains, each counted on its own."""

    task: str
    text: str
    answers: tuple[str, ...]


class Context(NamedTuple):
    text: str
    questions: list[Question]  # task by task


class _Part(NamedTuple):
    """A stretch of a context: its text, and the questions of each task that asks about it."""

    text: str
    questions: list[Question]


def score(answer: str, question: Question) -> float:
    """Share of the expected strings that stand in the answer as whole words."""
    return sum(re.search(rf"(?<![\w-]){re.escape(text)}(?![\w-])", answer) is not None for text in question.answers) / len(question.answers)


def names(count: int, generator: random.Random) -> list[str]:
    """Different two-word names, in random order."""
    every = [f"{adjective} {noun}" for adjective, noun in itertools.product(_ADJECTIVES, _NOUNS)]
    return generator.sample(every, count)


def make_context(
    questions: Mapping[str, int], *, length: int, lines: Sequence[str], count: Callable[[str], int], max_new_tokens: int
) -> Context:
    """Build one context for the tasks of ``questions``, which says how many of each to ask.

    lines: real text to hide in, enough for ``length`` tokens (not used by kv). count: tokens of a whole prompt with this context and no
    question, chat template included. Raises ConfigurationError for an unknown task or more questions than the context has facts.
    """
    for task in questions:
        if task not in TASKS:
            raise ConfigurationError(f"There is no retrieval task {task!r}; known are {', '.join(TASKS)}.", param="tasks")
    room = length - _QUESTION_TOKENS - max_new_tokens
    hidden = {task: number for task, number in questions.items() if task != "kv"}
    parts: list[_Part] = []
    if hidden:
        share = room // 2 if "kv" in questions else room
        parts.append(_text_part(hidden, share, lines, count))
    if "kv" in questions:
        before = "".join(f"{part.text}\n\n" for part in parts)
        parts.append(_kv_part(questions["kv"], room, lambda body: count(before + body)))
    return Context("\n\n".join(part.text for part in parts), [question for part in parts for question in part.questions])


def _text_part(questions: Mapping[str, int], room: int, lines: Sequence[str], count: Callable[[str], int]) -> _Part:
    """Real text of at most ``room`` tokens with the facts of multikey, multivalue or both."""
    generator = random.Random(f"retrieval {GENERATOR_VERSION} {','.join(questions)} {room}")
    per_name = {task: VALUES_PER_NAME if task == "multivalue" else 1 for task in questions}
    num_names = max(1, room // _TOKENS_PER_NEEDLE // sum(per_name.values()))  # of each task
    every = names(num_names * len(questions), generator)
    values = iter(generator.sample(range(10**6, 10**7), num_names * sum(per_name.values())))
    facts = {task: {every.pop(): tuple(str(next(values)) for _ in range(number)) for _ in range(num_names)} for task, number in per_name.items()}
    needles = [(name, value) for of_task in facts.values() for name, found in of_task.items() for value in found]
    generator.shuffle(needles)
    places = sorted(generator.random() for _ in needles)

    def text_with(num_lines: int) -> str:
        parts: list[str] = []
        done = 0
        for place, (name, value) in zip(places, needles, strict=True):
            at = int(place * num_lines)
            parts += lines[done:at]
            parts.append(f"The access code of the {name} is {value}.")
            done = at
        return "\n".join([*parts, *lines[done:num_lines]])

    num_lines = bisect.bisect_right(range(len(lines) + 1), room, key=lambda number: count(text_with(number))) - 1
    if num_lines < 1:
        raise ConfigurationError(f"The facts alone have more than {room} tokens.", param="lengths")
    asked = []
    for task, wanted in questions.items():
        ask = _ASK[task]
        asked += [Question(task, ask.format(name, VALUES_PER_NAME), facts[task][name]) for name in _spread(list(facts[task]), wanted, task)]
    return _Part(text_with(num_lines), asked)


def _kv_part(num_questions: int, room: int, count: Callable[[str], int]) -> _Part:
    generator = random.Random(f"retrieval {GENERATOR_VERSION} kv {room}")

    def fresh() -> str:
        return str(uuid.UUID(int=generator.getrandbits(128), version=4))

    pairs = [(fresh(), fresh()) for _ in range(room // 16)]  # more than any tokenizer fits

    def text_with(number: int) -> str:
        return "JSON data:\n{" + ",\n".join(f'"{key}": "{value}"' for key, value in pairs[:number]) + "}"

    number = bisect.bisect_right(range(len(pairs) + 1), room, key=lambda some: count(text_with(some))) - 1
    values = dict(pairs[: max(number, 0)])
    asked = [Question("kv", _ASK["kv"].format(key), (values[key],)) for key in _spread(list(values), num_questions, "kv")]
    return _Part(text_with(number), asked)


def _spread(keys: list[str], count: int, task: str) -> list[str]:
    """``count`` keys, evenly spread over the list."""
    if count > len(keys):
        raise ConfigurationError(f"{count} {task} questions are wanted, the context has only {len(keys)} facts for them.", param="questions")
    return [keys[index * len(keys) // count] for index in range(count)]
