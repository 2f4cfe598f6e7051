"""The outermost layer of the application: a request id for every request, an answer to what nobody caught, and one line in the log at its end."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from zen_turbo.server import errors
from zen_turbo.server.exchange import Exchange, current

logger = logging.getLogger("zen_turbo.access")

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:@/+=-]{1,128}")
# Asked every few seconds by machines; a failure of theirs is still shown.
_QUIET = frozenset({"/health", "/metrics"})


class Access:
    """Plain ASGI, as all layers here: Starlette's BaseHTTPMiddleware would hide that a client left.

    on_end: told of every exchange at its end, after the log.
    """

    def __init__(self, app: ASGIApp, *, on_end: Callable[[Exchange], None], in_flight: set[Exchange]) -> None:
        self._app = app
        self._on_end = on_end
        self._in_flight = in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(scope)
        exchange = Exchange(request_id=request_id, method=scope["method"], path=scope["path"], on_end=self._end)

        async def noting_receive() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not complete:
                exchange.client_left = True
            return message

        complete = False

        async def naming_send(message: Message) -> None:
            nonlocal complete
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                others = [(name, value) for name, value in message.get("headers", ()) if name.lower() != b"x-request-id"]
                message = {**message, "headers": [*others, (b"x-request-id", request_id.encode())]}
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                complete = True
            await send(message)

        token = current.set(exchange)
        self._in_flight.add(exchange)
        try:
            await self._app(scope, noting_receive, naming_send)
        except ClientDisconnect:
            exchange.client_left = True
        except Exception as error:
            if exchange.status is not None:  # too late for an answer; the server cuts the connection, so that nobody takes this for the end
                raise
            await errors.answer_to(Request(scope), error)(scope, receive, naming_send)
        finally:
            current.reset(token)
            self._in_flight.discard(exchange)
            exchange.route = getattr(scope.get("route"), "path", None)
            exchange.response_ended()

    def _end(self, exchange: Exchange) -> None:
        facts = exchange.facts
        level = logging.DEBUG if facts["route"] in _QUIET and facts["status"] < 400 else logging.INFO
        logger.log(level, "request", extra={"facts": facts})
        self._on_end(exchange)


def _request_id(scope: Scope) -> str:
    """The client's own, or a new one where there is none or it is not one: it goes into headers and logs as it is."""
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]):
        return given[0].decode()
    made = f"req-{uuid.uuid4().hex}"
    if given:
        logger.info("an X-Request-Id of %d bytes is not one and was replaced by %s", len(given[0]), made)
    return made
