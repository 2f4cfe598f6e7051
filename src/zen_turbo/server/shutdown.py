"""Ending without cutting answers off: a signal closes the door, what runs may finish, what does not is told why, and only then the server ends.

A second signal ends the process at once, whatever it is doing; the page store is safe at any moment.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

logger = logging.getLogger("zen_turbo.server")

# For answers that were aborted to leave through their connections; whoever reads slower is cut off.
GRACE_S = 5.0


class Drain:
    """Whether the server is ending, and how long running answers still have. ``closing`` is None before, then seconds left, 0 at the end."""

    def __init__(self, drain_s: float) -> None:
        self._drain_s = drain_s
        self._deadline: float | None = None

    def begin(self) -> None:
        if self._deadline is None:
            self._deadline = time.monotonic() + self._drain_s

    def closing(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())


class DrainingServer(uvicorn.Server):
    """drain: begun by the first signal. in_flight: how many requests have no complete response. abort: ends every running answer with an error;
    may block. Listening goes on while answers finish, so that whoever comes is told to come back instead of being refused by the system."""

    def __init__(self, config: uvicorn.Config, *, drain: Drain, in_flight: Callable[[], int], abort: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain = drain
        self._in_flight = in_flight
        self._abort = abort

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._drain.closing() is not None:
            os._exit(128 + sig)  # threads may be anywhere, deep in a kernel too: nothing that waits for them is "at once"
        self._drain.begin()
        count = self._in_flight()
        logger.info("%s: ending%s", signal.Signals(sig).name, f" when {count} requests are answered; again to end now" if count else "")

    async def on_tick(self, counter: int) -> bool:
        left = self._drain.closing()
        if left is not None and not self.should_exit:
            if self._in_flight() == 0:
                self.should_exit = True
            elif left == 0:
                logger.warning("%d requests did not end in time and are aborted", self._in_flight())
                await asyncio.to_thread(self._abort)
                self.should_exit = True
        return await super().on_tick(counter)
