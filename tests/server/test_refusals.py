"""What the endpoint refuses, and how it says so; and that it refuses nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import HELLO, NAME, chat, failing, refused

from zen_turbo.engine.engine import Engine
from zen_turbo.server.completions import CompletionRequest
from zen_turbo.server.responses import ResponsesRequest
from zen_turbo.server.schemas import ChatRequest, GenerationRequest


def test_a_prompt_that_is_too_long(client: openai.OpenAI) -> None:
    long = [{"role": "user", "content": "x y z " * 3000}]
    body = refused(client, openai.BadRequestError, messages=long)
    assert (body["code"], body["type"], body["param"]) == ("context_length_exceeded", "invalid_request_error", "messages")
    assert body["n_ctx"] == 4096 < body["n_prompt_tokens"]
    assert body["message"].startswith("This model's maximum context length is 4096 tokens. However, your messages resulted in ")
    assert str(body["n_prompt_tokens"]) in body["message"]
    assert refused(client, openai.BadRequestError, messages=long, stream=True)["code"] == "context_length_exceeded"


def test_a_body_of_many_megabytes_is_read(client: openai.OpenAI) -> None:
    """A million tokens of text are 4 to 6 MB: no layer below may have a smaller limit."""
    body = refused(client, openai.BadRequestError, messages=[{"role": "user", "content": "The sky is blue. " * 250_000}])
    assert body["code"] == "context_length_exceeded" and body["n_prompt_tokens"] > 500_000


def test_a_default_of_max_tokens_ends_where_the_context_does(client: openai.OpenAI) -> None:
    """No limit named: the default of 32 would not fit behind this prompt, and that is no reason to refuse."""
    pad = {"role": "user", "content": "x"}
    unit = 6
    used = chat(client, messages=[pad]).usage.prompt_tokens
    messages = [{"role": "user", "content": "x" + "\x00" * (4096 - used - unit)}]
    answer = client.chat.completions.create(model=NAME, messages=messages, temperature=0, extra_body={"ignore_eos": True})  # type: ignore[arg-type]
    assert answer.usage is not None
    assert answer.usage.total_tokens == 4096 and answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("values", "param", "code"),
    [
        ({"messages": []}, "messages", "empty_prompt"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages", "empty_prompt"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages", "invalid_request"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages", "invalid_request"),
        ({"temperature": -1}, "temperature", "invalid_request"),
        ({"top_p": 7}, "top_p", "invalid_request"),
        ({"max_tokens": 0}, "max_tokens", "invalid_request"),
        ({"max_tokens": "many"}, "max_tokens", "invalid_request"),
        ({"n": 0}, "n", "invalid_request"),
        ({"n": 129}, "n", "invalid_request"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_request"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_request"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "invalid_request"),
        ({"logit_bias": {"320": 1}}, "logit_bias", "invalid_request"),
        ({"logit_bias": {"five": 1}}, "logit_bias", "invalid_request"),
        ({"presence_penalty": 2.5}, "presence_penalty", "invalid_request"),
        ({"extra_body": {"repetition_penalty": 1e-300}}, "repetition_penalty", "invalid_request"),
        ({"stop": ["x"] * 65}, "stop", "invalid_request"),
        ({"stop": "x" * 257}, "stop", "invalid_request"),
        ({"stop": [""]}, "stop", "invalid_request"),
        ({"extra_body": {"stop_token_ids": [5] * 1025}}, "stop_token_ids", "invalid_request"),
        ({"response_format": {"type": "structural_tag"}}, "response_format", "unsupported_parameter"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "invalid_request"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "wat"}}}}, "response_format", "invalid_request"),
        ({"functions": [{"name": "f"}]}, "functions", "unsupported_parameter"),
        ({"extra_body": {"prompt_logprobs": 1}}, "prompt_logprobs", "unsupported_parameter"),
        ({"extra_body": {"truncate_prompt_tokens": 5}}, "truncate_prompt_tokens", "unsupported_parameter"),
        ({"extra_body": {"cache_salt": "mine"}}, "cache_salt", "unsupported_parameter"),
        ({"extra_body": {"continue_final_message": True}}, "continue_final_message", "invalid_request"),
        ({"extra_body": {"min_tokens": 9}}, "min_tokens", "invalid_request"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "unsupported_parameter"),
        ({"extra_body": {"chat_template": "{{ 1 }}"}}, "chat_template", "unsupported_parameter"),
        ({"extra_body": {"chat_template_kwargs": {"messages": []}}}, "chat_template_kwargs", "invalid_request"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(client: openai.OpenAI, values: dict[str, Any], param: str, code: str) -> None:
    body = refused(client, openai.BadRequestError, **values)
    assert (body["param"], body["code"]) == (param, code)


def test_neutral_and_unknown_fields_are_accepted(client: openai.OpenAI) -> None:
    chat(
        client,
        n=1,
        logprobs=False,
        presence_penalty=0,
        frequency_penalty=0,
        logit_bias={},
        response_format={"type": "text"},
        user="me",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        extra_body={"something_new": 1, "top_k": -1, "repetition_penalty": 1.0},
    )


_ROUTES: dict[str, tuple[type[GenerationRequest], dict[str, Any]]] = {
    "chat/completions": (ChatRequest, {"messages": HELLO, "max_tokens": 1}),
    "completions": (CompletionRequest, {"prompt": "a", "max_tokens": 1}),
    "responses": (ResponsesRequest, {"input": "a", "max_output_tokens": 1}),
}
_FIELDS = [(route, field) for route, (kind, _) in _ROUTES.items() for field in sorted({*kind.model_fields, *kind.neutral})]
_VALUES = st.recursive(
    st.sampled_from([None, True, False, 0, 1, -1, 3, 2**70, 0.5, 1e308, "", "x", "auto", "required", "json", "\ud800", "<|im_end|>"]),
    lambda inner: st.lists(inner, max_size=2)
    | st.dictionaries(
        st.sampled_from("type function name schema json_schema parameters role content format regex choice tool_calls text effort 5".split()),
        inner,
        max_size=3,
    ),
    max_leaves=5,
)


@settings(max_examples=200)
@given(where=st.sampled_from(_FIELDS), value=_VALUES)
def test_whatever_a_field_holds_it_is_honoured_or_refused(http: httpx.Client, where: tuple[str, str], value: Any) -> None:
    route, field = where
    body = {**_ROUTES[route][1], field: value}
    response = http.post(f"/v1/{route}", content=json.dumps(body).encode())
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert error["type"] == "invalid_request_error" and error["message"]


def test_the_documentation_names_what_is_honoured_and_refused() -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "api.md").read_text()
    named = set(re.findall(r"`([a-z_]+)`", page)) | set(re.search(r"## Sampling\n\n`([^`]+)`", page)[1].split())  # type: ignore[index]
    plumbing = {"messages", "model", "n", "stream", "sse_ping_interval", "response_format", "tool_choice"}
    refused_fields = set(page.partition("## Refused by name")[2].replace("`", " ").replace(",", " ").split())
    assert set(GenerationRequest.model_fields) - plumbing <= named
    assert set(GenerationRequest.neutral) - {"use_beam_search", "structural_tag"} <= refused_fields


@pytest.mark.parametrize(
    ("values", "numbers"),
    [({"stop": ["x"] * 65}, (64, 65)), ({"stop": ["x", "y" * 300]}, (256, 300)), ({"stop_token_ids": [5] * 1025}, (1024, 1025))],
)
def test_stops_are_bounded_and_the_refusal_is_short(client: openai.OpenAI, values: dict[str, Any], numbers: tuple[int, int]) -> None:
    message = refused(client, openai.BadRequestError, extra_body=values)["message"]
    assert all(str(number) in message for number in numbers) and len(message) < 100


@pytest.mark.parametrize(
    "values",
    [
        {"model": "x" * 100_000},
        {"messages": [{"role": "x" * 100_000}]},
        {"messages": ["x" * 100_000]},
        {"messages": [{"role": "user", "content": [{"type": "x" * 100_000}]}]},
        {"response_format": {"type": "x" * 100_000}},
        {"tools": [{"type": "x" * 100_000}]},
        {"tools": [{"type": "function", "function": {"name": "x" * 100_000}}]},
        {"stop": ["x" * 100_000]},
        {"extra_body": {"reasoning_effort": ["x" * 100_000]}},
        {"extra_body": {"structured_outputs": {"x" * 100_000: 1}}},
    ],
)
def test_a_refusal_does_not_send_back_what_came(client: openai.OpenAI, values: dict[str, Any]) -> None:
    assert len(refused(client, openai.APIStatusError, **values)["message"]) < 500


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    assert refused(client, openai.NotFoundError, model="gpt-5")["code"] == "model_not_found"


def test_what_is_not_http_as_we_know_it(url: str) -> None:
    for body, status in ((b"", 400), (b"{", 400), (b"[]", 400), (b"null", 400), (b'{"messages": 3}', 400), (b"\xff\xfe", 400)):
        response = httpx.post(f"{url}/v1/chat/completions", content=body)
        assert response.status_code == status
        assert response.json()["error"]["code"] == "invalid_request"
    assert httpx.get(f"{url}/v1/nothing").json()["error"]["code"] == "not_found"
    wrong = httpx.get(f"{url}/v1/chat/completions")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")


def test_a_fault_inside_says_nothing_of_the_inside(client: openai.OpenAI, engine: Engine) -> None:
    with failing(engine):
        body = refused(client, openai.InternalServerError)
        with pytest.raises(openai.APIError, match="Internal error"):
            list(chat(client, stream=True))
    assert (body["code"], body["type"]) == ("internal_error", "server_error") and "secret" not in str(body)
    assert chat(client).choices[0].message.content is not None
