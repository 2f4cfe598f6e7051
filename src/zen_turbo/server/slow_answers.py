"""Responses that take long: they end the work behind them when the client leaves, at whatever moment, and can keep a silent client waiting."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.types import Receive, Scope, Send

from zen_turbo.server import errors
from zen_turbo.server.exchange import CLIENT_LEFT

PAD_EVERY_S = 10.0


class CancellingResponse(StreamingResponse):
    """Calls ``cancel`` when it is over; of finished work it must do nothing. The generator of the content cannot be relied on for that: when the
    client leaves while a chunk is on its way out, nobody closes the generator but the garbage collector, some time."""

    def __init__(self, content: AsyncIterator[bytes], *, cancel: Callable[[], object], **options: Any) -> None:
        super().__init__(content, **options)
        self._cancel = cancel

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._cancel()


async def answer_when_done(
    request: Request, work: Coroutine[Any, Any, dict[str, Any]], *, cancel: Callable[[], object], pad: bool = True
) -> Response:
    """The JSON that ``work`` gives. Raises what it raises. A client that leaves ends it: ``cancel`` is called.

    pad: a client that says when it gives up (``x-stainless-read-timeout``, seconds without a byte) gets the status 200 after half of that, and a
    space now and then, which JSON allows before the value, until the answer is there. A failure after that can only be told in the body, as an
    error object under the status 200.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_client_left(request))
    patience = _read_timeout_s(request) / 2 if pad else math.inf
    handed_over = False

    def stop() -> None:
        if not task.done():
            task.cancel()
            cancel()

    try:
        await asyncio.wait({task, leaving}, timeout=None if patience == math.inf else patience, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return JSONResponse(task.result())
        if leaving.done():
            return Response(status_code=CLIENT_LEFT)  # nobody reads it
        handed_over = True
        body = _padded(request, task, min(PAD_EVERY_S, patience / 2))
        return CancellingResponse(body, cancel=stop, media_type="application/json", headers={"X-Accel-Buffering": "no"})
    finally:
        leaving.cancel()
        if not handed_over:
            stop()


async def _client_left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _read_timeout_s(request: Request) -> float:
    """Infinity where the client does not say that it gives up."""
    try:
        value = float(request.headers.get("x-stainless-read-timeout", "inf"))
    except ValueError:
        return math.inf
    return value if value > 0 else math.inf


async def _padded(request: Request, task: asyncio.Future[dict[str, Any]], every_s: float) -> AsyncIterator[bytes]:
    while not task.done():
        yield b" "
        await asyncio.wait({task}, timeout=every_s)
    try:
        value = task.result()
    except Exception as error:
        yield bytes(errors.answer_to(request, error).body)
        return
    yield json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
