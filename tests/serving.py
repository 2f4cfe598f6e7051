"""An application behind a real socket in this process, and an engine that can be made slow."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from fastapi import FastAPI

from zen_turbo.cli.serve import listen
from zen_turbo.engine.engine import Engine
from zen_turbo.server.app import create_app
from zen_turbo.server.settings import ServerSettings

NAME = "tiny"
HELLO = [{"role": "user", "content": "The grass is green."}]


@contextmanager
def serving(app: FastAPI, *, send_buffer_bytes: int | None = None) -> Iterator[str]:
    """Gives the base URL."""
    listener = listen("127.0.0.1", 0)
    if send_buffer_bytes is not None:  # connections inherit it
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer_bytes)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()


def wait_until(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


@contextmanager
def served(engine: Engine) -> Iterator[str]:
    """The base URL of a server of its own, for an engine that is loaded already."""
    app = create_app(lambda: engine, model_name=NAME, keep_alive_s=0.2, default_max_tokens=32)
    with serving(app) as base:
        wait_until(lambda: httpx.get(f"{base}/health").status_code == 200)
        yield base


def client_of(base: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=60)


@contextmanager
def serving_client(engine: Engine) -> Iterator[openai.OpenAI]:
    with served(engine) as base, client_of(base) as client:
        yield client


def chat(client: openai.OpenAI, **values: Any) -> Any:
    return client.chat.completions.create(**{"model": NAME, "messages": HELLO, "temperature": 0, "max_tokens": 8, **values})


def refused(client: openai.OpenAI, kind: type[openai.APIStatusError], **values: Any) -> dict[str, Any]:
    with pytest.raises(kind) as caught:
        chat(client, **values)
    body = caught.value.body
    assert isinstance(body, dict) and {"message", "type", "param", "code"} <= set(body)
    return body


@contextmanager
def server(engine: Engine, **settings: Any) -> Iterator[httpx.Client]:
    """A client of a server of its own; settings: of ServerSettings."""
    app = create_app(lambda: engine, model_name=NAME, settings=ServerSettings(**settings))
    with serving(app) as url, httpx.Client(base_url=url, timeout=60) as client:
        wait_until(lambda: client.get("/health").status_code == 200)
        yield client


@contextmanager
def failing(engine: Engine) -> Iterator[None]:
    """Every request fails where nobody foresaw it, with a message that no client may see: "/secret/path"."""
    begin = engine.decoder.begin

    def faulty(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("/secret/path")

    engine.decoder.begin = faulty  # type: ignore[method-assign]
    try:
        yield
    finally:
        engine.decoder.begin = begin  # type: ignore[method-assign]


class Slowly:
    """Makes every layer of the engine wait."""

    def __init__(self, engine: Engine, seconds: float) -> None:
        self._engine, self._seconds, self._layer = engine, seconds, engine.decoder._layer

    def __enter__(self) -> None:
        def layer(*args: Any, **settings: Any) -> Any:
            time.sleep(self._seconds)
            return self._layer(*args, **settings)

        self._engine.decoder._layer = layer  # type: ignore[method-assign]

    def __exit__(self, *details: object) -> None:
        self._engine.decoder._layer = self._layer  # type: ignore[method-assign]


class Held:
    """Keeps the engine from doing anything at all until the end, or until ``steps`` units of work are let through."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._gate = threading.Semaphore(0)
        self._open = False

    def __enter__(self) -> Held:
        step = self._engine.step

        def held_step() -> bool:
            if not self._open:
                self._gate.acquire()
            return step()

        self._engine.step = held_step  # type: ignore[method-assign]
        return self

    def steps(self, count: int) -> None:
        self._gate.release(count)

    def wait_for_work(self, requests: int = 1) -> None:
        wait_until(lambda: len(self._engine._known) >= requests)

    def __exit__(self, *details: object) -> None:
        self._open = True
        self._gate.release()
        del self._engine.step  # type: ignore[method-assign]
