"""Passkey prompts of an exact length: the form used in the Qwen2.5-1M report (arXiv 2501.15383), after Mohtashami and Jaggi (2305.16300).

    instruction, noise units, the sentence with the key, noise units, question

The length is that of the whole prompt in tokens, chat template included, as near below the wanted length as a whole number of noise units
allows. Each prompt depends only on (length, depth, seed), so a grid can be cut, ordered and resumed at will.
"""

from __future__ import annotations

import bisect
import random
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from zen_turbo.errors import InvalidRequestError

GENERATOR_VERSION = 1
KEY_DIGITS = 5

INSTRUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n\n"
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key.\n"
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
QUESTION = "\nWhat is the pass key?"

# Noise tokenises alike everywhere except next to something else; this many units shield the middle from its ends.
_SHIELD_UNITS = 2

Encode = Callable[[str], list[int]]


class PasskeyPrompt(NamedTuple):
    """``needle_position``: index of the token in which the key first occurs. ``units_before`` of ``num_units`` noise units precede it."""

    token_ids: list[int]
    key: str
    num_units: int
    units_before: int
    needle_position: int


def make_key(length: int, depth: float, seed: int) -> str:
    """Five digits, the first not 0 (models drop leading zeros of numbers, which would not be a failure to find them)."""
    # A string seeds Random the same way on every platform and version; :g makes 50 and 50.0 one depth.
    return str(random.Random(f"passkey {GENERATOR_VERSION} {length} {depth:g} {seed}").randrange(10 ** (KEY_DIGITS - 1), 10**KEY_DIGITS))


def prompt_text(key: str, units_before: int, units_after: int) -> str:
    return f"{INSTRUCTION}{NOISE * units_before}{NEEDLE.format(key=key)}{NOISE * units_after}{QUESTION}"


def split_units(num_units: int, depth: float) -> tuple[int, int]:
    """Noise units before and after the key; depth in percent."""
    before = round(num_units * depth / 100)
    return before, num_units - before


class _Sizer:
    """Token counts of prompts with one key: counted for short prompts, computed for long ones, each at most once."""

    def __init__(self, encode: Encode, key: str) -> None:
        self._encode = encode
        self._key = key
        self._counted: dict[tuple[int, int], int] = {}
        self.unit_tokens = self.counted(0, _SHIELD_UNITS + 1) - self.counted(0, _SHIELD_UNITS)

    def counted(self, before: int, after: int) -> int:
        if (before, after) not in self._counted:
            self._counted[before, after] = len(self.encoded(before, after))
        return self._counted[before, after]

    def encoded(self, before: int, after: int) -> list[int]:
        return self._encode(prompt_text(self._key, before, after))

    def computed(self, before: int, after: int) -> int:
        short = min(before, _SHIELD_UNITS), min(after, _SHIELD_UNITS)
        return self.counted(*short) + (before + after - sum(short)) * self.unit_tokens


def make_prompt(
    encode: Encode, decode: Callable[[Sequence[int]], str], *, length: int, depth: float, seed: int, key: str | None = None
) -> PasskeyPrompt:
    """Build the prompt of one cell. encode: user message -> token ids of the whole prompt, chat template included.

    The number of units comes from a binary search over computed counts, then the prompt is tokenised once and its length compared with the
    computed one; only where a tokenizer's counts are not linear in the units is the search repeated with real counts. Raises
    InvalidRequestError if not even one noise unit fits.
    """
    key = make_key(length, depth, seed) if key is None else key
    sizer = _Sizer(encode, key)
    upper = length // max(1, sizer.unit_tokens) + 1
    num_units = _largest(upper, length, lambda units: sizer.computed(*split_units(units, depth)))
    token_ids = sizer.encoded(*split_units(num_units, depth))
    if len(token_ids) != sizer.computed(*split_units(num_units, depth)):
        upper = num_units + 1
        while sizer.counted(*split_units(upper, depth)) <= length:
            upper *= 2
        num_units = _largest(upper, length, lambda units: sizer.counted(*split_units(units, depth)))
        token_ids = sizer.encoded(*split_units(num_units, depth))
    if num_units < 1 or len(token_ids) > length:
        shortest = sizer.counted(*split_units(1, depth))
        raise InvalidRequestError(f"A passkey prompt of this model has at least {shortest} tokens, {length} are wanted.", param="lengths")
    return PasskeyPrompt(token_ids, key, num_units, split_units(num_units, depth)[0], _find(token_ids, decode, key))


def _largest(upper: int, length: int, count: Callable[[int], int]) -> int:
    """The most units in [0, upper] whose prompt has at most ``length`` tokens; 0 if none has."""
    return max(0, bisect.bisect_right(range(upper + 1), length, key=count) - 1)


def _find(token_ids: Sequence[int], decode: Callable[[Sequence[int]], str], key: str) -> int:
    """Index of the token in which ``key`` begins. Only tokens with a digit are looked at: noise has none."""
    with_digit = {token for token in set(token_ids) if re.search(r"\d", decode([token]))}
    for index, token in enumerate(token_ids):
        if token in with_digit and decode(token_ids[index : index + KEY_DIGITS + 1]).lstrip().startswith(key):
            return index
    raise AssertionError("the key is not in its own prompt")


def is_correct(answer: str, key: str) -> bool:
    """The first run of digits is the key."""
    found = re.search(r"\d+", answer)
    return found is not None and found[0] == key
