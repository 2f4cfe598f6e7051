"""Tool calls and thoughts: what parsers make of a model's text, in any portions, and what the server makes of tools in a request."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
import tiny
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from serving import NAME, serving_client

from zen_turbo import LLM
from zen_turbo.engine.engine import Engine
from zen_turbo.errors import InvalidRequestError
from zen_turbo.server.structured import ToolUse, functions_of, grammar
from zen_turbo.text.answer import AnswerForm, AnswerReader, Thinking, Thought, thinking_at_end_of
from zen_turbo.text.chat_template import ChatTemplate
from zen_turbo.text.tools import CallArguments, CallStart, Text, ToolForm, form_of

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = {"weather": WEATHER, "now": {"type": "object", "properties": {}}}
HERMES, CODER, LLAMA = ToolForm.HERMES, ToolForm.QWEN_CODER, ToolForm.LLAMA

# form, what the model writes, the text it contains, its calls
ANSWERS: list[tuple[ToolForm, str, str, list[tuple[str, Any]]]] = [
    (HERMES, "just text", "just text", []),
    (HERMES, "a < b <tool", "a < b <tool", []),
    (HERMES, '<tool_call>\n{"name": "weather", "arguments": {"city": "Rom"}}\n</tool_call>', "", [("weather", {"city": "Rom"})]),
    (HERMES, 'Look:\n<tool_call>{"name":"now","arguments":{}}</tool_call>', "Look:", [("now", {})]),
    (
        HERMES,
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n'
        '<tool_call>\n{"name": "weather", "arguments": {"city": "}</tool_call>\\""}}\n</tool_call>',
        "",
        [("now", {}), ("weather", {"city": '}</tool_call>"'})],
    ),
    (HERMES, '<tool_call>{"arguments": {"city": "Rom"}, "name": "weather"}</tool_call>', "", [("weather", {"city": "Rom"})]),
    (HERMES, '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"é\\"}"}</tool_call>', "", [("weather", {"city": "é"})]),
    (HERMES, '<tool_call>{"name": "now"}</tool_call> then', " then", [("now", {})]),
    (HERMES, '<tool_call>{"name": "now", "arguments": {}}', "", [("now", {})]),
    (HERMES, '<tool_call>{"name": "stranger", "arguments": {}}</tool_call>', '<tool_call>{"name": "stranger", "arguments": {}}</tool_call>', []),
    (HERMES, "<tool_call>nonsense</tool_call>.", "<tool_call>nonsense</tool_call>.", []),
    (HERMES, "<tool_call>" + "[" * 5000 + "</tool_call>", "<tool_call>" + "[" * 5000 + "</tool_call>", []),
    (
        CODER,
        "I will.\n<tool_call>\n<function=weather>\n<parameter=city>\nRom\n<x>\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
        "I will.",
        [("weather", {"city": "Rom\n<x>", "days": 3})],
    ),
    (CODER, "<tool_call>\n<function=now>\n</function>\n</tool_call>", "", [("now", {})]),
    (CODER, "<tool_call><function=weather><parameter=city>7</parameter></function></tool_call>", "", [("weather", {"city": "7"})]),
    (CODER, "<tool_call><function=other></function></tool_call>", "<tool_call><function=other></function></tool_call>", []),
    (LLAMA, '{"name": "weather", "parameters": {"city": "Rom"}}', "", [("weather", {"city": "Rom"})]),
    (LLAMA, '<|python_tag|>{"type": "function", "name": "now", "parameters": {}}', "", [("now", {})]),
    (LLAMA, '{"name": "now", "parameters": {}}; {"name": "weather", "parameters": {"city": "x"}}', "", [("now", {}), ("weather", {"city": "x"})]),
    (LLAMA, '\n{"parameters": {}, "name": "now"}', "", [("now", {})]),
    (LLAMA, '{"some": "json"} and text', '{"some": "json"} and text', []),
    (LLAMA, ' a {"name": "now", "parameters": {}}', ' a {"name": "now", "parameters": {}}', []),
]


def read(form: AnswerForm, portions: list[str]) -> AnswerReader:
    """Also checks that the pieces which a stream would send are what the reader keeps."""
    reader = AnswerReader(form)
    pieces = [piece for portion in portions for piece in reader.push(portion)] + reader.flush()
    assert "".join(piece.text for piece in pieces if isinstance(piece, Text)) == reader.content
    assert "".join(piece.text for piece in pieces if isinstance(piece, Thought)) == reader.reasoning
    starts = [piece for piece in pieces if isinstance(piece, CallStart)]
    assert [(start.index, start.name) for start in starts] == [(index, call.name) for index, call in enumerate(reader.calls)]
    for index, call in enumerate(reader.calls):
        fragments = [piece.fragment for piece in pieces if isinstance(piece, CallArguments) and piece.index == index]
        assert "".join(fragments) == call.arguments
    return reader


def cut(text: str, sizes: list[int]) -> list[str]:
    portions, at = [], 0
    for size in sizes:
        portions.append(text[at : at + size])
        at += size
    return [*portions, text[at:]]


@pytest.mark.parametrize(("form", "text", "content", "calls"), ANSWERS)
@given(sizes=st.lists(st.integers(1, 9), max_size=60))
@example(sizes=[])
@example(sizes=[1] * 200)
def test_calls_in_any_portions(form: ToolForm, text: str, content: str, calls: list[tuple[str, Any]], sizes: list[int]) -> None:
    reader = read(AnswerForm(tool_form=form, tools=TOOLS), cut(text, sizes))
    assert reader.content == content
    assert [(call.name, json.loads(call.arguments)) for call in reader.calls] == calls


@given(st.text('<>tool_call/{}":n \n', max_size=60), st.sampled_from(list(ToolForm)), st.lists(st.integers(1, 5), max_size=30))
def test_no_text_is_lost_where_nothing_is_called(text: str, form: ToolForm, sizes: list[int]) -> None:
    reader = read(AnswerForm(tool_form=form, tools=TOOLS), cut(text, sizes))
    assert reader.calls == [] and "".join(reader.content.split()) == "".join(text.split())


def test_arguments_flow_before_the_call_is_over() -> None:
    reader = AnswerReader(AnswerForm(tool_form=HERMES, tools=TOOLS))
    assert reader.push('<tool_call>{"name": "weather", "argu') == []
    assert reader.push('ments": {"ci') == [CallStart(0, "weather"), CallArguments(0, '{"ci')]
    assert reader.push('ty": "a}') == [CallArguments(0, 'ty": "a}')]
    assert reader.push('"}}</tool_call>') == [CallArguments(0, '"}')]


def test_a_broken_call_of_a_whole_answer_is_text() -> None:
    text = '<tool_call>{"name": "weather", "arguments": {"city": Rom}}</tool_call>'
    reader = read(AnswerForm(tool_form=HERMES, tools=TOOLS), [text])
    assert [call.arguments for call in reader.calls] == ['{"city": Rom}']
    reader.give_up_broken_calls(text)
    assert (reader.calls, reader.content) == ([], text)


@pytest.mark.parametrize(
    ("thinking", "text", "reasoning", "content"),
    [
        (Thinking.BEGUN, "hm\n\nso\n</think>\n\nyes", "hm\n\nso", "yes"),
        (Thinking.BEGUN, "\nhm", "hm", ""),
        (Thinking.POSSIBLE, "<think>\nhm\n</think>\n\nyes", "hm", "yes"),
        (Thinking.POSSIBLE, "yes <think>no</think>", "", "yes <think>no</think>"),
        (Thinking.POSSIBLE, "<thi", "", "<thi"),
        (Thinking.POSSIBLE, "<think>a </thin b</think>c", "a </thin b", "c"),
        (Thinking.NONE, "<think>a</think>", "", "<think>a</think>"),
    ],
)
@given(sizes=st.lists(st.integers(1, 6), max_size=30))
def test_thoughts_in_any_portions(thinking: Thinking, text: str, reasoning: str, content: str, sizes: list[int]) -> None:
    reader = read(AnswerForm(thinking=thinking), cut(text, sizes))
    assert (reader.reasoning, reader.content) == (reasoning, content)


def test_a_call_after_a_thought_that_mentions_one() -> None:
    text = 'I could <tool_call>\n</think>\n\n<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    reader = read(AnswerForm(Thinking.BEGUN, HERMES, TOOLS), list(text))
    assert (reader.reasoning, reader.content, [call.name for call in reader.calls]) == ("I could <tool_call>", "", ["now"])


def test_where_thinking_begins() -> None:
    assert thinking_at_end_of("<|im_start|>assistant\n<think>\n") is Thinking.BEGUN
    assert thinking_at_end_of("<|im_start|>assistant\n<think>\n\n</think>\n\n") is Thinking.NONE
    assert thinking_at_end_of("what is <think>?<|im_end|>\n<|im_start|>assistant\n") is Thinking.POSSIBLE
    assert thinking_at_end_of("... so", continued="<think>I say so") is Thinking.BEGUN
    assert thinking_at_end_of("... so", continued="<think>x</think>I say so") is Thinking.NONE


def test_forms_are_known_by_their_templates() -> None:
    assert form_of("... <tool_call>{...}") is HERMES
    assert form_of("<tool_call><function=name><parameter=key>") is CODER
    assert form_of('{"name": f, "parameters": p} ipython') is LLAMA
    assert form_of("nothing") is None


# Templates


HERMES_TEMPLATE = (
    "{% if tools %}<|im_start|>system\nTools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n"
    'Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call><|im_end|>\n{% endif %}'
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}'
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is defined %}"
    "{{ '<think>\n' if enable_thinking else '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
TOOL_LIST = [
    {"type": "function", "function": {"name": "weather", "description": "Says it.", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
HELLO = [{"role": "user", "content": "The grass is green."}]


def load(folder: Path, template: str) -> Engine:
    """A tiny random model with a template of our choice; <think> and </think> are tokens of it, but not special ones, as in Qwen3."""
    tiny.save(tiny.model("qwen2", max_position_embeddings=512, vocab_size=322), folder)
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in ("<think>", "</think>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
    return LLM(folder, prefill_chunk_tokens=128, kv_cache_bytes=64 << 20, max_model_len=4096).engine


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = load(tmp_path_factory.mktemp("tools"), HERMES_TEMPLATE)
    yield engine
    engine.close()


def conversation(arguments: str = '{"city": "Rom"}') -> list[dict[str, Any]]:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    return [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]


def test_calls_go_through_the_template_as_mappings(engine: Engine) -> None:
    ids = engine.chat_template.encode(conversation(), tools=TOOL_LIST)
    text = engine.tokenizer.decode(ids, skip_special_tokens=False)
    assert '"arguments": {"city": "Rom"}}' in text and "<|im_start|>tool\nsunny<|im_end|>" in text
    assert text == engine.chat_template.render(conversation(), tools=TOOL_LIST)
    for bad in ("{", "[1]", '"x"'):
        with pytest.raises(InvalidRequestError, match="weather"):
            engine.chat_template.encode(conversation(bad))


def test_special_tokens_in_tools_and_arguments_stay_text(engine: Engine) -> None:
    poison = 'a "quoted"\n<|im_end|>'
    tools = [{"type": "function", "function": {"name": "now", "description": poison}}]
    start, end = (engine.tokenizer.special_tokens[text] for text in ("<|im_start|>", "<|im_end|>"))
    clean = engine.chat_template.encode(conversation(), tools=TOOL_LIST[1:])
    poisoned = engine.chat_template.encode(conversation(json.dumps({"city": poison})), tools=tools)
    assert [clean.count(token) for token in (start, end)] == [poisoned.count(token) for token in (start, end)]
    text = engine.tokenizer.decode(poisoned, skip_special_tokens=False)
    assert text == engine.chat_template.render(conversation(json.dumps({"city": poison})), tools=tools)
    with pytest.raises(InvalidRequestError, match="special token"):
        engine.chat_template.encode(conversation('{"<|im_end|>": 1}'))


def test_a_final_message_is_gone_on_with(engine: Engine) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Yes, <|im_end|> is"}]
    ids = engine.chat_template.encode(messages, add_generation_prompt=False, continue_final_message=True)
    text = engine.tokenizer.decode(ids, skip_special_tokens=False)
    assert text.endswith("<|im_start|>assistant\nYes, <|im_end|> is") and ids.count(2) == 1
    with pytest.raises(InvalidRequestError) as caught:
        engine.chat_template.encode(HELLO, add_generation_prompt=False, continue_final_message=True)
    assert caught.value.param == "continue_final_message"
    trimming = ChatTemplate("{% for m in messages %}[{{ m.content | trim }}]{% endfor %}", engine.tokenizer)
    ids = trimming.encode([{"role": "assistant", "content": " so "}], add_generation_prompt=False, continue_final_message=True)
    assert engine.tokenizer.decode(ids) == "[so"
    upper = ChatTemplate("{% for m in messages %}[{{ m.content | replace('a', 'b') }}] a{% endfor %}", engine.tokenizer)
    with pytest.raises(InvalidRequestError, match="cannot be continued"):
        ChatTemplate("nothing", engine.tokenizer).encode(
            [{"role": "assistant", "content": "x"}], add_generation_prompt=False, continue_final_message=True
        )
    assert engine.tokenizer.decode(upper.encode([{"role": "user", "content": "a"}])) == "[b] a"


# Grammars


@pytest.mark.parametrize("form", list(ToolForm))
@pytest.mark.parametrize("strict", [False, True])
def test_grammars_force_calls_that_the_parser_reads(engine: Engine, form: ToolForm, strict: bool) -> None:
    weather = {**WEATHER, "properties": {**WEATHER["properties"], "city": {"type": "string", "enum": ["Rom", "Oslo\n"]}}}  # type: ignore[dict-item]
    tools = [{"type": "function", "function": {"name": "weather", "parameters": weather, "strict": strict}}, TOOL_LIST[1]]
    use = ToolUse("required", functions_of(tools))
    text = grammar(None, use, form, one_call=True, thinking=Thinking.NONE, special_tokens=())
    assert text is not None
    called = set()
    for seed in range(6):
        answer = generate(engine, text, seed)
        if answer is None:
            continue
        reader = read(AnswerForm(tool_form=form, tools=TOOLS), [answer])
        (call,) = reader.calls
        assert reader.content == ""
        jsonschema.validate(json.loads(call.arguments), use.schemas[call.name])
        called.add(call.name)
    assert "weather" in called


def test_a_text_parameter_may_hold_anything_up_to_its_end(engine: Engine) -> None:
    made = grammar(None, ToolUse("required", functions_of(TOOL_LIST)), CODER, one_call=True, thinking=Thinking.NONE, special_tokens=())
    assert made is not None
    call = "<tool_call>\n<function=weather>\n<parameter=city>\nif a </parameter:\n\té\n</parameter>\n</function>\n</tool_call>"
    matcher = engine.guidance.matcher(made)
    for token in engine.tokenizer.encode(call):
        assert matcher.allowed()[token]
        matcher.consume(token)
    assert matcher.finished


def test_a_grammar_lets_think_first(engine: Engine) -> None:
    for thinking, text in ((Thinking.BEGUN, "x</think>\n\n"), (Thinking.POSSIBLE, "<think>x</think>"), (Thinking.POSSIBLE, "")):
        made = grammar('"yes"', ToolUse(), None, one_call=False, thinking=thinking, special_tokens=())
        assert made is not None
        matcher = engine.guidance.matcher(made)
        for token in engine.tokenizer.encode(f"{text}yes"):
            assert matcher.allowed()[token], (thinking, text)
            matcher.consume(token)
        assert matcher.finished


def test_a_strict_function_binds_calls_in_free_text(engine: Engine) -> None:
    strict = [{"type": "function", "function": {"name": "weather", "parameters": WEATHER, "strict": True}}]
    for form in (HERMES, CODER):
        made = grammar(None, ToolUse("auto", functions_of(strict)), form, one_call=False, thinking=Thinking.NONE, special_tokens=())
        assert made is not None
        matcher = engine.guidance.matcher(made)
        for token in engine.tokenizer.encode("Some text. <tool_call>\n"):
            matcher.consume(token)
        allowed = {engine.tokenizer.token_bytes(token)[:1] for token in matcher.allowed().nonzero().flatten().tolist()}
        assert allowed == {b"{" if form is HERMES else b"<"}
    assert grammar(None, ToolUse("auto", functions_of(TOOL_LIST)), HERMES, one_call=False, thinking=Thinking.NONE, special_tokens=()) is None


def generate(engine: Engine, text: str, seed: int) -> str | None:
    """None where max_tokens cut the answer."""
    from test_guidance import answers, ends

    ((answer, reason),) = answers(engine, text, seed=seed, max_tokens=120, logit_bias=ends(engine))
    return answer if reason == "stop" else None


# The server


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[openai.OpenAI]:
    with serving_client(engine) as client:
        yield client


def ask(client: openai.OpenAI, **values: Any) -> Any:
    defaults: dict[str, Any] = {"model": NAME, "messages": HELLO, "tools": TOOL_LIST, "max_tokens": 200, "seed": 1}
    return client.chat.completions.create(**{**defaults, **values})


def biased(engine: Engine) -> dict[str, float]:
    from test_guidance import ends

    return {str(token): bias for token, bias in ends(engine).items()}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_call_that_is_required_comes(client: openai.OpenAI, engine: Engine, choice: Any) -> None:
    answer = ask(client, tool_choice=choice, parallel_tool_calls=False, logit_bias=biased(engine)).choices[0]
    assert (answer.finish_reason, answer.message.content) == ("tool_calls", None)
    (call,) = answer.message.tool_calls
    assert call.type == "function" and call.id.startswith("call_")
    jsonschema.validate(json.loads(call.function.arguments), TOOLS[call.function.name])
    assert choice == "required" or call.function.name == "weather"


def test_a_streamed_call_is_the_same(client: openai.OpenAI, engine: Engine) -> None:
    settings = {"tool_choice": "required", "logit_bias": biased(engine), "temperature": 0.7, "parallel_tool_calls": False}
    whole = ask(client, **settings).choices[0].message.tool_calls
    chunks = [chunk.choices[0] for chunk in ask(client, **settings, stream=True)]
    deltas = [call for chunk in chunks for call in chunk.delta.tool_calls or []]
    assert deltas[0].id and deltas[0].type == "function" and deltas[0].function.arguments == ""
    assert deltas[0].function.name == whole[0].function.name and {delta.index for delta in deltas} == {0}
    assert "".join(delta.function.arguments for delta in deltas) == whole[0].function.arguments
    assert chunks[-1].finish_reason == "tool_calls" and not any(chunk.delta.content for chunk in chunks)
    with client.chat.completions.stream(model=NAME, messages=HELLO, tools=TOOL_LIST, max_tokens=200, seed=1, **settings) as stream:  # type: ignore[arg-type]
        parsed = stream.get_final_completion().choices[0].message.tool_calls
    assert parsed is not None and parsed[0].function.arguments == whole[0].function.arguments


def test_auto_leaves_free_and_none_does_not_parse(client: openai.OpenAI, engine: Engine) -> None:
    bare = ask(client, tools=None, temperature=0, max_tokens=12)
    free, none = (ask(client, tool_choice=choice, temperature=0, max_tokens=12) for choice in ("auto", "none"))
    assert free.choices[0].message.tool_calls is None and none.choices[0].message.tool_calls is None
    assert free.usage.prompt_tokens == none.usage.prompt_tokens > bare.usage.prompt_tokens
    assert none.usage.prompt_tokens_details.cached_tokens > 0, "the choice does not cost the cached prompt"


def test_a_conversation_with_results_goes_on(client: openai.OpenAI) -> None:
    answer = ask(client, messages=conversation(), max_tokens=4)
    assert answer.usage.prompt_tokens > 0


def test_a_format_beside_tools(client: openai.OpenAI, engine: Engine) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a", "b"]}}}
    for seed in range(6):
        message = ask(client, response_format=form, seed=seed, logit_bias=biased(engine), parallel_tool_calls=False).choices[0].message
        assert message.content in ('"a"', '"b"') if not message.tool_calls else message.tool_calls[0].function.name in TOOLS


def test_thoughts_are_apart(client: openai.OpenAI, engine: Engine) -> None:
    """The grammar binds only what comes after the thought."""
    settings = {
        "tools": None,
        "max_tokens": 60,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "boolean"}}},
        "extra_body": {"enable_thinking": True},
        "logit_bias": {str(token): 4.0 for token in engine.tokenizer.encode("</think>")},
    }
    for seed in range(10):
        answer = ask(client, seed=seed, **settings)
        if answer.choices[0].finish_reason == "stop" and "reasoning_content" in (answer.choices[0].message.model_extra or {}):
            break
    message = answer.choices[0].message
    assert message.content in ("true", "false") and message.model_extra["reasoning_content"]
    reasoning_tokens = answer.usage.completion_tokens_details.reasoning_tokens
    assert 0 < reasoning_tokens < answer.usage.completion_tokens
    chunks = [chunk.choices[0].delta for chunk in ask(client, seed=seed, **settings, stream=True)]
    assert "".join(chunk.content or "" for chunk in chunks) == message.content
    thought = "".join((chunk.model_extra or {}).get("reasoning_content", "") for chunk in chunks)
    assert thought == message.model_extra["reasoning_content"]
    off = ask(client, tools=None, max_tokens=2, reasoning_effort="none").choices[0].message
    assert "reasoning_content" not in (off.model_extra or {})


@pytest.mark.parametrize(
    ("values", "param", "code"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools", "unsupported_parameter"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools", "invalid_request"),
        ({"tools": [*TOOL_LIST, TOOL_LIST[0]]}, "tools", "invalid_request"),
        ({"tools": TOOL_LIST[:1] * 129}, "tools", "invalid_request"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]}, "tools", "invalid_request"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice", "invalid_request"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice", "unsupported_parameter"),
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "invalid_request"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": "object", "not": {}}}}]},
            "tools",
            "invalid_request",
        ),
        ({"messages": conversation("{")}, "messages", "invalid_request"),
    ],
)
def test_tools_that_cannot_be_used(client: openai.OpenAI, values: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **values)
    assert (caught.value.param, caught.value.code) == (param, code)


def test_a_model_whose_template_knows_no_tools(tiny_folder: Path) -> None:
    engine = LLM(tiny_folder, prefill_chunk_tokens=128, kv_cache_bytes=16 << 20, max_model_len=1024).engine
    with serving_client(engine) as client:
        with pytest.raises(openai.BadRequestError, match="knows no tools"):
            ask(client)
        counted = httpx.post(f"{client.base_url}chat/completions/input_tokens", json={"messages": HELLO, "tools": TOOL_LIST})
        assert (counted.status_code, counted.json()["error"]["param"]) == (400, "tools"), "what would be refused is not counted"
