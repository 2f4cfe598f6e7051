"""Runs the engine in a thread of its own and hands each request a stream of events, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Protocol

from zen_turbo.engine.request import Event, Failed, Finished, SamplingParams
from zen_turbo.errors import RequestCancelledError

logger = logging.getLogger("zen_turbo.engine")


class SteppedEngine(Protocol):
    """What the service needs of an engine."""

    def submit(
        self, prompt_token_ids: Sequence[int], sampling: SamplingParams, *, request_id: str | None, on_event: Callable[[Event], None]
    ) -> str: ...
    def step(self) -> bool: ...
    def abort(self, request_id: str) -> bool: ...
    def has_work(self) -> bool: ...
    def fail_all(self, error: Exception) -> None: ...


class RequestStream:
    """Events of one request, in order; ends after Finished or Failed. Iterate it once, either with ``for`` or with ``async for``."""

    def __init__(self, abort: Callable[[str], object]) -> None:
        self.request_id = ""
        self._abort = abort
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._wake: Callable[[], None] | None = None

    def put(self, event: Event) -> None:
        """Called by the engine's thread."""
        self._events.put(event)
        with self._lock:
            wake = self._wake
        if wake is not None:
            wake()

    def cancel(self) -> None:
        """Ask the engine to end the request; the stream still ends with Finished (reason "abort") or Failed."""
        self._abort(self.request_id)

    def __iter__(self) -> Iterator[Event]:
        while True:
            event = self._events.get()
            yield event
            if isinstance(event, Finished | Failed):
                return

    async def __aiter__(self) -> AsyncIterator[Event]:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()

        def wake() -> None:
            try:
                loop.call_soon_threadsafe(ready.set)
            except RuntimeError:  # the loop is closed: nobody listens any more
                self.cancel()

        with self._lock:
            self._wake = wake
        while True:
            ready.clear()
            while True:
                try:
                    event = self._events.get_nowait()
                except queue.Empty:
                    break
                yield event
                if isinstance(event, Finished | Failed):
                    return
            await ready.wait()


class EngineService:
    """Owns the thread that calls ``engine.step()``. An exception out of ``step`` is a fault of ours: it is logged, fails every running
    request, and the service goes on."""

    def __init__(self, engine: SteppedEngine) -> None:
        self.engine = engine
        self._work = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="zen-turbo-engine", daemon=True)
        self._thread.start()

    def submit(
        self, prompt_token_ids: Sequence[int], sampling: SamplingParams | None = None, *, request_id: str | None = None
    ) -> RequestStream:
        """Queue a request. Raises what ``engine.submit`` raises, and RequestCancelledError after ``close``."""
        stream = RequestStream(self.engine.abort)
        with self._work:
            if self._closed:
                raise RequestCancelledError("The engine is shutting down.")
            stream.request_id = self.engine.submit(
                prompt_token_ids, sampling or SamplingParams(), request_id=request_id, on_event=stream.put
            )
            self._work.notify()
        return stream

    def close(self) -> None:
        """Stop the thread after the unit of work it is in; unfinished requests end with RequestCancelledError."""
        with self._work:
            self._closed = True
            self._work.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._work:
                while not self._closed and not self.engine.has_work():
                    self._work.wait()
                if self._closed:
                    break
            try:
                self.engine.step()
            except Exception as error:
                logger.exception("The engine failed; all running requests end with this error.")
                self.engine.fail_all(error)
        self.engine.fail_all(RequestCancelledError("The engine is shutting down."))
