"""All of the server at once: files, every route that generates, tools, keys; and what the metrics and the log say of it afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from serving import Held, serving, wait_until
from test_metrics import Scrape, scrape
from test_security import Lines, lines
from test_tools import HERMES_TEMPLATE, TOOL_LIST, biased, load

from zen_turbo.engine.engine import Engine
from zen_turbo.server.app import create_app
from zen_turbo.server.keys import KeyRing
from zen_turbo.server.logs import JsonFormatter
from zen_turbo.server.metrics import FINISH_REASONS, REJECTIONS
from zen_turbo.server.openapi import BODIES
from zen_turbo.server.settings import ServerSettings
from zen_turbo.text.documents import Document, documents_text

__all__ = ["lines"]  # a fixture

KEY, MAX_QUEUE, MAX_LEN = "sk-together", 4, 4096
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
SKY, QUESTION = "The sky is blue. " * 30, "What is blue?"
GONE = "file-" + "0" * 32


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    engine = load(tmp_path_factory.mktemp("together"), HERMES_TEMPLATE)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def http(engine: Engine) -> Iterator[httpx.Client]:
    app = create_app(lambda: engine, model_name="tiny", settings=ServerSettings(keys=KeyRing([KEY]), max_queue=MAX_QUEUE))
    with serving(app) as url, httpx.Client(base_url=url, timeout=60, headers={"Authorization": f"Bearer {KEY}"}) as client:
        wait_until(lambda: client.get("/health").status_code == 200)
        yield client


@pytest.fixture(scope="module")
def client(http: httpx.Client) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{http.base_url}/v1", api_key=KEY, max_retries=0, timeout=60) as result:
        yield result


@pytest.fixture
def file_id(client: openai.OpenAI) -> Iterator[str]:
    file = client.files.create(file=("sky.txt", SKY.encode()), purpose="user_data")
    yield file.id
    client.files.delete(file.id)


def change(before: Scrape, after: Scrape, name: str, labels: tuple[str, ...]) -> dict[str, float]:
    """What was counted between two scrapes, without zeros."""
    changes = {label: after(name, label) - before(name, label) for label in labels}
    return {label: value for label, value in changes.items() if value}


def test_a_file_is_the_same_prompt_on_every_route(client: openai.OpenAI, http: httpx.Client, file_id: str) -> None:
    text = documents_text([Document("sky.txt", SKY)]) + QUESTION
    greedy: dict[str, Any] = {"model": "tiny", "temperature": 0}
    pasted = client.chat.completions.create(messages=[{"role": "user", "content": text}], max_tokens=6, **greedy)
    parts: Any = [{"type": "file", "file": {"file_id": file_id}}, {"type": "text", "text": QUESTION}]
    chat = client.chat.completions.create(messages=[{"role": "user", "content": parts}], max_tokens=6, **greedy)
    items: Any = [{"role": "user", "content": [{"type": "input_file", "file_id": file_id}, {"type": "input_text", "text": QUESTION}]}]
    response = client.responses.create(input=items, max_output_tokens=6, **greedy)
    events = list(client.responses.create(input=items, max_output_tokens=6, stream=True, **greedy))
    assert pasted.usage is not None and chat.usage is not None and response.usage is not None
    assert chat.choices[0].message.content == pasted.choices[0].message.content == response.output_text == events[-1].response.output_text  # type: ignore[union-attr]
    assert chat.usage.prompt_tokens == pasted.usage.prompt_tokens == response.usage.input_tokens
    whole_pages = (pasted.usage.prompt_tokens - 1) // 64 * 64
    assert response.usage.input_tokens_details.cached_tokens == whole_pages > 0
    counted = http.post(f"{CHAT}/input_tokens", json={"messages": [{"role": "user", "content": parts}]}).json()
    assert counted["input_tokens"] == pasted.usage.prompt_tokens


def test_inline_and_gone_files_in_responses(client: openai.OpenAI, http: httpx.Client) -> None:
    inline = {"type": "input_file", "filename": "sky.txt", "file_data": "data:text/plain;base64,VGhlIHNreS4="}
    expected = documents_text([Document("sky.txt", "The sky.")])
    given = {"model": "tiny", "temperature": 0, "max_output_tokens": 4}
    read: Any = client.responses.create(input=[{"role": "user", "content": [inline]}], **given)  # type: ignore[call-overload]
    pasted: Any = client.responses.create(input=expected, **given)  # type: ignore[call-overload]
    assert (read.output_text, read.usage.input_tokens) == (pasted.output_text, pasted.usage.input_tokens)
    message = {"role": "user", "content": [{"type": "input_file", "file_id": GONE}]}
    system = {"role": "system", "content": f"fileid://{GONE}"}
    for path, body, param in (
        (CHAT, {"messages": [message]}, "messages"),
        (CHAT, {"messages": [system]}, "messages"),
        (RESPONSES, {"input": [message]}, "input"),
        (RESPONSES, {"input": [message], "stream": True}, "input"),
        (RESPONSES, {"input": "x", "instructions": f"fileid://{GONE}"}, "input"),
        ("/tokenize", {"messages": [message]}, "messages"),
        (f"{CHAT}/input_tokens", {"messages": [message]}, "messages"),
    ):
        answer = http.post(path, json=body)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (404, "file_not_found", param), path
        assert GONE in error["message"]


def test_each_request_is_counted_and_is_one_line(
    client: openai.OpenAI, http: httpx.Client, engine: Engine, file_id: str, lines: Lines
) -> None:
    before = scrape(http)
    given: dict[str, Any] = {"max_tokens": 3, "temperature": 0, "ignore_eos": True}
    message = {"role": "user", "content": [{"type": "input_file", "file_id": file_id}, {"type": "text", "text": "A private question?"}]}
    call = {"tools": TOOL_LIST, "tool_choice": "required", "parallel_tool_calls": False, "logit_bias": biased(engine), "seed": 1, "stream": True}
    bodies: list[tuple[str, dict[str, Any], int]] = [
        (CHAT, {"messages": [message], **given}, 1),
        (CHAT, {"messages": [message], **given, "n": 3, "stream": True}, 3),
        (CHAT, {"messages": [message], "max_tokens": 200, **call}, 1),
        (COMPLETIONS, {"prompt": ["The grass", "A private prompt"], **given, "n": 2}, 4),
        (COMPLETIONS, {"prompt": "The grass", **given, "stream": True}, 1),
        (RESPONSES, {"input": [message], "max_output_tokens": 3, "temperature": 0, "ignore_eos": True}, 1),
        (RESPONSES, {"input": "A private input", "max_output_tokens": 3, "ignore_eos": True, "stream": True}, 1),
    ]
    ids = [f"each-{number}" for number in range(len(bodies))]
    answers = [http.post(path, json=body, headers={"X-Request-Id": each}) for each, (path, body, _) in zip(ids, bodies, strict=True)]
    assert [answer.status_code for answer in answers] == [200] * len(bodies)
    assert '"finish_reason":"tool_calls"' in answers[2].text
    found = lines.of(*ids)
    after = scrape(http)
    assert [facts["route"] for facts in found] == [path for path, _, _ in bodies]
    assert change(before, after, "request_success_total", FINISH_REASONS) == {"length": sum(count for _, _, count in bodies) - 1, "stop": 1}
    for facts, answer, (_, body, count) in zip(found, answers, bodies, strict=True):
        assert facts["status"] == 200 and facts["key"] == KeyRing([KEY]).labels[0] and facts["ttft_s"] > 0
        assert answer.headers["x-request-id"] == facts["request_id"]
        if "tools" not in body:
            assert (facts["completion_tokens"], facts["finish_reason"]) == (3 * count, "length")
    written = sum(facts["completion_tokens"] for facts in found)
    assert after("generation_tokens_total") - before("generation_tokens_total") == written
    usage = answers[3].json()["usage"]
    assert found[3]["prompt_tokens"] == 2 * usage["prompt_tokens"], "each choice is a request of the engine, with the prompt of its own"
    shown = "\n".join(JsonFormatter().format(record) for record in lines.records)
    for hidden in ("private", "sky is blue", "sky.txt", KEY):
        assert hidden not in shown


def test_refusals_are_counted_on_every_route(http: httpx.Client, lines: Lines) -> None:
    before, long = scrape(http), "x y z " * MAX_LEN
    bodies: dict[str, dict[str, Any]] = {
        CHAT: {"messages": [{"role": "user", "content": long}]},
        COMPLETIONS: {"prompt": ["a", long]},
        RESPONSES: {"input": long},
    }
    for path, body in bodies.items():
        answer = http.post(path, json=body, headers={"X-Request-Id": f"refused{path}"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    found = lines.of(*(f"refused{path}" for path in bodies))
    assert [facts["error"] for facts in found] == ["context_length_exceeded"] * 3
    wait_until(lambda: change(before, scrape(http), "admission_rejections_total", REJECTIONS) == {"context_length_exceeded": 3})


def test_a_body_is_served_whole_or_not_at_all(http: httpx.Client, engine: Engine) -> None:
    """One of its answers finds no place in the queue: the others are cancelled, and one refusal is counted."""
    before = scrape(http)
    with Held(engine):
        waiting = threading.Thread(target=http.post, args=(COMPLETIONS,), kwargs={"json": {"prompt": "a", "n": MAX_QUEUE - 1, "max_tokens": 2}})
        waiting.start()
        wait_until(lambda: scrape(http)("num_requests_waiting") == MAX_QUEUE - 1)
        refused = http.post(CHAT, json={"messages": [{"role": "user", "content": "b"}], "n": 2, "max_tokens": 2})
        assert sum(request.aborted.is_set() for request in engine._known.values()) == 1
    waiting.join()
    assert (refused.status_code, refused.json()["error"]["reason"]) == (429, "max_queue")
    wait_until(lambda: change(before, scrape(http), "admission_rejections_total", REJECTIONS) == {"max_queue": 1})
    assert change(before, scrape(http), "request_success_total", ("abort",)) == {"abort": 1}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "a"}], "n": MAX_QUEUE + 1}, "n"),
        (COMPLETIONS, {"prompt": ["a"] * MAX_QUEUE, "n": 2}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
    ],
)
def test_more_answers_than_may_wait_are_never_served(http: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    answer = http.post(path, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_request", param)
    count = body.get("n", 1) * len(body.get("prompt", "a"))
    assert f"1 to {MAX_QUEUE} answers" in error["message"] and f"not for {count}" in error["message"]


def test_every_route_that_takes_a_body_asks_for_the_key(http: httpx.Client) -> None:
    for path in (*BODIES, "/v1/files", f"/v1/files/{GONE}", f"/v1/files/{GONE}/content"):
        answer = httpx.post(f"{http.base_url}{path}", json={})
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
