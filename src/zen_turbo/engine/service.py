"""Runs the engine in a thread of its own and hands each request a stream of events, for threads and for asyncio."""

from __future__ import annotations

import asyncio
import functools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Protocol

from zen_turbo.engine import memory
from zen_turbo.engine.request import Event, Failed, Finished, SamplingParams
from zen_turbo.errors import RateLimitExceededError, RequestCancelledError

logger = logging.getLogger("zen_turbo.engine")

RETRY_AFTER_S = 30  # where nothing is known yet
# Clients wait for what they are told only up to two minutes; beyond that they fall back to fractions of a second.
MOST_RETRY_AFTER_S = 120
IDLE_S = 1.0  # a pause is not the time between two questions of a client that asks without pause


class SteppedEngine(Protocol):
    """What the service needs of an engine."""

    def submit(
        self, prompt_token_ids: Sequence[int], sampling: SamplingParams, *, request_id: str | None, on_event: Callable[[Event], None]
    ) -> str: ...
    def step(self) -> bool: ...
    def abort(self, request_id: str) -> bool: ...
    def has_work(self) -> bool: ...
    def fail_all(self, error: Exception) -> None: ...


class Watcher(Protocol):
    """Told of one request, beside its stream and before it. Must not raise and must be quick: ``on_event`` runs on the engine's thread."""

    def on_event(self, event: Event) -> None: ...
    def on_refused(self) -> None:
        """The engine did not take the request; no event comes."""


class _Place:
    """What the service knows of one request from ``submit`` to its last event."""

    def __init__(self, stream: RequestStream, watcher: Watcher | None) -> None:
        self.stream = stream
        self.watcher = watcher


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
    request, and the service goes on.

    max_queue: most requests that wait before their prompt is begun; None is no limit. watch: called by ``submit`` in its caller's context, gives
    who is told of the request's events.
    """

    def __init__(self, engine: SteppedEngine, *, max_queue: int | None = None, watch: Callable[[], Watcher] | None = None) -> None:
        self.engine = engine
        self._max_queue = max_queue
        self._watch = watch
        self._work = threading.Condition()
        # Every request that has not had its last event, and those of them that have had none. Filled by submit, under the condition; emptied by
        # the engine's thread. A request leaves with its event, so it leaves once.
        self._live: set[_Place] = set()
        self._waiting: set[_Place] = set()
        self._request_s: float | None = None  # running mean of how long a request is worked on
        self._end: RequestCancelledError | None = None
        self._thread = threading.Thread(target=self._run, name="zen-turbo-engine", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Requests whose prompt is not begun."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests whose prompt is being read or that are being answered."""
        return max(0, len(self._live) - len(self._waiting))

    @property
    def retry_after_s(self) -> int:
        """Seconds until a place in the queue is likely to be free: a request's usual time over how many are worked on, between 1 and
        MOST_RETRY_AFTER_S."""
        if self._request_s is None:
            return RETRY_AFTER_S
        return min(MOST_RETRY_AFTER_S, max(1, round(self._request_s / max(1, self.num_running))))

    def submit(
        self, prompt_token_ids: Sequence[int], sampling: SamplingParams | None = None, *, request_id: str | None = None
    ) -> RequestStream:
        """Queue a request. Raises what ``engine.submit`` raises, RateLimitExceededError when the queue is full, and RequestCancelledError
        after ``close``."""
        place = _Place(RequestStream(self.engine.abort), self._watch() if self._watch else None)
        try:
            with self._work:
                if self._end is not None:
                    raise self._end.with_traceback(None)
                if self._max_queue is not None and len(self._waiting) >= self._max_queue:
                    raise RateLimitExceededError(
                        f"{len(self._waiting)} requests are waiting, and at most {self._max_queue} may.",
                        reason="max_queue",
                        limit=self._max_queue,
                        retry_after_s=self.retry_after_s,
                    )
                self._live.add(place)
                self._waiting.add(place)  # before the engine has it: its first event may come at once
                place.stream.request_id = self.engine.submit(
                    prompt_token_ids,
                    sampling or SamplingParams(),
                    request_id=request_id,
                    on_event=functools.partial(self._pass_on, place),
                )
                self._work.notify()
        except BaseException:
            self._leave(place)
            if place.watcher is not None:
                place.watcher.on_refused()
            raise
        return place.stream

    def close(self, error: RequestCancelledError | None = None) -> None:
        """Stop the thread before the next layer or token; unfinished requests end with ``error``. Later calls change nothing."""
        with self._work:
            self._end = self._end or error or RequestCancelledError("The engine is shutting down.")
            self._work.notify()
        for place in list(self._live):
            place.stream.cancel()  # a layer is seconds, a chunk far into a prompt is a minute
        self._thread.join()

    def _pass_on(self, place: _Place, event: Event) -> None:
        """On the engine's thread, for every event. What only watches is told first: when the client sees the end, it is counted."""
        self._waiting.discard(place)
        if isinstance(event, Finished):
            if self._end is not None and event.output.finish_reason == "abort":
                event = Failed(self._end)
            else:
                worked = event.output.metrics.prefill_s + event.output.metrics.decode_s
                self._request_s = worked if self._request_s is None else 0.8 * self._request_s + 0.2 * worked
        if isinstance(event, Finished | Failed):
            self._leave(place)
        if place.watcher is not None:
            try:
                place.watcher.on_event(event)
            except Exception:
                logger.exception("A request could not be observed.")
        place.stream.put(event)

    def _leave(self, place: _Place) -> None:
        self._live.discard(place)
        self._waiting.discard(place)

    def _wait_for_work(self) -> bool:
        """Blocks until this service has some; False: it ends. Freed memory is handed back once in a pause, when nobody waits for it."""

        def woken() -> bool:
            return self._end is not None or (bool(self._live) and self.engine.has_work())

        with self._work:
            if self._work.wait_for(woken, IDLE_S):
                return self._end is None
        memory.release_freed()
        with self._work:
            self._work.wait_for(woken)
            return self._end is None

    def _run(self) -> None:
        while self._wait_for_work():
            try:
                self.engine.step()
            except Exception as error:
                logger.exception("The engine failed; all running requests end with this error.")
                self.engine.fail_all(error)
        self.engine.fail_all(self._end)
