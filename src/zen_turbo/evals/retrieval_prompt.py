"""Contexts in which facts look alike, and questions about each: harder than a passkey, because every needle is a distractor of every other.

    multikey     "The access code of the {adjective} {noun} is {7 digits}.", one for each name; one is asked (RULER, 2404.06654)
    multivalue   four codes for one name, scattered; all four are asked, the score is the share found (RULER)
    kv           "The value of the key {UUID} is {UUID}."; the value of one key is asked (RULER; Lost in the Middle, 2307.03172)

The sentences of all tasks lie between lines of one real text, so one context serves all of its questions, and an engine that keeps pages reads it
once. How many there are does not depend on the length: with hundreds of them a small model finds next to nothing, densely or not, and a
comparison says nothing. Lengths are of the whole prompt in tokens, chat template included, at most and as near as a whole number of lines allows.
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

GENERATOR_VERSION = 5
TASKS = ("multikey", "multivalue", "kv")
VALUES_PER_NAME = 4
_QUESTION_TOKENS = 96  # room for the question when the context is sized
_ASK = {
    "multikey": "What is the access code of the {}?",
    "multivalue": "What are the {1} access codes of the {0}?",
    "kv": "What is the value of the key {}?",
}
_BEGIN = {
    "multikey": "The access code of the {} is",
    "multivalue": "The {1} access codes of the {0} are",
    "kv": "The value of the key {} is",
}
_SAY = {"multikey": "The access code of the {} is {}.", "multivalue": "The access code of the {} is {}.", "kv": "The value of the key {} is {}."}

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
    """text: what follows the context. begin: the words that the answer is made to begin with, as in RULER, because it is the model's search that is
    tested and not its manners. answers: strings that a right answer contains, each counted on its own."""

    task: str
    text: str
    begin: str
    answers: tuple[str, ...]


class Context(NamedTuple):
    text: str
    questions: list[Question]  # task by task


def score(answer: str, question: Question) -> float:
    """Share of the expected strings that stand in the answer as whole words."""
    return sum(re.search(rf"(?<![\w-]){re.escape(text)}(?![\w-])", answer) is not None for text in question.answers) / len(question.answers)


def names(count: int, generator: random.Random) -> list[str]:
    """Different two-word names, in random order."""
    every = [f"{adjective} {noun}" for adjective, noun in itertools.product(_ADJECTIVES, _NOUNS)]
    return generator.sample(every, count)


def make_context(
    questions: Mapping[str, int], *, length: int, lines: Sequence[str], count: Callable[[str], int], max_new_tokens: int, seed: int = 0
) -> Context:
    """Build one context for the tasks of ``questions``, which says how many facts of each there are; every one is asked.

    lines: real text to hide in, enough for ``length`` tokens. count: tokens of a whole prompt with this context and no question, chat template
    included. seed: another one gives other facts in other places. Raises ConfigurationError for an unknown task, or facts that do not fit.
    """
    for task in questions:
        if task not in TASKS:
            raise ConfigurationError(f"There is no retrieval task {task!r}; known are {', '.join(TASKS)}.", param="tasks")
    room = length - _QUESTION_TOKENS - max_new_tokens
    generator = random.Random(f"retrieval {GENERATOR_VERSION} {sorted(questions.items())} {room} {seed}")
    coded = {task: number for task, number in questions.items() if task != "kv"}
    every = names(sum(coded.values()), generator)
    codes = iter(generator.sample(range(10**6, 10**7), sum(coded.values()) * VALUES_PER_NAME))

    def uuids(number: int) -> list[str]:
        return [str(uuid.UUID(int=generator.getrandbits(128), version=4)) for _ in range(number)]

    facts = {}
    for task, number in questions.items():
        if task == "kv":
            facts[task] = {key: (value,) for key, value in zip(uuids(number), uuids(number), strict=True)}
        else:
            per_name = VALUES_PER_NAME if task == "multivalue" else 1
            facts[task] = {every.pop(): tuple(str(next(codes)) for _ in range(per_name)) for _ in range(number)}
    needles: list[tuple[float, str]] = []  # how deep, and what; those of each task at all depths
    for task, of_task in facts.items():
        said = [_SAY[task].format(name, value) for name, found in of_task.items() for value in found]
        generator.shuffle(said)
        needles += [((number + generator.random()) / len(said), sentence) for number, sentence in enumerate(said)]
    needles.sort()

    def text_with(num_lines: int) -> str:
        parts: list[str] = []
        done = 0
        for place, needle in needles:
            at = int(place * num_lines)
            parts += [*lines[done:at], needle]
            done = at
        return "\n".join([*parts, *lines[done:num_lines]])

    num_lines = bisect.bisect_right(range(len(lines) + 1), room, key=lambda number: count(text_with(number))) - 1
    if num_lines < 1:
        raise ConfigurationError(f"The {len(needles)} facts alone have more than {room} tokens.", param="questions")
    asked = [
        Question(task, _ASK[task].format(name, VALUES_PER_NAME), _BEGIN[task].format(name, VALUES_PER_NAME), values)
        for task, of_task in facts.items()
        for name, values in of_task.items()
    ]
    return Context(text_with(num_lines), asked)
