"""One HTTP request and its response: what the log line and the metrics say of it. No content, ever.

The exchange of the request that is being handled is found through a context variable, which worker threads inherit; so routes need not carry it,
and a request that they hand to the engine is known to belong to it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from zen_turbo.engine.request import Event, Failed, Finished, RequestOutput
from zen_turbo.errors import ZenTurboError

current: ContextVar[Exchange | None] = ContextVar("zen_turbo_exchange", default=None)

CLIENT_LEFT = 499


@dataclass(eq=False, kw_only=True)
class Exchange:
    """``on_end`` is called once, when the response is over and so are the engine's requests; in whatever thread that happens."""

    request_id: str
    method: str
    path: str
    on_end: Callable[[Exchange], None]
    route: str | None = None
    status: int | None = None
    key_label: str | None = None
    client_left: bool = False
    error: Exception | None = None
    outputs: list[RequestOutput] = field(default_factory=list)
    accepted: int = 0  # requests that the engine took
    refused: bool = False  # the engine did not take one; what it took of the same body is cancelled
    duration_s: float = 0.0
    _began: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _open: int = 1  # the response, and each request that the engine has

    def engine_began(self) -> None:
        with self._lock:
            self._open += 1
            self.accepted += 1

    def engine_event(self, event: Event) -> None:
        if isinstance(event, Finished):
            self.outputs.append(event.output)
        elif isinstance(event, Failed):
            self.error = event.error
        else:
            return
        self._close_one()

    def engine_refused(self) -> None:
        with self._lock:
            self.accepted -= 1
            self.refused = True
        self._close_one()

    def response_ended(self) -> None:
        self.duration_s = time.monotonic() - self._began
        self._close_one()

    def _close_one(self) -> None:
        with self._lock:
            self._open -= 1
            ended = self._open == 0
        if ended:
            self.on_end(self)

    @property
    def facts(self) -> dict[str, Any]:
        """What is logged: only what is known. Tokens are sums over the engine's requests, ttft_s is the first one's."""
        outputs = self.outputs
        answered = [output for output in outputs if output.token_ids]
        error = self.error
        values = {
            "request_id": self.request_id,
            "method": self.method,
            "route": self.route or repr(self.path[:100])[1:-1],  # escaped: a path is a stranger's text
            "status": self.status if self.status is not None else CLIENT_LEFT,
            "duration_s": round(self.duration_s, 4),
            "key": self.key_label,
            "prompt_tokens": sum(output.prompt_tokens for output in outputs) if outputs else None,
            "cached_tokens": sum(output.cached_tokens for output in outputs) if outputs else None,
            "completion_tokens": sum(len(output.token_ids) for output in outputs) if outputs else None,
            "ttft_s": round(min(output.metrics.ttft_s for output in answered), 4) if answered else None,
            "finish_reason": ",".join(dict.fromkeys(output.finish_reason for output in outputs)) or None,
            "error": None if error is None else error.code if isinstance(error, ZenTurboError) else ZenTurboError.code,
            "client_left": self.client_left or None,
        }
        return {name: value for name, value in values.items() if value is not None}


def note_error(error: Exception) -> None:
    """The request that is being handled is answered with this error."""
    exchange = current.get()
    if exchange is not None:
        exchange.error = error
