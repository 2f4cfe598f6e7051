"""Responses that take long, against a client made of two functions, and padded ones against the real client's timeout."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import Request
from serving import Held, serving, wait_until

from zen_turbo import LLM
from zen_turbo.engine.engine import Engine
from zen_turbo.errors import InsufficientMemoryError
from zen_turbo.server.app import create_app
from zen_turbo.server.settings import ServerSettings
from zen_turbo.server.slow_answers import CancellingResponse, answer_when_done

CHAT = "/v1/chat/completions"
STREAMED: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "Hi."}], "n": 2},
    "/v1/completions": {"prompt": "Hi.", "n": 2},
    "/v1/responses": {"input": "Hi."},
}
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "The grass is green."}], "max_tokens": 3, "temperature": 0}


class Client:
    """The other end of one request. ``leave``: it is gone. ``blocked``: it takes nothing more."""

    def __init__(self, *, timeout: str | None = None) -> None:
        headers = [] if timeout is None else [(b"x-stainless-read-timeout", timeout.encode())]
        self.scope = {"type": "http", "method": "POST", "path": "/", "headers": headers, "asgi": {"spec_version": "2.3"}}
        self.gone = asyncio.Event()
        self.blocked = False
        self.messages: list[dict[str, Any]] = []
        self.request = Request(self.scope, self.receive)

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self.blocked and message["type"] == "http.response.body":
            await asyncio.Event().wait()
        self.messages.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)


def test_who_leaves_while_a_chunk_is_on_its_way_ends_the_work() -> None:
    async def run() -> None:
        cancelled: list[bool] = []

        async def content() -> AsyncIterator[bytes]:
            while True:
                yield b"chunk"

        kept = content()  # so that the garbage collector cannot do what the response must
        client = Client()
        client.blocked = True
        response = asyncio.ensure_future(
            CancellingResponse(kept, cancel=lambda: cancelled.append(True))(client.scope, client.receive, client.send)
        )
        await asyncio.sleep(0)
        assert not cancelled
        client.gone.set()
        await response
        assert cancelled == [True]
        await kept.aclose()

    asyncio.run(run())


@pytest.mark.parametrize("timeout", [None, "600", "0.02"])
def test_work_ends_with_the_client(timeout: str | None) -> None:
    async def run() -> None:
        client, cancelled, ended = Client(timeout=timeout), [], []

        async def work() -> dict[str, Any]:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                ended.append(True)
                raise
            return {}

        async def respond() -> None:
            response = await answer_when_done(client.request, work(), cancel=lambda: cancelled.append(True))
            await response(client.scope, client.receive, client.send)

        responding = asyncio.ensure_future(respond())
        while timeout == "0.02" and client.body.count(b" ") < 3:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0)
        client.gone.set()
        await responding
        await asyncio.sleep(0)
        assert cancelled == ended == [True]
        assert client.messages[0]["status"] == (200 if timeout == "0.02" else 499)

    asyncio.run(run())


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("timeout", [None, "nan", "-1", "0", "soon", "1e9"])
def test_who_does_not_give_up_soon_gets_no_spaces(timeout: str | None, pad: bool) -> None:
    async def run() -> None:
        client = Client(timeout=timeout)

        async def work() -> dict[str, Any]:
            await asyncio.sleep(0.02)
            raise InsufficientMemoryError("It", need_bytes=2, have_bytes=1)

        with pytest.raises(InsufficientMemoryError):  # as an exception, so that the status can tell
            await answer_when_done(client.request, work(), cancel=lambda: None, pad=pad)

    asyncio.run(run())


@pytest.mark.parametrize("fails", [False, True])
def test_spaces_then_one_json_value(fails: bool) -> None:
    async def run() -> None:
        client, gate = Client(timeout="0.02"), asyncio.Event()

        async def work() -> dict[str, Any]:
            await gate.wait()
            if fails:
                raise InsufficientMemoryError("It", need_bytes=2, have_bytes=1)
            return {"text": "Äpfel"}

        response = await answer_when_done(client.request, work(), cancel=lambda: pytest.fail("it was done"))
        sending = asyncio.ensure_future(response(client.scope, client.receive, client.send))
        while len(client.body) < 3:
            await asyncio.sleep(0.001)
        assert client.body.strip() == b""
        gate.set()
        await sending
        value = json.loads(client.body)
        assert value["error"]["code"] == "insufficient_memory" if fails else value == {"text": "Äpfel"}
        assert dict(client.messages[0]["headers"])[b"content-type"] == b"application/json"

    asyncio.run(run())


# Through the server


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    return LLM(tiny_folder, prefill_chunk_tokens=128, kv_cache_bytes=64 << 20, max_model_len=1024).engine


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])  # how Starlette learns that a client left: from receive, or from send
@pytest.mark.parametrize(("path", "body"), STREAMED.items(), ids=["chat", "completions", "responses"])
def test_a_stream_that_never_began_cancels_its_requests(engine: Engine, path: str, body: dict[str, Any], spec_version: str) -> None:
    """The client leaves between the submission and the first byte: no generator has run that could notice."""
    app = create_app(lambda: engine, model_name="tiny")
    served = app.state.zen_turbo
    served.start()
    wait_until(lambda: served.ready)
    content, sent = [json.dumps({**body, "stream": True}).encode()], []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": content.pop()} if content else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)
        raise OSError

    scope = {"type": "http", "asgi": {"spec_version": spec_version}, "method": "POST", "path": path, "query_string": b"", "headers": []}
    try:
        with Held(engine):
            with contextlib.suppress(OSError):
                asyncio.run(app(scope, receive, send))
            assert [message["type"] for message in sent] == ["http.response.start"] and sent[0]["status"] == 200
            requests = list(engine._known.values())
            assert len(requests) == body.get("n", 1) and all(request.aborted.is_set() for request in requests)
        wait_until(lambda: not engine.has_work())
    finally:
        served.close()


@pytest.fixture(scope="module", params=[True, False], ids=["padded", "silent"])
def url(engine: Engine, request: pytest.FixtureRequest) -> Iterator[tuple[str, bool]]:
    app = create_app(lambda: engine, model_name="tiny", settings=ServerSettings(pad_slow_answers=request.param))
    with serving(app) as base:
        wait_until(lambda: httpx.get(f"{base}/health").status_code == 200)
        yield base, request.param


def test_a_client_outwaits_its_own_timeout(url: tuple[str, bool], engine: Engine) -> None:
    """Held four times as long as the client waits for a byte."""
    base, padded = url
    with openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=0.5) as client, Held(engine) as held:
        timer = threading.Timer(2.0, lambda: held.steps(1000))
        timer.start()
        try:
            if padded:
                answer = client.chat.completions.create(model="tiny", **BODY)
                assert answer.usage is not None and answer.usage.completion_tokens == 3
            else:
                with pytest.raises(openai.APITimeoutError):
                    client.chat.completions.create(model="tiny", **BODY)
        finally:
            timer.join()
