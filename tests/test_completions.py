"""POST /v1/completions with the real ``openai`` client over a tiny random model: the older shape, echo, and scores of texts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import transformers
from serving import NAME, serving_client

from zen_turbo import LLM
from zen_turbo.engine.engine import Engine
from zen_turbo.engine.request import SamplingParams

PROMPT = "The grass is green. Ä"


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    return LLM(tiny_folder, dtype="float32", prefill_chunk_tokens=128, kv_cache_bytes=64 << 20, max_model_len=1024).engine


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[openai.OpenAI]:
    with serving_client(engine) as client:
        yield client


def complete(client: openai.OpenAI, **values: Any) -> Any:
    return client.completions.create(**{"model": NAME, "prompt": PROMPT, "temperature": 0, "max_tokens": 8, **values})


def test_an_answer_is_the_engines(client: openai.OpenAI, tiny_folder: Path) -> None:
    expected = LLM(tiny_folder, dtype="float32", prefill_chunk_tokens=128, kv_cache_bytes=64 << 20).generate(
        PROMPT, SamplingParams(temperature=0.0, max_tokens=8)
    )
    answer = complete(client)
    (choice,) = answer.choices
    assert answer.id.startswith("cmpl-") and (answer.object, answer.model) == ("text_completion", NAME)
    assert (choice.index, choice.text, choice.logprobs, choice.finish_reason) == (0, expected.text, None, "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (expected.prompt_tokens, 8)
    assert len(complete(client, max_tokens=None, extra_body={"ignore_eos": True}).choices[0].text) > 0
    assert complete(client, max_tokens=None, extra_body={"ignore_eos": True}).usage.completion_tokens == 16


def test_prompts_in_every_form(client: openai.OpenAI, engine: Engine) -> None:
    ids = engine.tokenizer.encode(PROMPT)
    other = engine.tokenizer.encode("def add(a, b):")
    texts = [complete(client, prompt=prompt).choices[0].text for prompt in (PROMPT, [PROMPT], ids, [ids])]
    assert len(set(texts)) == 1
    both = complete(client, prompt=[ids, other])
    assert [choice.index for choice in both.choices] == [0, 1]
    assert [choice.text for choice in both.choices] == [texts[0], complete(client, prompt=other).choices[0].text]
    assert both.usage.prompt_tokens == len(ids) + len(other)
    by_text = complete(client, prompt=[PROMPT, "def add(a, b):"])
    assert [choice.text for choice in by_text.choices] == [choice.text for choice in both.choices]
    special = complete(client, prompt="<|im_start|>", extra_body={"echo": True}).usage.prompt_tokens
    assert special == 1, "the prompt is raw: the caller writes the special tokens"


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = complete(client, n=2, seed=5, temperature=1.0, echo=True)
    chunks = list(complete(client, n=2, seed=5, temperature=1.0, echo=True, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    for index in range(2):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices and chunk.choices[0].index == index]
        assert "".join(choice.text for choice in mine) == whole.choices[index].text
        assert [choice.finish_reason for choice in mine[:-1]] == [None] * (len(mine) - 1) and mine[-1].finish_reason == "length"
    assert whole.choices[0].text != whole.choices[1].text and all(choice.text.startswith(PROMPT) for choice in whole.choices)
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 16
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_async_requests_at_once(client: openai.OpenAI) -> None:
    async def both() -> list[str]:
        async with openai.AsyncOpenAI(base_url=client.base_url, api_key="none", max_retries=0) as many:
            requests = [many.completions.create(model=NAME, prompt=text, temperature=0, max_tokens=8) for text in (PROMPT, "def")]
            return [answer.choices[0].text for answer in await asyncio.gather(*requests)]

    assert asyncio.run(both()) == [complete(client).choices[0].text, complete(client, prompt="def").choices[0].text]


@pytest.mark.parametrize("max_tokens", [0, 1, 3])
def test_texts_are_scored_as_transformers_scores_them(client: openai.OpenAI, engine: Engine, tiny_folder: Path, max_tokens: int) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder).float().eval()
    prompt = PROMPT + " The sky is blue. 東京" * 40
    ids = engine.tokenizer.encode(prompt)
    assert len(ids) > 2 * 128
    (choice,) = complete(client, prompt=prompt, echo=True, logprobs=2, max_tokens=max_tokens).choices
    found = choice.logprobs
    answer = complete(client, prompt=prompt, max_tokens=max_tokens or 1)
    assert choice.text == prompt + (answer.choices[0].text if max_tokens else "")
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == len(ids) + max_tokens
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([ids])).logits[0], -1)
    gold = [float(expected[row, token]) for row, token in enumerate(ids[1:])]
    assert found.token_logprobs[1 : len(ids)] == pytest.approx(gold, abs=1e-3)
    for row in range(len(ids) - 1):
        assert max(found.top_logprobs[row + 1].values()) == pytest.approx(float(expected[row].max()), abs=1e-3)
        assert found.tokens[row + 1] in found.top_logprobs[row + 1] and 2 <= len(found.top_logprobs[row + 1]) <= 3
    for token, start in zip(found.tokens, found.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert choice.text[start:].startswith(token)
    assert any(token.startswith("bytes:") for token in found.tokens), "half a character is named by its bytes"


def test_logprobs_of_an_answer_only(client: openai.OpenAI) -> None:
    answer = complete(client, logprobs=0, max_tokens=5).choices[0]
    assert len(answer.logprobs.tokens) == 5
    assert all(list(top) == [token] for top, token in zip(answer.logprobs.top_logprobs, answer.logprobs.tokens, strict=True))
    streamed = list(complete(client, logprobs=0, max_tokens=5, stream=True))
    values = [value for chunk in streamed if chunk.choices[0].logprobs for value in chunk.choices[0].logprobs.token_logprobs]
    assert values == answer.logprobs.token_logprobs


def test_structured_output_and_stops(client: openai.OpenAI) -> None:
    assert complete(client, extra_body={"structured_outputs": {"choice": ["north", "south"]}}).choices[0].text in ("north", "south")
    for more in ({}, {"response_format": {"type": "text"}, "structured_outputs": {}}):  # these ask for nothing
        assert complete(client, extra_body={"guided_regex": "[0-9]{3}", **more}).choices[0].text.isdigit()
    free = complete(client, max_tokens=20).choices[0].text
    stopped = complete(client, max_tokens=20, stop=free[4:6], extra_body={"include_stop_str_in_output": True}).choices[0]
    assert stopped.text == free[: free.index(free[4:6]) + 2] and stopped.finish_reason == "stop"


@pytest.mark.parametrize(
    ("values", "param", "code"),
    [
        ({"prompt": []}, "prompt", "invalid_request"),
        ({"prompt": ""}, "prompt", "empty_prompt"),
        ({"prompt": [[]]}, "prompt", "empty_prompt"),
        ({"prompt": [1, 1 << 40]}, "prompt", "invalid_request"),
        ({"prompt": {"a": 1}}, "prompt", "invalid_request"),
        ({"prompt": ["a", "x y z " * 3000]}, "prompt", "context_length_exceeded"),
        ({"prompt": ["a"] * 100, "n": 20}, "prompt", "invalid_request"),
        ({"suffix": "end"}, "suffix", "unsupported_parameter"),
        ({"best_of": 3}, "best_of", "unsupported_parameter"),
        ({"logprobs": 50}, "logprobs", "invalid_request"),
        ({"max_tokens": 0}, "max_tokens", "invalid_request"),
        ({"stream": True, "echo": True, "logprobs": 1}, "echo", "unsupported_parameter"),
        ({"extra_body": {"structured_outputs": {"regex": "("}}}, "structured_outputs", "invalid_request"),
        ({"extra_body": {"structured_outputs": {"regex": "a", "choice": ["b"]}}}, "structured_outputs", "unsupported_parameter"),
        ({"extra_body": {"guided_regex": "("}}, "guided_regex", "invalid_request"),
        ({"extra_body": {"guided_regex": "a", "guided_choice": ["b"]}}, "guided_choice", "invalid_request"),
        ({"extra_body": {"guided_regex": "a", "response_format": {"type": "json_object"}}}, "response_format", "invalid_request"),
        ({"extra_body": {"guided_grammar": "root ::= x"}}, "guided_grammar", "unsupported_parameter"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: openai.OpenAI, engine: Engine, values: dict[str, Any], param: str, code: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, **values)
    assert (caught.value.param, caught.value.code) == (param, code)
    deadline = 200
    while engine.has_work() and deadline:
        deadline -= 1
        asyncio.run(asyncio.sleep(0.05))
    assert deadline, "what was submitted before the refusal is cancelled"


def test_another_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        complete(client, model="other")
    assert httpx.post(f"{client.base_url}completions", content=b"{").status_code == 400
