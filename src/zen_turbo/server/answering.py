"""Running requests for a route: submitting the choices of one body, streaming their events, or waiting for all of them.

A route writes what it sends through a ``Writer``. Whatever happens, every request that was submitted ends: it finishes, fails, or is cancelled
because its client left, or because another choice of the same body failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request, Response

from zen_turbo.engine.request import Event, Failed, Finished, SamplingParams
from zen_turbo.engine.service import EngineService, RequestStream
from zen_turbo.errors import ZenTurboError
from zen_turbo.server import errors
from zen_turbo.server.schemas import GenerationRequest
from zen_turbo.server.served import ServedModel
from zen_turbo.server.slow_answers import CancellingResponse, answer_when_done

# Some clients count parsed chunks, not bytes: after this long without one they get an empty one.
EMPTY_CHUNK_AFTER_S = 60.0
DONE = b"data: [DONE]\n\n"

T = TypeVar("T")


class Writer(Protocol):
    """Turns the events of one body's choices into what is sent. ``take`` is given every event but Failed; its result is sent if the answer is
    streamed and thrown away if it is not."""

    def begin(self) -> list[bytes]: ...
    def take(self, choice: int, event: Event) -> list[bytes]: ...
    def pause(self) -> list[bytes]:
        """A chunk that says nothing."""
        ...

    def fail(self, error: Exception) -> list[bytes]: ...
    def end(self) -> list[bytes]: ...
    def whole(self) -> dict[str, Any]:
        """The answer as one object, after every choice has finished."""
        ...


def post(app: FastAPI, path: str, handler: Callable[[Request], Awaitable[Response]]) -> None:
    """A route whose every failure leaves as OpenAI's error. Caught here and not in a handler of the framework, which raises again what a handler
    of Exception has answered; that costs the connection."""

    @app.post(path)
    async def route(request: Request) -> Response:
        try:
            return await handler(request)
        except Exception as error:
            return errors.answer_to(request, error)


@contextlib.contextmanager
def named(**names: str) -> Iterator[None]:
    """Errors that name a field of the engine leave with the name that the body has for it."""
    try:
        yield
    except ZenTurboError as error:
        error.param = names.get(error.param or "", error.param)
        raise


def submit_choices(service: EngineService, prompt: Sequence[int], sampling: SamplingParams, *, n: int, request_id: str) -> list[RequestStream]:
    """``n`` answers to one prompt; a seed counts up. All or none: raises what ``service.submit`` raises."""
    streams: list[RequestStream] = []
    try:
        for choice in range(n):
            seed = None if sampling.seed is None else (sampling.seed + choice + 2**63) % 2**64 - 2**63
            own = request_id if n == 1 else f"{request_id}-{choice}"
            streams.append(service.submit(prompt, dataclasses.replace(sampling, seed=seed), request_id=own))
    except BaseException:
        cancel_all(streams)
        raise
    return streams


def cancel_all(streams: Sequence[RequestStream]) -> None:
    for stream in streams:
        stream.cancel()


async def respond(request: Request, served: ServedModel, asked: GenerationRequest, streams: Sequence[RequestStream], writer: Writer) -> Response:
    """The response to a body, ``asked``, whose requests are submitted."""

    def cancel() -> None:
        cancel_all(streams)

    if asked.stream:
        body = stream_body(streams, writer, keep_alive_s=asked.sse_ping_interval or served.keep_alive_s)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return CancellingResponse(body, cancel=cancel, media_type="text/event-stream", headers=headers)
    pad = served.operations.settings.pad_slow_answers
    return await answer_when_done(request, whole_answer(streams, writer), cancel=cancel, pad=pad)


def sse(value: Mapping[str, Any], *, event: str | None = None) -> bytes:
    name = f"event: {event}\n".encode() if event else b""
    return name + b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"


async def stream_body(streams: Sequence[RequestStream], writer: Writer, *, keep_alive_s: float) -> AsyncIterator[bytes]:
    """The body of a streamed answer, to its end or the first error. Whoever sends it cancels the requests that are still running then."""
    for part in writer.begin():
        yield part
    last_chunk = time.monotonic()
    async for choice, event in _merged(streams, keep_alive_s):
        if event is None:
            if time.monotonic() - last_chunk < EMPTY_CHUNK_AFTER_S:
                yield b": keep-alive\n\n"
                continue
            parts = writer.pause()
        elif isinstance(event, Failed):
            for part in writer.fail(event.error):
                yield part
            return
        else:
            parts = writer.take(choice, event)
        for part in parts:
            yield part
            last_chunk = time.monotonic()
    for part in writer.end():
        yield part


async def whole_answer(streams: Sequence[RequestStream], writer: Writer) -> dict[str, Any]:
    """The answer when all have ended. Raises the first error that one failed with; that, and cancelling this, cancels the others."""
    ended: set[int] = set()
    try:
        async for choice, event in _merged(streams, None):
            if isinstance(event, Failed):
                raise event.error
            assert event is not None
            writer.take(choice, event)
            if isinstance(event, Finished):
                ended.add(choice)
    finally:
        cancel_all([stream for choice, stream in enumerate(streams) if choice not in ended])
    return writer.whole()


async def _merged(streams: Sequence[RequestStream], pause_s: float | None) -> AsyncIterator[tuple[int, Event | None]]:
    """(number of the stream, event) of all streams as they come, and (0, None) whenever nothing has come for ``pause_s``."""
    events = [aiter(stream) for stream in streams]
    pending: dict[asyncio.Task[Event], int] = {}

    def ask(choice: int) -> None:
        pending[asyncio.ensure_future(anext(events[choice]))] = choice

    try:
        for choice in range(len(streams)):
            ask(choice)
        while pending:
            done, _ = await asyncio.wait(pending, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                yield 0, None
            for task in sorted(done, key=pending.__getitem__):
                choice = pending.pop(task)
                try:
                    event = task.result()
                except StopAsyncIteration:
                    continue
                ask(choice)
                yield choice, event
    finally:
        for task in pending:
            task.cancel()
