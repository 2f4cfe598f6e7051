"""The OpenAI endpoint over a real socket with the real ``openai`` client; the model is a tiny random one."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import Slowly, serving, wait_until

from zen_turbo import LLM
from zen_turbo.engine.engine import Engine
from zen_turbo.engine.request import SamplingParams
from zen_turbo.errors import CheckpointError
from zen_turbo.server.answering import EMPTY_CHUNK_AFTER_S
from zen_turbo.server.app import create_app
from zen_turbo.server.completions import CompletionRequest
from zen_turbo.server.responses import ResponsesRequest
from zen_turbo.server.schemas import ChatRequest, GenerationRequest

NAME = "tiny"
HELLO = [{"role": "user", "content": "The grass is green."}]


@contextmanager
def serving_client(engine: Engine) -> Iterator[openai.OpenAI]:
    """The client of a server of its own, for an engine that is loaded already."""
    app = create_app(lambda: engine, model_name=NAME, keep_alive_s=0.2, default_max_tokens=32)
    with serving(app) as base:
        wait_until(lambda: httpx.get(f"{base}/health").status_code == 200)
        with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=60) as client:
            yield client


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    return LLM(tiny_folder, prefill_chunk_tokens=128, kv_cache_bytes=64 << 20, max_model_len=4096).engine


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    app = create_app(lambda: engine, model_name=NAME, keep_alive_s=0.2, default_max_tokens=32)
    with serving(app) as base:
        wait_until(lambda: httpx.get(f"{base}/health").status_code == 200)
        yield base


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as result:
        yield result


def chat(client: openai.OpenAI, **values: Any) -> Any:
    return client.chat.completions.create(**{"model": NAME, "messages": HELLO, "temperature": 0, "max_tokens": 8, **values})


def test_models(client: openai.OpenAI, url: str) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.model_extra) == (NAME, "model", {"max_model_len": 4096, "context_length": 4096})
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other/model")
    assert caught.value.code == "model_not_found"
    assert httpx.get(f"{url}/health").json() == {"status": "ok"}


def test_texts_become_tokens_and_back(client: openai.OpenAI, url: str, engine: Engine) -> None:
    def post(path: str, **body: Any) -> httpx.Response:
        return httpx.post(url + path, json=body)

    found = post("/tokenize", model=NAME, prompt="The grass <|im_end|>", return_token_strs=True).json()
    assert found["tokens"] == engine.tokenizer.encode("The grass <|im_end|>", add_special_tokens=True)
    assert (found["count"], found["max_model_len"]) == (len(found["tokens"]), 4096)
    assert len(found["token_strs"]) == found["count"]
    assert post("/detokenize", tokens=found["tokens"]).json() == {"prompt": "The grass <|im_end|>"}
    prompt_tokens = chat(client).usage.prompt_tokens
    assert post("/tokenize", messages=HELLO).json()["count"] == prompt_tokens
    assert post("/v1/chat/completions/input_tokens", model=NAME, messages=HELLO).json() == {"input_tokens": prompt_tokens}
    for path, body, status, param in (
        ("/tokenize", {"prompt": "a", "messages": HELLO}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "other"}, 404, "model"),
        ("/detokenize", {"tokens": [1 << 40]}, 400, "tokens"),
        ("/detokenize", {"tokens": "many"}, 400, "tokens"),
        ("/v1/chat/completions/input_tokens", {"messages": 3}, 400, "messages"),
    ):
        answer = post(path, **body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
    assert httpx.get(f"{url}/version").json()["version"]


def test_an_answer_is_the_engines(client: openai.OpenAI, tiny_folder: Path) -> None:
    llm = LLM(tiny_folder, prefill_chunk_tokens=128, kv_cache_bytes=64 << 20, max_model_len=4096)
    expected = llm.chat(HELLO, SamplingParams(temperature=0.0, max_tokens=8))
    answer = chat(client)
    choice = answer.choices[0]
    assert answer.id.startswith("chatcmpl-") and answer.object == "chat.completion" and answer.model == NAME
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", expected.text, "length")
    assert answer.usage.prompt_tokens == expected.prompt_tokens
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.total_tokens == expected.prompt_tokens + len(expected.token_ids)
    assert answer.usage.prompt_tokens_details.cached_tokens == 0
    assert answer.model_extra["zen_turbo"]["density"] == 1.0


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = chat(client, max_tokens=20)
    chunks = list(chat(client, max_tokens=20, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    without = list(chat(client, max_tokens=20, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in without)


def test_the_bytes_of_a_stream(url: str) -> None:
    body = {"model": NAME, "messages": HELLO, "stream": True, "max_tokens": 3}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, headers={"X-Request-Id": "mine"}, timeout=60)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache" and response.headers["x-accel-buffering"] == "no"
    assert response.headers["x-request-id"] == "mine"
    events = [block for block in response.text.split("\n\n") if block and not block.startswith(":")]
    assert events[-1] == "data: [DONE]"
    assert all(json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk" for event in events[:-1])


def test_a_stop_string_and_sampling_reach_the_engine(client: openai.OpenAI) -> None:
    free = chat(client, max_tokens=20).choices[0].message.content
    stopped = chat(client, max_tokens=20, stop=[free[4:7], "never"]).choices[0]
    assert stopped.message.content == free[: free.index(free[4:7])] and stopped.finish_reason == "stop"
    sampled = {chat(client, temperature=1.8, seed=seed, max_completion_tokens=12).choices[0].message.content for seed in (1, 1, 2)}
    assert len(sampled) == 2
    assert chat(client, max_tokens=5, max_completion_tokens=7).usage.completion_tokens == 7
    only = chat(client, temperature=1.5, extra_body={"top_k": 1, "min_p": 0.1}).choices[0].message.content
    assert only == chat(client).choices[0].message.content


def test_several_choices(client: openai.OpenAI, engine: Engine) -> None:
    """Each as if it were asked for alone with its own seed."""
    messages = [{"role": "user", "content": "Once upon a time there was a choice. " * 20}]
    settings: dict[str, Any] = {"messages": messages, "temperature": 1.0, "max_tokens": 12, "logprobs": True}
    answer = chat(client, **settings, n=3, seed=7)
    texts = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2] and len(set(texts)) == 3
    assert texts == [chat(client, **settings, seed=seed).choices[0].message.content for seed in (7, 8, 9)]
    assert answer.usage.completion_tokens == sum(len(choice.logprobs.content) for choice in answer.choices)
    chunks = list(chat(client, **settings, n=3, seed=7, stream=True, stream_options={"include_usage": True}))
    for index, text in enumerate(texts):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        assert mine[0].delta.role == "assistant" and "".join(choice.delta.content or "" for choice in mine) == text
        assert sum(choice.finish_reason is not None for choice in mine) == 1 and mine[-1].finish_reason
    assert chunks[-1].usage.completion_tokens == answer.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == answer.usage.prompt_tokens


def test_a_prompt_is_read_once_for_all_choices(client: openai.OpenAI, engine: Engine) -> None:
    seen: list[int] = []
    begin = engine.decoder.begin

    def spy(token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(token_ids))
        return begin(token_ids, *args, **kwargs)

    engine.decoder.begin = spy  # type: ignore[method-assign]
    try:
        answer = chat(client, messages=[{"role": "user", "content": "A prompt of which pages are shared. " * 40}], n=3, max_tokens=1)
    finally:
        engine.decoder.begin = begin  # type: ignore[method-assign]
    assert answer.usage.prompt_tokens <= sum(seen) <= answer.usage.prompt_tokens + 2 * 64


def test_logprobs_of_an_answer(client: openai.OpenAI, engine: Engine) -> None:
    answer = chat(client, logprobs=True, top_logprobs=3, max_tokens=10)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for entry in content:
        assert len(entry.top_logprobs) == 3 and entry.logprob == entry.top_logprobs[0].logprob <= 0  # greedy
        assert bytes(entry.bytes).decode(errors="replace") == entry.token
    assert b"".join(bytes(entry.bytes) for entry in content).decode(errors="replace") == answer.choices[0].message.content
    bare = chat(client, logprobs=True, max_tokens=2).choices[0].logprobs.content
    assert [entry.top_logprobs for entry in bare] == [[], []] and bare[0].logprob == content[0].logprob
    chunks = [chunk.choices[0] for chunk in chat(client, logprobs=True, top_logprobs=3, max_tokens=10, stream=True)]
    streamed = [entry for choice in chunks if choice.logprobs for entry in choice.logprobs.content]
    assert [(entry.token, entry.bytes) for entry in streamed] == [(entry.token, entry.bytes) for entry in content]
    assert [entry.logprob for entry in streamed] == pytest.approx([entry.logprob for entry in content], abs=0.05)  # bf16
    only = chat(client, logit_bias={str(engine.tokenizer.encode("x")[0]): 100}, max_tokens=3, logprobs=True).choices[0]
    assert only.message.content == "xxx" and only.logprobs.content[0].logprob < -0.5, "of the model, not of the bias"


def test_formats(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    whole = chat(client, response_format=form, max_tokens=200).choices[0]
    assert whole.finish_reason == "stop" and list(json.loads(whole.message.content)) == ["ok"]
    chunks = [chunk.choices[0] for chunk in chat(client, response_format=form, max_tokens=200, stream=True)]
    assert "".join(choice.delta.content or "" for choice in chunks) == whole.message.content
    assert chat(client, response_format={"type": "json_object"}, max_tokens=60).choices[0].message.content.startswith("{")
    assert chat(client, extra_body={"guided_choice": ["up", "down"]}).choices[0].message.content in ("up", "down")
    unique = {"type": "array", "items": {"enum": [1]}, "uniqueItems": True, "maxItems": 1}
    loose = {"type": "json_schema", "json_schema": {"name": "x", "strict": False, "schema": unique}}
    assert json.loads(chat(client, response_format=loose, max_tokens=100).choices[0].message.content) in ([], [1])
    exact = {"type": "json_schema", "json_schema": {"name": "x", "schema": unique}}
    body = refused(client, openai.BadRequestError, response_format=exact)
    assert body["param"] == "response_format" and "uniqueItems" in body["message"]


def test_an_answer_that_was_begun_is_gone_on_with(client: openai.OpenAI, engine: Engine) -> None:
    begun = [*HELLO, {"role": "assistant", "content": "The sky"}]
    prompt = "<|im_start|>user\nThe grass is green.<|im_end|>\n<|im_start|>assistant\nThe sky"
    expected = client.completions.create(model=NAME, prompt=prompt, temperature=0, max_tokens=8).choices[0].text
    assert chat(client, messages=begun).choices[0].message.content == expected
    explicit = {"continue_final_message": True, "add_generation_prompt": False}
    assert chat(client, messages=begun, extra_body=explicit).choices[0].message.content == expected
    closed = chat(client, messages=begun, extra_body={"add_generation_prompt": True})
    assert closed.usage.prompt_tokens > chat(client, messages=begun).usage.prompt_tokens


def test_a_failure_of_one_choice_ends_all(client: openai.OpenAI, engine: Engine) -> None:
    sample, count = engine._sample, 0

    def faulty(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == 5:
            raise RuntimeError("broken")
        sample(*args)

    engine._sample = faulty  # type: ignore[method-assign]
    try:
        refused(client, openai.InternalServerError, n=3, max_tokens=2000, extra_body={"ignore_eos": True})
        count = 0
        with pytest.raises(openai.APIError, match="Internal error"):
            list(chat(client, n=3, max_tokens=2000, stream=True, extra_body={"ignore_eos": True}))
    finally:
        engine._sample = sample  # type: ignore[method-assign]
    wait_until(lambda: not engine.has_work())


def test_cached_tokens_are_reported(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Here we go. There and back again. " * 40}]
    chat(client, messages=messages)
    again = chat(client, messages=messages)
    details = again.usage.prompt_tokens_details
    assert details.cached_tokens == (again.usage.prompt_tokens - 1) // 64 * 64 > 0


def test_progress_on_request(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "Something not seen before. " * 60}]
    chunks = list(chat(client, messages=messages, stream=True, extra_body={"return_progress": True}))
    progress = [chunk.model_extra["prompt_progress"] for chunk in chunks if "prompt_progress" in (chunk.model_extra or {})]
    assert set(progress[0]) == {"total", "cache", "processed", "time_ms"}
    assert progress[0]["processed"] == progress[0]["cache"] and progress[-1]["processed"] == progress[-1]["total"]
    assert len(progress) > 3
    quiet = chat(client, messages=messages, stream=True)
    assert not any("prompt_progress" in (chunk.model_extra or {}) for chunk in quiet)


# Errors


def refused(client: openai.OpenAI, kind: type[openai.APIStatusError], **values: Any) -> dict[str, Any]:
    with pytest.raises(kind) as caught:
        chat(client, **values)
    body = caught.value.body
    assert isinstance(body, dict) and {"message", "type", "param", "code"} <= set(body)
    return body


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
    page = (Path(__file__).parent.parent / "docs" / "api.md").read_text()
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


# Time: waiting, leaving, loading


def test_silence_is_broken_by_comments(url: str, engine: Engine) -> None:
    body = {"model": NAME, "messages": [{"role": "user", "content": "new " * 30}], "stream": True, "max_tokens": 1}
    with Slowly(engine, 0.3):
        text = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).text
    assert text.count(": keep-alive\n\n") >= 2
    assert EMPTY_CHUNK_AFTER_S == 60


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_cancels_its_requests(url: str, engine: Engine, stream: bool, n: int) -> None:
    body = {"model": NAME, "messages": HELLO, "stream": stream, "max_tokens": 3000, "ignore_eos": True, "n": n}
    with Slowly(engine, 0.01):
        with pytest.raises(httpx.ReadTimeout), httpx.Client(timeout=0.5) as http:
            if stream:
                with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
                    for number, _ in enumerate(response.iter_bytes()):
                        if number == 3:
                            raise httpx.ReadTimeout("we leave")
            else:
                http.post(f"{url}/v1/chat/completions", json=body)
        wait_until(lambda: not engine.has_work())


def test_two_at_once(client: openai.OpenAI) -> None:
    prompts = [[{"role": "user", "content": text}] for text in ("The sky is blue.", "def add(a, b):")]
    alone = [chat(client, messages=messages, max_tokens=24).choices[0].message.content for messages in prompts]
    together: dict[int, str] = {}

    def ask(index: int) -> None:
        together[index] = chat(client, messages=prompts[index], max_tokens=24).choices[0].message.content

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[0], together[1]] == alone


def test_a_fault_inside_says_nothing_of_the_inside(client: openai.OpenAI, engine: Engine) -> None:
    begin = engine.decoder.begin

    def faulty(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("/secret/path")

    engine.decoder.begin = faulty  # type: ignore[method-assign]
    try:
        body = refused(client, openai.InternalServerError)
        with pytest.raises(openai.APIError, match="Internal error"):
            list(chat(client, stream=True))
    finally:
        engine.decoder.begin = begin  # type: ignore[method-assign]
    assert (body["code"], body["type"]) == ("internal_error", "server_error") and "secret" not in str(body)
    assert chat(client).choices[0].message.content is not None


def test_while_the_model_is_loaded(engine: Engine) -> None:
    gate = threading.Event()

    def load() -> Engine:
        gate.wait(20)
        raise CheckpointError("no good")

    failed = threading.Event()
    app = create_app(load, model_name=NAME, on_failure=failed.set)
    with serving(app) as base:
        health = httpx.get(f"{base}/health")
        assert (health.status_code, health.json()["error"]["code"]) == (503, "loading")
        assert health.headers["retry-after"] == "30"
        refusal = httpx.post(f"{base}/v1/chat/completions", json={"messages": HELLO})
        assert (refusal.status_code, refusal.json()["error"]["type"]) == (503, "unavailable_error")
        gate.set()
        assert failed.wait(10)
    assert str(app.state.zen_turbo.failure) == "no good"
