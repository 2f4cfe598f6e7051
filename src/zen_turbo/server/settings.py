"""What an operator decides about the server, declared once and checked before anything is loaded."""

from __future__ import annotations

import re
from dataclasses import dataclass

from zen_turbo.errors import ConfigurationError
from zen_turbo.server.keys import KeyRing

DEFAULT_MAX_UPLOAD_BYTES = 150 << 20  # DashScope's limit of one document
DEFAULT_QUOTA_BYTES = 4 << 30


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Sizes ending in ``_bytes`` are bytes, ``_s`` seconds. Raises ConfigurationError.

    keys: who may send; empty is everyone. max_requests_per_key: most requests of one key at a time; None is no limit. max_queue: most requests
    that wait before their prompt is begun. body_limits: (path prefix, most bytes) for routes that take more or less than ``max_body_bytes``; the
    longest prefix that fits counts. allow_origins: web pages of other origins that may use the server. loopback: it listens on this machine
    alone, so names in Host headers that are not this machine's are somebody's trick. drain_s: how long running answers may go on once the server is
    told to end. pad_slow_answers: see ``slow_answers``.
    """

    keys: KeyRing = KeyRing()  # noqa: RUF009  (immutable)
    max_requests_per_key: int | None = None
    max_queue: int = 64
    max_body_bytes: int = 64 << 20
    body_limits: tuple[tuple[str, int], ...] = ()
    allow_origins: tuple[str, ...] = ()
    loopback: bool = False
    drain_s: float = 30.0
    pad_slow_answers: bool = True

    def __post_init__(self) -> None:
        if self.max_requests_per_key is not None and not self.keys:
            raise ConfigurationError("max_requests_per_key needs keys: without them requests belong to nobody.", param="max_requests_per_key")
        for name in ("max_requests_per_key", "max_queue", "max_body_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} must be at least 1, not {value}.", param=name)
        if not 0 <= self.drain_s < float("inf"):
            raise ConfigurationError(f"drain_s must be seconds, 0 or more, not {self.drain_s}.", param="drain_s")
        for origin in self.allow_origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s@?#*]+", origin):
                raise ConfigurationError(
                    f"allow_origin must be scheme://host or scheme://host:port as browsers send it, or *, not {origin!r}.", param="allow_origin"
                )
