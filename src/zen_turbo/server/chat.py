"""Events of a request as OpenAI's objects: one JSON answer, or chunks of a stream."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from zen_turbo.engine.request import Event, Failed, Finished, PrefillProgress, RequestOutput, TokenDelta
from zen_turbo.engine.service import RequestStream
from zen_turbo.server.errors import error_body

# Some clients count parsed chunks, not bytes: after this long without one they get an empty one.
EMPTY_CHUNK_AFTER_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What all objects of one answer have in common."""

    request_id: str
    model: str
    include_usage: bool = False
    return_progress: bool = False
    created: int = field(default_factory=lambda: int(time.time()))

    def completion(self, output: RequestOutput) -> dict[str, Any]:
        message = {"role": "assistant", "content": output.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason(output)}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage(output), **extras(output)}

    def chunk(self, delta: dict[str, Any], finish: str | None = None, **more: Any) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **({"usage": None} if self.include_usage else {}), **more}

    def progress(self, event: PrefillProgress) -> dict[str, Any]:
        """llama-server's shape; processed includes cache."""
        facts = {
            "total": event.total_tokens,
            "cache": event.cached_tokens,
            "processed": event.processed_tokens,
            "time_ms": round(1000 * event.elapsed_s),
        }
        return {**self._head("chat.completion.chunk"), "choices": [], "prompt_progress": facts}

    def usage_chunk(self, output: RequestOutput) -> dict[str, Any]:
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage(output)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.request_id, "object": kind, "created": self.created, "model": self.model}


def finish_reason(output: RequestOutput) -> str:
    return "length" if output.finish_reason == "length" else "stop"


def usage(output: RequestOutput) -> dict[str, Any]:
    written = len(output.token_ids)
    return {
        "prompt_tokens": output.prompt_tokens,
        "completion_tokens": written,
        "total_tokens": output.prompt_tokens + written,
        "prompt_tokens_details": {"cached_tokens": output.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


def extras(output: RequestOutput) -> dict[str, Any]:
    """Ours, under one key; seconds."""
    metrics = output.metrics
    names = ("queue_s", "ttft_s", "prefill_s", "decode_s", "attend_s", "linear_s", "select_s", "density", "recall", "recall_p5", "decode_recall")
    return {"zen_turbo": {name: getattr(metrics, name) for name in names}}


def sse(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def stream_body(stream: RequestStream, reply: Reply, *, keep_alive_s: float) -> AsyncIterator[bytes]:
    """The body of a streamed answer. A client that leaves cancels this generator, and that cancels the request."""
    finished = False
    try:
        yield sse(reply.chunk({"role": "assistant", "content": ""}))
        last_chunk = time.monotonic()
        async for event in _with_pauses(stream, keep_alive_s):
            if event is None:
                if time.monotonic() - last_chunk < EMPTY_CHUNK_AFTER_S:
                    yield b": keep-alive\n\n"
                    continue
                yield sse(reply.chunk({}))
            elif isinstance(event, PrefillProgress):
                if not reply.return_progress:
                    continue
                yield sse(reply.progress(event))
            elif isinstance(event, TokenDelta):
                if not event.text:
                    continue
                yield sse(reply.chunk({"content": event.text}))
            elif isinstance(event, Failed):
                finished = True
                yield sse(error_body(event.error))
            else:
                assert isinstance(event, Finished)
                finished = True
                yield sse(reply.chunk({}, finish_reason(event.output), **extras(event.output)))
                if reply.include_usage:
                    yield sse(reply.usage_chunk(event.output))
            last_chunk = time.monotonic()
        yield b"data: [DONE]\n\n"
    finally:
        if not finished:
            stream.cancel()


async def _with_pauses(stream: RequestStream, pause_s: float) -> AsyncIterator[Event | None]:
    """The stream's events, and None whenever nothing has come for ``pause_s``."""
    events = aiter(stream)
    pending: asyncio.Task[Event] | None = None
    try:
        while True:
            if pending is None:
                pending = asyncio.ensure_future(anext(events))
            done, _ = await asyncio.wait({pending}, timeout=pause_s)
            if not done:
                yield None
                continue
            event, pending = pending, None
            try:
                value = event.result()
            except StopAsyncIteration:
                return
            yield value
    finally:
        if pending is not None:
            pending.cancel()


async def whole_answer(stream: RequestStream, reply: Reply) -> dict[str, Any]:
    """The answer when it is there. Raises the error that the request failed with."""
    async for event in stream:
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Finished):
            return reply.completion(event.output)
    raise AssertionError("a stream ends with Finished or Failed")
