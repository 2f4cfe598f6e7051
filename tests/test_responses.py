"""POST /v1/responses with the real ``openai`` client over a tiny random model."""

from __future__ import annotations

import asyncio
import json
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel
from serving import NAME, failing
from test_tools import TOOL_LIST, WEATHER, biased, client, engine

from zen_turbo.engine.engine import Engine

__all__ = ["client", "engine"]  # fixtures: a model whose template knows tools and thoughts

TOOLS = [{"type": "function", **tool["function"]} for tool in TOOL_LIST]  # type: ignore[dict-item]
TEXT = "The grass is green."


def respond(client: openai.OpenAI, **values: Any) -> Any:
    return client.responses.create(**{"model": NAME, "input": TEXT, "temperature": 0, "max_output_tokens": 8, **values})


def test_an_answer_is_that_of_chat(client: openai.OpenAI) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": TEXT}]
    chat = client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=8)  # type: ignore[arg-type]
    answer = respond(client, instructions="Be brief.")
    assert answer.id.startswith("resp_") and (answer.object, answer.model) == ("response", NAME)
    assert answer.output_text == chat.choices[0].message.content
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert chat.usage is not None
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (chat.usage.prompt_tokens, 8)
    parts = [{"type": "input_text", "text": TEXT}]
    as_items = respond(client, input=[{"role": "system", "content": "Be brief."}, {"type": "message", "role": "user", "content": parts}])
    assert as_items.output_text == answer.output_text


def test_a_stream_tells_the_same_in_order(client: openai.OpenAI) -> None:
    whole = respond(client)
    events = list(respond(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    assert kinds[-4:] == ["response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete"]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == whole.output_text
    final = events[-1].response
    assert final.output_text == whole.output_text and final.usage.output_tokens == 8
    with client.responses.stream(model=NAME, input=TEXT, temperature=0, max_output_tokens=8) as stream:
        assert [event.type for event in stream] == kinds


def test_the_wire(client: openai.OpenAI) -> None:
    body = {"model": NAME, "input": TEXT, "stream": True, "max_output_tokens": 2}
    response = httpx.post(f"{client.base_url}responses", json=body, headers={"X-Request-Id": "mine"}, timeout=60)
    assert response.headers["content-type"].startswith("text/event-stream") and response.headers["x-request-id"] == "mine"
    blocks = [block.split("\n") for block in response.text.split("\n\n") if block and not block.startswith(":")]
    for event, data in blocks:
        assert event.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]


def test_structured_output(client: openai.OpenAI, engine: Engine) -> None:
    class Weather(BaseModel):
        sunny: bool
        wind: Literal["calm", "storm"] | None

    form = {"format": {"type": "json_schema", "name": "weather", "strict": True, "schema": WEATHER}}
    answer = respond(client, text=form, max_output_tokens=100, temperature=1, extra_body={"logit_bias": biased(engine), "seed": 3})
    assert answer.status == "completed"
    jsonschema.validate(json.loads(answer.output_text), WEATHER)
    extra = {"logit_bias": biased(engine), "seed": 1}
    parsed = client.responses.parse(
        model=NAME, input=TEXT, text_format=Weather, reasoning={"effort": "none"}, max_output_tokens=300, extra_body=extra
    )
    assert isinstance(parsed.output_parsed, Weather)


def call(client: openai.OpenAI, engine: Engine, **values: Any) -> Any:
    settings = {"tools": TOOLS, "tool_choice": {"type": "function", "name": "weather"}, "parallel_tool_calls": False, "max_output_tokens": 100}
    return respond(client, **settings, temperature=1, extra_body={"logit_bias": biased(engine), "seed": 3}, **values)


def test_a_call_and_its_result(client: openai.OpenAI, engine: Engine) -> None:
    answer = call(client, engine)
    (item,) = answer.output
    assert (answer.status, item.type, item.name, item.status) == ("completed", "function_call", "weather", "completed")
    jsonschema.validate(json.loads(item.arguments), WEATHER)
    items = [{"role": "user", "content": TEXT}, item.model_dump(exclude_none=True)]
    result = {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
    after = respond(client, input=[*items, result], tools=TOOLS)
    assert after.usage.input_tokens > answer.usage.input_tokens
    events = list(call(client, engine, stream=True))
    kinds = list(dict.fromkeys(event.type for event in events))
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(event.delta for event in events if event.type.endswith("arguments.delta")) == item.arguments


def test_thoughts_are_items_of_their_own(client: openai.OpenAI, engine: Engine) -> None:
    settings = {
        "max_output_tokens": 60,
        "temperature": 1,
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "boolean"}}},
    }
    bias = {str(token): 4.0 for token in engine.tokenizer.encode("</think>")}
    for seed in range(10):
        extra = {"enable_thinking": True, "logit_bias": bias, "seed": seed}
        answer = respond(client, **settings, extra_body=extra)
        if answer.status == "completed" and len(answer.output) == 2:
            break
    thought, message = answer.output
    assert (thought.type, message.type) == ("reasoning", "message") and message.content[0].text in ("true", "false")
    assert thought.content[0].text and answer.usage.output_tokens_details.reasoning_tokens > 0
    kinds = list(dict.fromkeys(event.type for event in respond(client, **settings, extra_body=extra, stream=True)))
    assert kinds.index("response.reasoning_text.done") < kinds.index("response.output_text.delta")
    # What was given back goes in again.
    again = [{"role": "user", "content": TEXT}, *(item.model_dump(exclude_none=True) for item in answer.output), {"role": "user", "content": "So?"}]
    assert respond(client, input=again).usage.input_tokens > answer.usage.input_tokens


def test_async(client: openai.OpenAI) -> None:
    async def text() -> str:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0) as other:
            stream = await other.responses.create(model=NAME, input=TEXT, temperature=0, max_output_tokens=8, stream=True)
            return "".join([event.delta async for event in stream if event.type == "response.output_text.delta"])

    assert asyncio.run(text()) == respond(client).output_text


def test_a_fault_ends_a_stream_as_failed(client: openai.OpenAI, engine: Engine) -> None:
    with failing(engine):
        last = list(respond(client, stream=True))[-1]
    assert (last.type, last.response.status, last.response.error.code) == ("response.failed", "failed", "internal_error")
    assert "secret" not in str(last)


def test_nothing_is_stored(client: openai.OpenAI) -> None:
    made = respond(client, store=True, metadata={"a": "b"})
    assert (made.metadata, made.store) == ({"a": "b"}, False)
    for ask in (client.responses.retrieve, client.responses.delete, client.responses.cancel, client.responses.input_items.list):
        with pytest.raises(openai.NotFoundError, match="not stored") as caught:
            ask(made.id)
        assert caught.value.code == "response_not_found"


@pytest.mark.parametrize(
    ("values", "param", "code"),
    [
        ({"input": []}, "input", "empty_prompt"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input", "invalid_request"),
        ({"input": "x y z " * 3000}, "input", "context_length_exceeded"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "unsupported_parameter"),
        ({"background": True}, "background", "unsupported_parameter"),
        ({"truncation": "auto"}, "truncation", "unsupported_parameter"),
        ({"tools": [{"type": "web_search"}]}, "tools", "unsupported_parameter"),
        ({"max_output_tokens": 0}, "max_output_tokens", "invalid_request"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "wat"}}}}, "text", "invalid_request"),
        ({"reasoning": {"effort": 3}}, "reasoning", "invalid_request"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client: openai.OpenAI, values: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        respond(client, **values)
    assert (caught.value.param, caught.value.code) == (param, code)


@pytest.mark.parametrize("instructions", [None, "Be brief."])
@pytest.mark.parametrize(
    "item",
    [
        {"role": "wizard", "content": TEXT},
        {"role": "user", "content": [{"type": "input_file", "file_id": "file-none"}]},
        {"role": "user", "content": 3},
    ],
)
def test_an_error_names_the_item(client: openai.OpenAI, item: dict[str, Any], instructions: str | None) -> None:
    call = {"type": "function_call", "name": "f", "arguments": "{}", "call_id": "1"}
    result = {"type": "function_call_output", "call_id": "1", "output": "x"}
    before = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": ""}, call, result]
    with pytest.raises(openai.APIStatusError, match=r"input\[4\]: ") as caught:
        respond(client, input=[*before, item], instructions=instructions)
    assert "messages" not in caught.value.message and caught.value.param == "input"
