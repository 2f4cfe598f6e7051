"""Structured output: grammars that an answer must follow, on the ``llguidance`` library.

A grammar is a text in llguidance's Lark dialect; the functions here write the parts from which callers put one together (a JSON schema, a
regular expression, a choice). ``Guidance`` belongs to an engine and knows its vocabulary; a ``Matcher`` belongs to a request and says before
each token which ones may come. Nothing is fetched: a ``$ref`` to another document is an error.

JSON may have white space between its parts, but a bounded run of it: a small model that likes line ends would otherwise never stop. Nor would one
that has begun to repeat a digit: integers have 64 bits at most, numbers between two bounds nine decimals, and times and durations a length.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from typing import Any

import llguidance
import numpy as np
import torch

from zen_turbo.errors import InvalidRequestError, UnsupportedParameterError
from zen_turbo.text.tokenizer import Tokenizer

_WHITE_SPACE = r"( |\r?\n[ \t]{0,20})?"
# About 1 to 2 KB for each state of the lexer, of each request: 100 MB at most, where the library's own limit would allow 500.
_MAX_LEXER_STATES = 50_000
_MAX_COMPILED = 16
_MAX_MESSAGE_CHARACTERS = 500
_MAX_INTEGER = 2**63 - 1024  # the largest that the library, which has bounds as float64, takes for an int64
_DECIMALS = 9  # the library counts multiples in 32 bits
_LONGEST = {"time": 24, "date-time": 35, "duration": 32}  # with nine decimals of a second and the difference to UTC
_NAMED_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions")
_SCHEMAS = ("items", "prefixItems", "additionalProperties", "anyOf", "oneOf", "allOf")
_LOWER, _UPPER = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")


def json_schema(schema: Any, *, strict: bool = True) -> str:
    """JSON text that is valid for ``schema``, as part of a rule. ``strict``: a keyword that is not supported is an error, else it is ignored.

    Raises InvalidRequestError if it is no schema at all; what is wrong inside it is found by ``Guidance.matcher``.
    """
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    if not isinstance(schema, dict):
        raise InvalidRequestError(f"A JSON schema is an object, not {type(schema).__name__}.")
    options = {"whitespace_pattern": _WHITE_SPACE, "lenient": not strict}
    # Two multiples that meet, in allOf or beside a $ref, overflow the library's count without a word.
    schema = _bounded(schema, decimals='"multipleOf"' not in json.dumps(schema))
    return "%json " + json.dumps({**schema, "x-guidance": options})


def _bounded(schema: Any, *, decimals: bool) -> Any:
    """A narrower schema, in which numbers and times end. Numbers without bounds may need an exponent, which multiples exclude: they stay."""
    if isinstance(schema, list):
        return [_bounded(each, decimals=decimals) for each in schema]
    if not isinstance(schema, dict):
        return schema
    result = dict(schema)
    for name, value in schema.items():
        if name in _NAMED_SCHEMAS and isinstance(value, dict):
            result[name] = {key: _bounded(each, decimals=decimals) for key, each in value.items()}
        elif name in _SCHEMAS:
            result[name] = _bounded(value, decimals=decimals)
    if not schema.keys() & {"minLength", "maxLength"} and schema.get("format") in tuple(_LONGEST):
        result["maxLength"] = _LONGEST[schema["format"]]
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    bounds = [schema[name] for name in (*_LOWER, *_UPPER) if name in schema]
    if "enum" in schema or "const" in schema or not all(isinstance(bound, int | float) and abs(bound) < _MAX_INTEGER for bound in bounds):
        return result
    if "number" in kinds:
        closed = any(name in schema for name in _LOWER) and any(name in schema for name in _UPPER)
        if decimals and closed and all(bound == round(bound, _DECIMALS) for bound in bounds):
            result["multipleOf"] = 10.0**-_DECIMALS
    elif "integer" in kinds:
        for names, bound in ((_LOWER, -_MAX_INTEGER), (_UPPER, _MAX_INTEGER)):
            if not any(name in schema for name in names):
                result[names[0]] = bound
    return result


def json_object() -> str:
    """Any JSON object."""
    return json_schema({"type": "object"})


def literal(text: str) -> str:
    """Exactly this text."""
    return json.dumps(text, ensure_ascii=False) if text else '""'


def choice(texts: Sequence[str]) -> str:
    """One of these texts."""
    return "(" + " | ".join(literal(text) for text in texts) + ")"


def regex(pattern: str) -> str:
    """Text that matches the whole of ``pattern`` (Rust's regular expressions)."""
    return f"/{llguidance.regex_to_lark(pattern, use_ascii='')}/"


class Matcher:
    """Where one answer stands in its grammar."""

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> torch.Tensor:
        """Which tokens may come next, bool [vocab_size]; at least one. Raises InvalidRequestError where the grammar cannot go on."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        mask = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
        if not mask.any():
            raise InvalidRequestError("The grammar of the structured output leads to a point where no token is allowed.", param="grammar")
        return torch.from_numpy(mask).bool()

    def consume(self, token_id: int) -> None:
        self._matcher.consume_token(token_id)
        self._check()

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing can follow."""
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise _refusal(self._matcher.get_error())


class Guidance:
    """Grammars over one vocabulary. Its tree of token texts is built when the first grammar comes (up to a second); a grammar is compiled when
    it comes first, which may take as long, and the latest are kept. May be used from any thread."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._limits = llguidance.LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._compiled: OrderedDict[str, llguidance.LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def matcher(self, grammar: str) -> Matcher:
        """A matcher at the beginning of ``grammar`` (a Lark text with a rule ``start``). Raises InvalidRequestError that says what is wrong
        with it, and UnsupportedParameterError for a model without end token."""
        with self._lock:
            matcher = self._compiled.get(grammar)
        if matcher is None:
            matcher = llguidance.LLMatcher(self._built(), grammar, log_level=0, limits=self._limits)
            if matcher.is_error():
                raise _refusal(matcher.get_error())
        with self._lock:
            self._compiled[grammar] = matcher
            self._compiled.move_to_end(grammar)
            if len(self._compiled) > _MAX_COMPILED:
                self._compiled.popitem(last=False)
        return Matcher(matcher.deep_copy(), self._vocab_size)

    def _built(self) -> llguidance.LLTokenizer:
        with self._lock:
            if not self._eos_token_ids:
                raise UnsupportedParameterError("Structured output needs an end token, and this checkpoint names none.", param="grammar")
            if self._vocabulary is None:
                vocabulary = llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer, self._vocab_size, self._eos_token_ids))
                self._vocabulary = llguidance.LLTokenizer(vocabulary, n_vocab=self._vocab_size, eos_token=self._eos_token_ids)
            return self._vocabulary


class _Vocabulary:
    """What llguidance wants to know of a tokenizer: the bytes of every token. A special token's text follows a byte that no text has, so that
    a grammar's text cannot call for it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self.bos_token_id = tokenizer.bos_token_id
        self.eos_token_id = eos_token_ids[0]
        special = set(tokenizer.special_tokens.values())
        self.special_token_ids = sorted(token for token in special if token < vocab_size)
        self.tokens = [
            (b"\xff" if token in special else b"") + tokenizer.token_bytes(token, skip_special_tokens=False) for token in range(vocab_size)
        ]

    def __call__(self, text: bytes | str) -> list[int]:
        """Where a grammar forces a text, the tokens that the model would use for it are forced."""
        return self._tokenizer.encode_continuation(text if isinstance(text, str) else text.decode("utf-8", "replace"))


def _refusal(message: str) -> InvalidRequestError:
    # The first line names the fault; what follows repeats the grammar, which may be long.
    first = message.strip().splitlines()[0][:_MAX_MESSAGE_CHARACTERS] if message.strip() else "it cannot be followed"
    return InvalidRequestError(f"The structured output cannot be followed: {first}.", param="grammar")
