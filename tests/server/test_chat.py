"""The OpenAI endpoint over a real socket with the real ``openai`` client; the model is a tiny random one."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serving import HELLO, NAME, Slowly, chat, refused, serving, wait_until

from zen_turbo import LLM
from zen_turbo.engine.engine import Engine
from zen_turbo.engine.request import SamplingParams
from zen_turbo.errors import CheckpointError
from zen_turbo.server.answering import EMPTY_CHUNK_AFTER_S
from zen_turbo.server.app import create_app


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
