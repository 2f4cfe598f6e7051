"""Contexts in which facts look alike, and many questions about each: harder than a passkey, because every needle is a distractor of every other.

    multikey     "The access code of the {adjective} {noun} is {7 digits}." hundreds of times, different names; one is asked (RULER, 2404.06654)
    multivalue   four codes for one name, scattered; all four are asked, the score is the share found (RULER)
    kv           a JSON object of UUID pairs from the first brace to the last; the value of one key is asked (Lost in the Middle, 2307.03172)

multikey and multivalue hide their sentences between lines of a real text. A context depends on (task, length, text) only and is the same for
all its questions, so that an engine which keeps pages reads it once. Lengths are of the whole prompt in tokens, chat template included, at
most and as near as a whole number of lines allows.
"""

from __future__ import annotations

import bisect
import itertools
import random
import re
import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple

from zen_turbo.errors import ConfigurationError

GENERATOR_VERSION = 1
TASKS = ("multikey", "multivalue", "kv")
VALUES_PER_NAME = 4
# One needle per so many tokens of context.
_TOKENS_PER_NEEDLE = 160
_QUESTION_TOKENS = 96  # room for the question when the context is sized

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

    text: str
    answers: tuple[str, ...]


class Context(NamedTuple):
    task: str
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
    task: str, *, length: int, num_questions: int, lines: Sequence[str], count: Callable[[str], int], max_new_tokens: int
) -> Context:
    """Build one context and its questions.

    lines: real text to hide in, enough for ``length`` tokens (not used by kv). count: tokens of a whole prompt with this context and no
    question, chat template included. Raises ConfigurationError for an unknown task or more questions than the context has facts.
    """
    room = length - _QUESTION_TOKENS - max_new_tokens
    generator = random.Random(f"retrieval {GENERATOR_VERSION} {task} {length}")
    if task == "kv":
        return _kv(length, num_questions, count, room, generator)
    if task not in TASKS:
        raise ConfigurationError(f"There is no retrieval task {task!r}; known are {', '.join(TASKS)}.", param="tasks")
    per_name = VALUES_PER_NAME if task == "multivalue" else 1
    num_names = max(1, length // _TOKENS_PER_NEEDLE // per_name)
    facts = {name: tuple(str(value) for value in generator.sample(range(10**6, 10**7), per_name)) for name in names(num_names, generator)}
    needles = [(name, value) for name, values in facts.items() for value in values]
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
        raise ConfigurationError(f"A {task} context has more than {length} tokens of facts alone.", param="lengths")
    asked = _spread(list(facts), num_questions, task, length)
    if task == "multikey":
        questions = [Question(f"What is the access code of the {name}? Answer with the number only.", facts[name]) for name in asked]
    else:
        questions = [
            Question(f"The text gives {per_name} access codes of the {name}. List all {per_name} numbers.", facts[name]) for name in asked
        ]
    return Context(task, text_with(num_lines), questions)


def _kv(length: int, num_questions: int, count: Callable[[str], int], room: int, generator: random.Random) -> Context:
    def fresh() -> str:
        return str(uuid.UUID(int=generator.getrandbits(128), version=4))

    pairs = [(fresh(), fresh()) for _ in range(length // 16)]  # more than any tokenizer fits

    def text_with(number: int) -> str:
        return "JSON data:\n{" + ",\n".join(f'"{key}": "{value}"' for key, value in pairs[:number]) + "}"

    number = bisect.bisect_right(range(len(pairs) + 1), room, key=lambda some: count(text_with(some))) - 1
    values = dict(pairs[: max(number, 0)])
    asked = _spread(list(values), num_questions, "kv", length)
    ask = 'What is the value of the key "{}" in the JSON object above? Answer with the value only.'
    return Context("kv", text_with(number), [Question(ask.format(key), (values[key],)) for key in asked])


def _spread(keys: list[str], count: int, task: str, length: int) -> list[str]:
    """``count`` keys, evenly spread over the list."""
    if count > len(keys):
        raise ConfigurationError(
            f"{count} questions are wanted, a {task} context of {length} tokens has only {len(keys)} facts.", param="questions"
        )
    return [keys[index * len(keys) // count] for index in range(count)]
