"""Who may send what, checked before a route sees it: foreign pages, keys, how much at once, how large. Plain ASGI layers.

What each defends against, and what it does not, is in SECURITY.md.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zen_turbo.errors import ForbiddenOriginError, InvalidApiKeyError, RateLimitExceededError, RequestTooLargeError, ShuttingDownError, ZenTurboError
from zen_turbo.server import errors, page
from zen_turbo.server.exchange import current
from zen_turbo.server.keys import KeyRing

# No key is asked for these: monitors have none, and the page is where a person types it. Nothing here tells of anyone's requests.
OPEN_PATHS = frozenset({"/health", "/metrics", "/version"}) | page.paths()
UPLOADS = "/v1/files"
_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
# Bodies stay in memory until their request ends, so all of them together have a limit too, in units of the limit of one.
BODIES_IN_FLIGHT = 8
_RETRY_AFTER_S = 10


def _header(scope: Scope, name: bytes) -> bytes | None:
    """None unless it is there exactly once."""
    values = [value for key, value in scope["headers"] if key == name]
    return values[0] if len(values) == 1 else None


async def _refuse(error: ZenTurboError, scope: Scope, receive: Receive, send: Send, headers: dict[str, str] | None = None) -> None:
    response = errors.error_response(error)
    response.headers.update(headers or {})
    await response(scope, receive, send)


class Door:
    """Closed to all but monitors while the server shuts down. closing: whether it does, and for how many seconds more at most."""

    def __init__(self, app: ASGIApp, *, closing: Callable[[], float | None]) -> None:
        self._app = app
        self._closing = closing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in ("/metrics", "/version") and self._closing() is not None:
            await _refuse(ShuttingDownError("The server is shutting down."), scope, receive, send)
            return
        await self._app(scope, receive, send)


class OriginGuard:
    """For a server without keys, which any page in any browser on this machine could otherwise use. A request that changes something or costs
    something must come from no page, from our own, or from an allowed origin; and with ``loopback`` Host must name this machine, because a page
    whose own name was made to point here (DNS rebinding) is of one origin with us as far as its browser knows."""

    def __init__(self, app: ASGIApp, *, allow_origins: tuple[str, ...], loopback: bool) -> None:
        self._app = app
        self._allow_origins = frozenset(allow_origins)
        self._loopback = loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._objection(scope)) is not None:
            await _refuse(error, scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _objection(self, scope: Scope) -> ForbiddenOriginError | None:
        host = (_header(scope, b"host") or b"").decode("latin-1").lower()
        if self._loopback and not _names_this_machine(host):
            return ForbiddenOriginError(
                f"This server listens on this machine alone and is not called {host[:100]!r}; with an API key it answers to any name."
            )
        sent = [value for key, value in scope["headers"] if key == b"origin"]
        if scope["method"] in _SAFE_METHODS or not sent or "*" in self._allow_origins:
            return None
        origin = sent[0].decode("latin-1").lower()
        if len(sent) == 1 and (origin in self._allow_origins or urlsplit(origin).netloc == host != ""):
            return None
        return ForbiddenOriginError(f"Pages of {origin[:100]} may not use this server; start it with --allow-origin or with an API key.")


def _names_this_machine(host: str) -> bool:
    """An address, or localhost: what no name server can make point somewhere else. No Host at all is no browser."""
    if not host:
        return True
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class KeyGuard:
    """Asks for a key on every path but the open ones, and lets each key have ``most`` requests at a time. ``most`` None: any number."""

    def __init__(self, app: ASGIApp, *, keys: KeyRing, most: int | None) -> None:
        self._app = app
        self._keys = keys
        self._most = most
        self._in_flight: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._keys or scope["method"] == "OPTIONS" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        scheme, _, presented = (_header(scope, b"authorization") or b"").partition(b" ")
        label = self._keys.label_of(presented.strip()) if scheme.lower() == b"bearer" else None
        if label is None:
            said = "is not valid" if presented else "is missing: send it as Authorization: Bearer KEY"
            await _refuse(InvalidApiKeyError(f"The API key {said}."), scope, receive, send, {"WWW-Authenticate": "Bearer"})
            return
        if (exchange := current.get()) is not None:
            exchange.key_label = label
        if self._most is not None and self._in_flight[label] >= self._most:
            error = RateLimitExceededError(
                f"This API key has {self._in_flight[label]} requests under way, and at most {self._most} are allowed.",
                reason="max_requests_per_key",
                limit=self._most,
                retry_after_s=_RETRY_AFTER_S,
            )
            await _refuse(error, scope, receive, send)
            return
        self._in_flight[label] += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._in_flight[label] -= 1


class BodyLimit:
    """Refuses a body that is announced as too large before a byte of it is read, and stops reading one that turns out to be.

    limits: path prefix -> most bytes; the longest prefix that fits counts, else ``default``. Bodies of paths with the default limit, which are
    kept in memory, may have ``BODIES_IN_FLIGHT * default`` bytes together. Uploads are no bodies of this kind: their route writes them to the disk
    as they come and has limits of its own.
    """

    def __init__(self, app: ASGIApp, *, default: int, limits: tuple[tuple[str, int], ...] = ()) -> None:
        self._app = app
        self._default = default
        self._limits = sorted(limits, key=lambda item: -len(item[0]))
        self._in_memory = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == UPLOADS:
            await self._app(scope, receive, send)
            return
        own = next((most for prefix, most in self._limits if scope["path"].startswith(prefix)), None)
        limit = self._default if own is None else own
        # What is not digits, or more than twenty of them, does not come this far: the HTTP parser refuses it.
        announced = _header(scope, b"content-length")
        if announced is not None and announced.isdigit() and int(announced) > limit:
            await _refuse(RequestTooLargeError("The request body", num_bytes=int(announced), max_bytes=limit, param=None), scope, receive, send)
            return
        received = 0
        failure: ZenTurboError | None = None

        async def bounded_receive() -> Message:
            nonlocal received, failure
            if failure is not None:  # whoever goes on reading after an error gets it again
                raise failure
            message = await receive()
            if message["type"] == "http.request":
                size = len(message.get("body", b""))
                received += size
                if own is None:
                    self._in_memory += size
                if received > limit:
                    failure = RequestTooLargeError("The request body", num_bytes=received, max_bytes=limit, param=None)
                elif own is None and self._in_memory > BODIES_IN_FLIGHT * self._default:
                    failure = RateLimitExceededError(
                        f"The bodies of all requests under way have more than {BODIES_IN_FLIGHT * self._default} bytes.",
                        reason="body_bytes",
                        limit=BODIES_IN_FLIGHT * self._default,
                        retry_after_s=_RETRY_AFTER_S,
                    )
                if failure is not None:
                    raise failure
            return message

        try:
            await self._app(scope, bounded_receive, send)
        finally:
            if own is None:
                self._in_memory -= received
