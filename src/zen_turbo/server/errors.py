"""Errors as OpenAI clients expect them: a JSON object with message, type, param and code, and our facts beside these."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from zen_turbo.engine.service import RETRY_AFTER_S
from zen_turbo.errors import ZenTurboError
from zen_turbo.server.exchange import CLIENT_LEFT, note_error

logger = logging.getLogger("zen_turbo.server")


class LoadingError(ZenTurboError):
    """The model is not ready yet."""

    code = "loading"
    http_status = 503


def status_of(error: Exception) -> int:
    return error.http_status if isinstance(error, ZenTurboError) else 500


def error_body(error: Exception) -> dict[str, Any]:
    """What a stranger may know: messages of our own errors, nothing of an exception that we did not foresee."""
    if not isinstance(error, ZenTurboError):
        return {"error": {"message": "Internal error.", "type": "server_error", "param": None, "code": "internal_error"}}
    kind = {429: "rate_limit_error", 503: "unavailable_error"}.get(error.http_status)
    if kind is None:
        kind = "invalid_request_error" if error.http_status < 500 else "server_error"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code, **error.details}}


def error_response(error: Exception) -> JSONResponse:
    note_error(error)
    status = status_of(error)
    headers = {}
    if status in (429, 503):
        known = error.details.get("retry_after_s") if isinstance(error, ZenTurboError) else None
        headers["Retry-After"] = str(known or RETRY_AFTER_S)
    elif status >= 500:
        headers["x-should-retry"] = "false"
    return JSONResponse(error_body(error), status, headers)


def answer_to(request: Request, error: Exception) -> Response:
    """The response to a failed request; what was not foreseen goes to the log with its traceback."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=CLIENT_LEFT)  # nobody reads it
    if not isinstance(error, ZenTurboError):
        logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return error_response(error)


def install(app: FastAPI) -> None:
    """Every failure of a route leaves in the same shape."""

    @app.exception_handler(ZenTurboError)
    async def _known(request: Request, error: ZenTurboError) -> Response:
        return answer_to(request, error)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        code = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}.get(error.status_code, "http_error")
        message = f"{request.method} {request.url.path}: {error.detail}."
        body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
        return JSONResponse(body, error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def _unknown(request: Request, error: Exception) -> Response:
        return answer_to(request, error)
