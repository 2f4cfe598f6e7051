"""A stand-in for the files API, for tests of what is in front of it: text files only, kept in a dictionary."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_READS_MESSAGES = ("/v1/chat/completions", "/v1/chat/completions/input_tokens")


class FakeFiles:
    """Wraps an application: answers /v1/files itself, and puts the files' text where messages name them. ``count``: text -> tokens."""

    def __init__(self, app: ASGIApp, count: Callable[[str], int]) -> None:
        self._app, self._count = app, count
        self.files: dict[str, dict[str, Any]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request = Request(scope, receive)
        path = request.url.path
        if path == "/v1/files" or path.startswith("/v1/files/"):
            return await (await self._files(request))(scope, receive, send)
        if request.method != "POST" or path not in _READS_MESSAGES:
            return await self._app(scope, receive, send)
        asked = json.loads(await request.body())
        for message in asked["messages"]:
            if isinstance(message["content"], list):
                message["content"] = [self._text_part(part) for part in message["content"]]
        whole = [{"type": "http.request", "body": json.dumps(asked).encode(), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self._app(scope, replay, send)

    def _text_part(self, part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] != "file":
            return part
        file = self.files[part["file"]["file_id"]]
        return {"type": "text", "text": f"=== {file['filename']} ===\n{file['text']}\n"}

    async def _files(self, request: Request) -> JSONResponse:
        name = request.url.path.removeprefix("/v1/files").strip("/")
        if request.method == "POST":
            return self._upload(await request.body(), request.headers["content-type"])
        if request.method == "GET":
            return JSONResponse({"object": "list", "data": [_shown(file) for file in self.files.values()], "has_more": False})
        if self.files.pop(name, None) is None:
            return _refusal(404, "file_not_found", f"There is no file {name}.")
        return JSONResponse({"id": name, "object": "file", "deleted": True})

    def _upload(self, body: bytes, content_type: str) -> JSONResponse:
        boundary = content_type.partition("boundary=")[2].encode()
        parts = [part.partition(b"\r\n\r\n") for part in body.split(b"--" + boundary)[1:-1]]
        (head, content) = next((head, content[:-2]) for head, _, content in parts if b"filename=" in head)
        found = re.search(rb'filename="([^"]*)"', head)
        assert found is not None and any(b'name="purpose"' in head and content == b"user_data\r\n" for head, _, content in parts)
        filename = found[1].decode().replace("%22", '"')
        try:
            text = content.decode()
        except UnicodeDecodeError:
            return _refusal(400, "binary_document", f"{filename} is not text.")
        file = {"id": f"file-{uuid.uuid4().hex}", "object": "file", "purpose": "user_data", "status": "processed", "created_at": len(self.files)}
        file |= {"bytes": len(content), "filename": filename, "zen_turbo": {"tokens": self._count(text)}, "text": text}
        self.files[file["id"]] = file
        return JSONResponse(_shown(file))


def _shown(file: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in file.items() if key != "text"}


def _refusal(status: int, code: str, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}, status)
