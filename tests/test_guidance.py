"""Structured output: whatever the model would rather say, an answer that ended by itself follows its grammar."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import schemas
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zen_turbo import LLM
from zen_turbo.engine import guidance
from zen_turbo.engine.engine import Engine
from zen_turbo.engine.guidance import Guidance
from zen_turbo.engine.request import Event, Failed, Finished, SamplingParams
from zen_turbo.errors import InvalidRequestError, UnsupportedParameterError
from zen_turbo.text.tokenizer import load_tokenizer
from zen_turbo.text.tokenizer_source import TokenizerSource

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0, "maximum": 150}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, Any] = {
    "object": PERSON,
    "enum": {"enum": ["red", "green", 7, None, True]},
    "const": {"const": {"a": [1, "x"]}},
    "integer": {"type": "integer", "minimum": -20, "maximum": 300},
    "exclusive": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 6},
    "number": {"type": "number", "minimum": 0, "maximum": 1},
    "boolean": {"type": "boolean"},
    "null": {"type": "null"},
    "union of types": {"type": ["integer", "null"], "minimum": 0, "maximum": 9},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "format": {"type": "string", "format": "date"},
    "length": {"type": "string", "minLength": 2, "maxLength": 4},
    "array": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 1, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": "x"}], "items": False, "minItems": 2},
    "nested": {
        "type": "object",
        "properties": {"who": PERSON, "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2}},
        "required": ["who"],
        "additionalProperties": False,
    },
    "optional": {
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"type": "boolean"}, "c": {"type": "null"}},
        "additionalProperties": False,
    },
    "any of": {"anyOf": [{"type": "boolean"}, PERSON, {"type": "string", "enum": ["neither"]}]},
    "all of": {"allOf": [{"type": "integer", "minimum": 5}, {"type": "integer", "maximum": 12}]},
    "reference": {
        "$defs": {"side": {"enum": ["left", "right"]}},
        "type": "object",
        "properties": {"from": {"$ref": "#/$defs/side"}, "to": {"$ref": "#/$defs/side"}},
        "required": ["from", "to"],
        "additionalProperties": False,
    },
    "recursive": {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"v": {"type": "boolean"}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
                "required": ["v", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    },
    "map": {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0, "maximum": 3}, "maxProperties": 2},
}


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Iterator[Engine]:
    engine = LLM(tiny_folder, prefill_chunk_tokens=128, kv_cache_bytes=64 << 20, max_model_len=4096).engine
    yield engine
    engine.close()


def answers(engine: Engine, grammar: str, *, count: int = 1, seed: int = 0, **values: Any) -> list[tuple[str, str]]:
    """(text, finish_reason) of ``count`` answers that are drawn at once."""
    received: list[list[Event]] = [[] for _ in range(count)]
    for number, events in enumerate(received):
        sampling = SamplingParams(**{"seed": seed + number, "max_tokens": 120, "grammar": grammar, **values})
        engine.submit(tiny.tokens(10, seed=seed), sampling, on_event=events.append)
    while engine.step():
        pass
    results = []
    for events in received:
        final = events[-1]
        assert isinstance(final, Finished), final
        results.append((final.output.text, final.output.finish_reason))
    return results


def ends(engine: Engine) -> dict[int, float]:
    """A bias towards what closes things: a random model goes on for long."""
    return {engine.tokenizer.encode(text)[0]: 5.0 for text in ('"', "}", "]")}


def of_schema(schema: Any, **options: Any) -> str:
    return f"start: {guidance.json_schema(schema, **options)}"


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_is_valid_for_its_schema(engine: Engine, name: str) -> None:
    schema = SCHEMAS[name]
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    results = answers(engine, of_schema(schema), count=10, logit_bias=ends(engine))
    ended = [text for text, reason in results if reason == "stop"]
    assert len(ended) >= 3
    for text in ended:
        validator.validate(json.loads(text))


def test_schemas_as_people_write_them_are_accepted(engine: Engine) -> None:
    """The ones that the default model answers in test_real_weights.py."""
    made = schemas.made_up(200)
    used = Counter(word for schema in made for word in set(schemas.keywords(schema)))
    words = "$ref allOf anyOf oneOf const enum format items maxItems maxLength minLength minimum multipleOf pattern patternProperties prefixItems"
    assert all(used[word] >= 10 for word in words.split()), used
    for schema in made:
        jsonschema.Draft202012Validator.check_schema(schema)
        assert engine.guidance.matcher(of_schema(schema)).allowed().any()


_LEAVES = st.sampled_from(
    [
        {"type": "boolean"},
        {"type": "null"},
        {"type": "integer", "minimum": -5, "maximum": 99},
        {"type": "string", "maxLength": 5},
        {"type": "string", "pattern": "^[a-f]{1,3}$"},
        {"enum": ["x", 1.5, None, [1]]},
        {"const": "é 東"},
    ]
)


def _larger(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    names = st.text("abc \"\\\n<é", min_size=1, max_size=4)
    arrays = st.builds(lambda item, most: {"type": "array", "items": item, "maxItems": most}, inner, st.integers(1, 2))
    objects = st.dictionaries(names, inner, min_size=1, max_size=3).flatmap(
        lambda properties: st.builds(
            lambda required: {"type": "object", "properties": properties, "required": required, "additionalProperties": False},
            st.lists(st.sampled_from(sorted(properties)), unique=True),
        )
    )
    unions = st.builds(lambda *branches: {"anyOf": list(branches)}, inner, inner)
    return arrays | objects | unions


@settings(max_examples=20)
@given(schema=st.recursive(_LEAVES, _larger, max_leaves=6), seed=st.integers(0, 9))
def test_answers_to_any_schema_are_valid_or_cut(engine: Engine, schema: dict[str, Any], seed: int) -> None:
    for text, reason in answers(engine, of_schema(schema), count=2, seed=seed, logit_bias=ends(engine)):
        if reason == "stop":
            jsonschema.Draft202012Validator(schema).validate(json.loads(text))
        else:
            assert reason == "length"


def test_greedy_answers_follow_too_and_end_at_once(engine: Engine) -> None:
    ((text, reason),) = answers(engine, of_schema({"const": [1, 2]}), temperature=0.0, max_tokens=60)
    assert (json.loads(text), reason) == ([1, 2], "stop")
    assert text.rstrip() == text, "nothing follows the end"


def test_max_tokens_cut_an_answer(engine: Engine) -> None:
    ((text, reason),) = answers(engine, of_schema(PERSON), max_tokens=3)
    assert reason == "length" and text.startswith("{")


def test_white_space_is_bounded(engine: Engine) -> None:
    """Biased towards nothing but line ends, the model has to go on all the same."""
    newline = engine.tokenizer.encode("\n")[0]
    ((text, reason),) = answers(engine, of_schema({"type": "array", "items": {"enum": [1]}, "maxItems": 2}), logit_bias={newline: 100.0})
    assert reason == "stop" and "\n\n" not in text and json.loads(text) in ([], [1], [1, 1])


@pytest.mark.parametrize(
    ("schema", "digits"),
    [
        ({"type": "integer"}, 19),
        ({"type": ["integer", "null"], "minimum": 5}, 19),
        ({"type": "number", "minimum": -90, "exclusiveMaximum": 90}, 9),
        ({"type": "number", "exclusiveMinimum": 0.25, "maximum": 0.9}, 9),
        ({"$defs": {"n": {"type": "integer"}}, "anyOf": [{"$ref": "#/$defs/n"}, {"type": "number", "minimum": 0, "maximum": 9}]}, 19),
        ({"type": "array", "prefixItems": [{"type": "integer"}], "items": False, "minItems": 1}, 19),
        ({"type": "string", "format": "duration"}, 30),
    ],
)
def test_numbers_end(engine: Engine, schema: dict[str, Any], digits: int) -> None:
    """Biased towards nothing but one digit and the point, the model has to go on all the same."""
    bias = {engine.tokenizer.encode(text)[0]: 100.0 for text in "7."}
    for text, reason in answers(engine, of_schema(schema), count=3, logit_bias=bias, max_tokens=60):
        assert reason == "stop" and max(map(len, re.findall(r"\d+", text))) <= digits
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "number"}, "6.02e23"),
        ({"type": "integer", "minimum": 0}, "9223372036854774784"),
        ({"type": "integer"}, "-9223372036854774784"),
        ({"type": "number", "minimum": 0, "maximum": 1}, "0.123456789"),
        ({"type": "number", "minimum": 0, "maximum": 1e-12}, "0.0000000000005"),
        ({"type": "number", "minimum": 0, "maximum": 100, "allOf": [{"multipleOf": 25}]}, "75"),
        ({"type": "object", "properties": {"type": {"const": "number"}, "maximum": {"type": "integer"}}}, '{"type":"number","maximum":12}'),
        ({"enum": [{"type": "integer"}]}, '{"type":"integer"}'),
        ({"type": "string", "format": "date-time"}, '"2026-11-26T23:59:59.123456789+01:00"'),
        ({"type": "string", "format": "time"}, '"23:59:59.123456789-01:30"'),
        ({"type": "string", "format": "duration"}, '"P1234Y11M30DT23H59M59S"'),
    ],
)
def test_numbers_that_may_be_said(engine: Engine, schema: dict[str, Any], text: str) -> None:
    matcher = engine.guidance.matcher(of_schema(schema))
    for token in engine.tokenizer.encode(text):
        assert matcher.allowed()[token], text
        matcher.consume(token)
    assert matcher.allowed()[engine.tokenizer.special_tokens["<|im_end|>"]]


def test_other_rules(engine: Engine) -> None:
    for rule, pattern in (
        (guidance.regex("[a-c]{3}/x"), r"[abc]{3}/x"),
        (guidance.choice(["yes", 'no "really"', "a\nb"]), r'yes|no "really"|a\nb'),
        (guidance.literal("<tool_call>") + " " + guidance.regex("[0-9]"), r"<tool_call>[0-9]"),
    ):
        for text, reason in answers(engine, f"start: {rule}", count=3):
            assert reason == "stop" and re.fullmatch(pattern, text)
    objects = answers(engine, "start: " + guidance.json_object(), count=6, logit_bias=ends(engine))
    assert [type(json.loads(text)) for text, reason in objects if reason == "stop"][:2] == [dict, dict]


def test_special_tokens_are_no_text(engine: Engine) -> None:
    """The text of one can be written, but only letter by letter; the token itself has to be called for."""
    ((text, _),) = answers(engine, f"start: {guidance.literal('<|im_start|>')}", skip_special_tokens=False)
    ids = engine.tokenizer.encode(text)
    assert text == "<|im_start|>" and len(ids) > 1
    matcher = engine.guidance.matcher("start: /(.|\\n)*/")
    assert matcher.allowed()[[0, 1, 2]].tolist() == [False, False, True], "the end token ends, and <|im_start|> is no text"


def test_an_answer_with_a_schema_beside_a_free_one(engine: Engine) -> None:
    free = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
    alone: list[Event] = []
    engine.submit(tiny.tokens(30), free, on_event=alone.append)
    while engine.step():
        pass
    beside: list[Event] = []
    engine.submit(tiny.tokens(30), free, on_event=beside.append)
    assert answers(engine, of_schema({"type": "boolean"}))[0][0] in ("true", "false")
    assert alone[-1].output.text == beside[-1].output.text  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "wat"}, "wat"),
        ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "uniqueItems"),
        ({"$ref": "#/$defs/nowhere"}, "nowhere"),
        ({"$ref": "http://127.0.0.1:9/schema"}, "http://127.0.0.1:9/schema"),
        ({"$ref": "file:///etc/passwd"}, "file:///etc/passwd"),
        ({"type": "string", "pattern": "("}, "regex"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "minimum"),
        (False, "not"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_before_anything_is_computed(engine: Engine, schema: Any, words: str) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(words)) as caught:
        engine.submit([5], SamplingParams(grammar=of_schema(schema)), on_event=lambda event: None)
    assert caught.value.param == "grammar" and len(caught.value.message) < 700
    assert not engine.has_work()


def test_answers_to_one_grammar_do_not_share_a_place_in_it(engine: Engine) -> None:
    """It is compiled once, and only the latest are kept."""
    grammar = "start: " + guidance.choice(["ab", "ac"])
    first, second = engine.guidance.matcher(grammar), engine.guidance.matcher(grammar)
    before = second.allowed()
    first.consume(engine.tokenizer.encode("a")[0])
    assert torch.equal(before, second.allowed()) and not torch.equal(before, first.allowed())
    for number in range(40):
        engine.guidance.matcher(f'start: "{number}"')
    assert len(engine.guidance._compiled) == 16 and grammar not in engine.guidance._compiled
    assert torch.equal(engine.guidance.matcher(grammar).allowed(), before)


def test_what_is_no_schema(engine: Engine) -> None:
    with pytest.raises(InvalidRequestError, match="list"):
        guidance.json_schema([])
    lenient = of_schema({"type": "array", "items": {"enum": [1]}, "uniqueItems": True, "maxItems": 1}, strict=False)
    assert answers(engine, lenient)[0][1] == "stop"


@pytest.mark.parametrize("pattern", ["(((a{1,1000}){1,1000}){1,1000}){1,1000}", "(a|b|ab)*c(a|b|ab)*d" * 20, "[^x]*x.{500}y" * 5])
def test_expressions_that_explode_end_in_bounded_work(engine: Engine, pattern: str) -> None:
    """Either an answer or an error of the request, and the engine goes on."""
    events: list[Event] = []
    try:
        engine.submit([5], SamplingParams(grammar=f"start: {guidance.regex(pattern)}", max_tokens=20, seed=1), on_event=events.append)
    except InvalidRequestError:
        return
    while engine.step():
        pass
    final = events[-1]
    assert isinstance(final, Finished) or (isinstance(final, Failed) and isinstance(final.error, InvalidRequestError))
    assert answers(engine, of_schema({"type": "null"})) == [("null", "stop")]


def test_a_grammar_that_leads_nowhere_fails_its_request_alone(engine: Engine) -> None:
    events: list[Event] = []
    engine.submit([5], SamplingParams(grammar=of_schema({"anyOf": [{"$ref": "#"}]})), on_event=events.append)
    while engine.step():
        pass
    final = events[-1]
    assert isinstance(final, Failed) and isinstance(final.error, InvalidRequestError)


def test_a_model_without_end_token(engine: Engine) -> None:
    endless = Guidance(engine.tokenizer, vocab_size=320, eos_token_ids=())
    with pytest.raises(UnsupportedParameterError, match="end token"):
        endless.matcher('start: "a"')


def test_a_vocabulary_of_sentence_pieces() -> None:
    """Its tokens mark spaces with a character of their own and have single bytes as <0x..>."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "tr", "ue", "true", "▁true", "é", '"']
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [0.0] * len(pieces),
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 7],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.bos_token_id": 1,
    }
    tokenizer = load_tokenizer(TokenizerSource(kind="gguf", gguf_fields=fields))
    made = Guidance(tokenizer, vocab_size=len(pieces) + 5, eos_token_ids=(2,))  # the model's matrix may be wider

    def allowed(grammar: str, so_far: list[str]) -> set[str]:
        matcher = made.matcher(grammar)
        for piece in so_far:
            matcher.consume(pieces.index(piece))
        return {pieces[token] for token in torch.nonzero(matcher.allowed()).flatten().tolist()}

    assert allowed('start: "true" | "tx"', []) == {"<0x74>", "tr", "true"}
    assert allowed('start: " true" | " "', []) == {"▁", "▁true", "<0x20>"}
    assert allowed('start: "é" | "è"', []) == {"é", "<0xC3>"} and allowed('start: "é" | "è"', ["<0xC3>"]) == {"<0xA9>", "<0xA8>"}
    assert allowed('start: "tr" "ue"?', ["tr"]) == {"ue", "<0x75>", "</s>"}
    # A text that is forced is written as the model would, and has no space that nobody asked for.
    assert allowed('start: "é"', []) == {"é"} and allowed('start: "x" " é"', ["<0x78>"]) == {"▁"}
