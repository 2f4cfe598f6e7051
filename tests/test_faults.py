"""What clients do wrong, by accident or on purpose: the server stays up, others are served, and nothing is held afterwards."""

from __future__ import annotations

import json
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Held, Slowly, serving, wait_until

from zen_turbo import LLM
from zen_turbo.engine.engine import Engine
from zen_turbo.server.app import create_app
from zen_turbo.server.operations import Operations

CHAT = "/v1/chat/completions"
ROUTES = (CHAT, "/v1/completions", "/v1/responses", "/v1/chat/completions/input_tokens", "/tokenize", "/detokenize")


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Iterator[Engine]:
    result = LLM(tiny_folder, prefill_chunk_tokens=64, kv_cache_bytes=64 << 20, max_model_len=2048).engine
    yield result
    result.close()


@pytest.fixture(scope="module")
def served(engine: Engine) -> Iterator[tuple[str, Operations]]:
    app = create_app(lambda: engine, model_name="tiny", keep_alive_s=0.1, default_max_tokens=8)
    with serving(app) as url:
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 200)
        yield url, app.state.zen_turbo.operations


@pytest.fixture
def url(served: tuple[str, Operations], engine: Engine) -> Iterator[str]:
    """Checks after each test that nothing is left of it, and that the next request is answered as ever."""
    url, operations = served
    yield url
    wait_until(lambda: not operations.in_flight)
    wait_until(lambda: not engine.has_work())
    service = operations._service
    assert service is not None
    wait_until(lambda: (service.num_waiting, service.num_running) == (0, 0))
    assert engine.kv_cache_usage == 0
    engine.pool.verify([engine.reuse.prefixes.slots])
    assert answer(url) == EXPECTED.setdefault("answer", answer(url))


EXPECTED: dict[str, str] = {}


def answer(url: str) -> str:
    body = {"messages": [{"role": "user", "content": "The grass is green."}], "max_tokens": 4, "temperature": 0}
    response = httpx.post(f"{url}{CHAT}", json=body, timeout=60)
    assert response.status_code == 200
    return response.json()["choices"][0]["message"]["content"]


def message(**values: Any) -> bytes:
    long = [{"role": "user", "content": "Read me. " * 30}]
    return json.dumps({"messages": long, "max_tokens": 1500, "ignore_eos": True, "temperature": 0, **values}).encode()


def connect(url: str, body: bytes, *, announced: int | None = None, receive_buffer: int | None = None) -> socket.socket:
    """A POST to the chat route whose answer is read by nobody."""
    parts = httpx.URL(url)
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect((parts.host, parts.port))
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {parts.host}\r\nContent-Length: {len(body) if announced is None else announced}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def aborted(url: str) -> float:
    (line,) = [line for line in httpx.get(f"{url}/metrics").text.splitlines() if 'request_success_total{finished_reason="abort"' in line]
    return float(line.split()[-1])


# Leaving


def test_leaving_before_the_body_is_there(url: str, served: tuple[str, Operations]) -> None:
    with closing(connect(url, message()[:40], announced=1000)):
        wait_until(lambda: len(served[1].in_flight) == 1)


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_while_the_prompt_becomes_tokens(url: str, engine: Engine, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here nothing of the answer has begun yet, so nothing of it can end."""
    encode, entered, gate = engine.chat_template.encode, threading.Event(), threading.Event()

    def slow_encode(*args: Any, **kwargs: Any) -> Any:
        entered.set()
        assert gate.wait(20)
        return encode(*args, **kwargs)

    before = aborted(url)
    monkeypatch.setattr(engine.chat_template, "encode", slow_encode)
    with Held(engine) as held:
        with closing(connect(url, message(stream=stream))):
            assert entered.wait(20)
        # The server must know that the client is gone before it has a request to give to the engine.
        assert httpx.get(f"{url}/health").status_code == 200
        gate.set()
        held.wait_for_work()
        wait_until(lambda: all(request.aborted.is_set() for request in list(engine._known.values())))
    wait_until(lambda: aborted(url) == before + 1)


@pytest.mark.parametrize("stream", [True, False])
def test_leaving_the_queue(url: str, engine: Engine, stream: bool) -> None:
    before = aborted(url)
    with Held(engine) as held:
        with closing(connect(url, message(stream=stream))):
            held.wait_for_work()
        wait_until(lambda: all(request.aborted.is_set() for request in list(engine._known.values())))
    wait_until(lambda: aborted(url) == before + 1)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("stage", ["prefill", "answer"])
def test_leaving_while_the_engine_works(url: str, engine: Engine, stream: bool, stage: str) -> None:
    before = aborted(url)
    engine.reset_prefix_cache()
    with Slowly(engine, 0.05 if stage == "prefill" else 0.005), closing(connect(url, message(stream=stream))):

        def there() -> bool:
            for request in list(engine._known.values()):
                if request.num_generated > 2 if stage == "answer" else 0 < request.unread_tokens < request.num_prompt_tokens:
                    return True
            return False

        wait_until(there)
    wait_until(lambda: aborted(url) == before + 1)


def test_many_leave_at_random_moments_and_others_are_answered(url: str, engine: Engine) -> None:
    generator = random.Random(7)
    connections: list[socket.socket] = []
    expected = answer(url)
    with Slowly(engine, 0.001):
        for number in range(60):
            connections.append(connect(url, message(stream=number % 2 == 0, max_tokens=generator.choice((1, 20, 500)))))
            while connections and generator.random() < 0.6:
                connections.pop(generator.randrange(len(connections))).close()
            if number % 20 == 10:
                for connection in connections:
                    connection.close()
                connections.clear()
                assert answer(url) == expected
        for connection in connections:
            connection.close()


# Slowness


def test_who_does_not_read_holds_up_nobody(engine: Engine) -> None:
    """The answer is longer than every buffer on its way: the engine finishes it all the same, and the rest waits in the stream's queue."""
    app = create_app(lambda: engine, model_name="tiny")
    in_flight = app.state.zen_turbo.operations.in_flight
    with serving(app, send_buffer_bytes=4096) as url:
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 200)
        with closing(connect(url, message(stream=True), receive_buffer=2048)):
            wait_until(lambda: engine.has_work())
            answer(url)
            wait_until(lambda: not engine.has_work(), 60)
            answer(url)
            wait_until(lambda: len(in_flight) == 1)  # and not 0: it is slow
        wait_until(lambda: not in_flight)


def test_slow_senders_hold_up_nobody(url: str, served: tuple[str, Operations]) -> None:
    connections = [connect(url, b"{", announced=100) for _ in range(50)]
    try:
        wait_until(lambda: len(served[1].in_flight) == 50)
        answer(url)
    finally:
        for connection in connections:
            connection.close()


# Bodies


def expect_refusal(response: httpx.Response) -> dict[str, Any]:
    assert 400 <= response.status_code < 500, (response.status_code, response.request.content[:500])
    error = response.json()["error"]
    assert {"message", "type", "param", "code"} <= set(error) and isinstance(error["message"], str) and isinstance(error["code"], str)
    return error


class Malformed:
    """Bodies that are almost requests: cut, with bytes changed, with values of other types, of other sizes, in other places."""

    STRANGE: tuple[Any, ...] = (
        *(None, True, -1, 0, 2**63, 2**200, -(2**70), 1e308, float("nan"), float("inf")),
        *("", "x" * 1000, "\x00", "\ud800", "𝕏" * 50, "<|im_end|>", "user", b""),
        *([], [[]], [None], [1e9], {}, {"type": "text"}, {"": ""}, [{}], [["user", "x"]]),
        *([{"role": "user"}], [{"content": "x"}], [{"role": "user", "content": None}], [{"role": 7, "content": "x"}]),
        *([{"role": "user", "content": {"a": 1}}], [{"role": "tool", "content": "x", "tool_calls": 5}]),
        *([{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": [{"type": "text", "text": 5}]}]),
    )
    FIELDS = """messages model max_tokens max_completion_tokens temperature top_p top_k min_p seed stop stop_token_ids ignore_eos stream
        stream_options return_progress sse_ping_interval add_generation_prompt chat_template_kwargs enable_thinking n logit_bias tools
        response_format prompt tokens add_special_tokens return_token_strs logprobs top_logprobs user metadata x input instructions text reasoning
        tool_choice echo structured_outputs max_output_tokens""".split()

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def __call__(self) -> bytes:
        value: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi."}], "prompt": "Hi.", "input": "Hi.", "max_tokens": 2}
        for _ in range(self._random.choice((0, 1, 1, 2, 4))):
            value[self._random.choice(self.FIELDS)] = self._strange()
        content = json.dumps(value, ensure_ascii=self._random.random() < 0.8, default=str).encode("utf-8", "surrogatepass")
        for _ in range(self._random.choice((0, 0, 1, 3))):
            content = self._damaged(content)
        return content

    def _strange(self) -> Any:
        value = self._random.choice(self.STRANGE)
        for _ in range(self._random.choice((0, 0, 0, 1, 2))):
            value = [value] if self._random.random() < 0.5 else {"a": value}
        return value

    def _damaged(self, content: bytes) -> bytes:
        at = self._random.randrange(len(content) + 1)
        return self._random.choice(
            (
                content[:at],
                content[:at] + bytes([self._random.randrange(256)]) + content[at + 1 :],
                content[:at] + self._random.randbytes(5) + content[at:],
                content[:at] + content[: self._random.randrange(30)] + content[at:],
                content + content,
                content[:at] + self._random.choice((b"[", b"{", b'"', b"}", b",", b"null", b"1e999", b"\\u0000", b"\\ud800")) + content[at:],
            )
        )


def test_a_thousand_malformed_bodies(url: str) -> None:
    make, refused = Malformed(1), 0
    with httpx.Client(base_url=url, timeout=60) as client:
        for number in range(1000):
            response = client.post(ROUTES[number % len(ROUTES)] if number % 2 else CHAT, content=make())
            if response.status_code == 200:  # it happens that damage does none
                assert response.content
                continue
            expect_refusal(response)
            refused += 1
    assert refused > 600


@pytest.mark.parametrize("path", ROUTES)
def test_what_is_no_object_is_refused(url: str, path: str) -> None:
    for body in (b"", b"null", b"[]", b"7", b'"x"', b"{" * 50, b"\xff\xfe{}", b"{}" * 2, b'{"messages": [' + b"[" * 100 + b"]" * 100 + b"]}"):
        assert expect_refusal(httpx.post(f"{url}{path}", content=body))["code"] in ("invalid_request", "empty_prompt")


def test_nesting_of_a_hundred_levels_is_refused_wherever_it_is(url: str) -> None:
    nest: Any = "x"
    for _ in range(100):
        nest = {"a": nest}
    for values in ({"messages": [nest]}, {"messages": [{"role": "user", "content": nest}]}, {"stop": nest}, {"chat_template_kwargs": [nest]}):
        assert httpx.post(f"{url}{CHAT}", content=message(**values)).status_code == 400
    assert httpx.post(f"{url}{CHAT}", content=message(max_tokens=2, metadata=nest), timeout=60).status_code == 200, "it has no effect"


def test_five_megabytes_hold_up_nobody(url: str) -> None:
    big = message(max_tokens=2, metadata=[{"text": "The sky is blue. "}] * 200_000)
    assert len(big) > 5_000_000
    statuses: list[int] = []
    threads = [threading.Thread(target=lambda: statuses.append(httpx.post(f"{url}{CHAT}", content=big, timeout=60).status_code)) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert httpx.get(f"{url}/health", timeout=60).status_code == 200
    assert statuses == [200] * 4
