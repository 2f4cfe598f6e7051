"""The files API: upload, list, look at, fetch and delete files, and use them in messages.

OpenAI's routes and objects; what we know besides (tokens, characters, documents, what was left out) is under ``zen_turbo``. An upload is
answered when the file has been read, so that a client learns at once whether it can be used.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, BinaryIO

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.datastructures import QueryParams, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from zen_turbo.engine.engine import Engine
from zen_turbo.errors import InvalidRequestError, RequestCancelledError, RequestTooLargeError, UnsupportedParameterError
from zen_turbo.server import errors
from zen_turbo.server.attachments import clean_filename, expand_files
from zen_turbo.server.file_store import FileStore, Room, StoredFile
from zen_turbo.text.documents import Document, documents_text

PURPOSES = ("file-extract", "user_data", "assistants")
MAX_LISTED = 10_000
_ENVELOPE_BYTES = 64 << 10  # what a form may have around the file: boundaries, headers, fields
_MAX_FIELDS = 16
# A client that is refused while it sends hears the answer only once it has sent everything, or when it is cut off; so what comes is thrown
# away for a while.
_DRAIN_S = 10.0
_PIECE_BYTES = 1 << 20


class FilesApi:
    """Files for routes and for messages. ``engine`` gives None while there is none: files can come and go then, but nobody counts tokens."""

    def __init__(self, store: FileStore, engine: Callable[[], Engine | None], *, max_upload_bytes: int) -> None:
        self.store = store
        self.max_bytes = max_upload_bytes
        self.max_characters = store.limits.text_characters
        self._engine = engine

    def close(self) -> None:
        self.store.close()

    def expand(self, messages: Sequence[Any]) -> list[Any]:
        """Messages with their files' text in place; see ``attachments``. Takes as long as reading inline files: not for the event loop."""
        return expand_files(messages, self)

    @property
    def max_tokens(self) -> int | None:
        engine = self._engine()
        return None if engine is None else engine.max_model_len

    def size(self, file_id: str) -> tuple[int, int | None]:
        file = self.store.get(file_id)
        return file.characters, self.tokens(self.counted(file))

    def documents(self, file_id: str) -> Sequence[Document]:
        return self.store.documents(file_id)

    def read_inline(self, data: bytes, filename: str) -> Sequence[Document]:
        return self.store.read_inline(data, filename)

    def tokens(self, file: StoredFile) -> int | None:
        """Under the tokenizer of the model that is served now, if it has counted."""
        engine = self._engine()
        return None if engine is None else file.tokens.get(engine.model_fingerprint)

    def is_uncounted(self, file: StoredFile) -> bool:
        """Whether there is a model that has not counted it yet."""
        engine = self._engine()
        return engine is not None and engine.model_fingerprint not in file.tokens

    def counted(self, file: StoredFile) -> StoredFile:
        """With its tokens, counted now if they have not been. Raises UploadedFileNotFoundError if it was deleted meanwhile."""
        engine = self._engine()
        if engine is None or not self.is_uncounted(file):
            return file
        count = engine.tokenizer.count(documents_text(self.store.documents(file.id)))
        return self.store.set_tokens(file.id, engine.model_fingerprint, count)

    def add(self, content: BinaryIO, filename: str, purpose: str, room: Room) -> StoredFile:
        return self.counted(self.store.add(content, filename, purpose, room))

    def card(self, file: StoredFile) -> dict[str, Any]:
        skipped = [{"filename": where, "reason": reason} for where, reason in file.skipped]
        ours = {
            "tokens": self.tokens(file),
            "characters": file.characters,
            "documents": file.num_documents,
            "num_skipped": file.num_skipped,
            "skipped": skipped,
        }
        return {
            "id": file.id,
            "object": "file",
            "bytes": file.bytes,
            "created_at": file.created_ns // 10**9,
            "expires_at": None,
            "filename": file.filename,
            "purpose": file.purpose,
            "status": "processed",
            "status_details": None,
            "zen_turbo": ours,
        }


def install(app: FastAPI, store: FileStore, engine: Callable[[], Engine | None], *, max_upload_bytes: int) -> FilesApi:
    """The routes below /v1/files. The caller closes what it gets."""
    files = FilesApi(store, engine, max_upload_bytes=max_upload_bytes)

    async def work(function: Callable[..., Any], *arguments: Any) -> Any:
        """In the threads of the store, so that slow files wait for each other and no request waits for them."""
        return await asyncio.get_running_loop().run_in_executor(store.workers, function, *arguments)

    def route(method: str, path: str) -> Callable[[Callable[..., Awaitable[Response]]], None]:
        def install_one(answer: Callable[..., Awaitable[Response]]) -> None:
            async def safely(request: Request) -> Response:
                try:
                    return await answer(request, **request.path_params)
                except Exception as error:
                    await _drain(request)
                    return errors.answer_to(request, error)

            app.add_api_route(path, safely, methods=[method], response_model=None, name=answer.__name__)

        return install_one

    @route("POST", "/v1/files")
    async def upload(request: Request) -> Response:
        announced = _announced(request, max_upload_bytes)
        with store.room(announced) as room:
            async with _form(request, max_upload_bytes) as (content, filename, purpose):
                file = await work(files.add, content, filename, purpose, room)
        return JSONResponse(files.card(file))

    @route("GET", "/v1/files")
    async def listing(request: Request) -> Response:
        page, more = _page(store.all(), request.query_params)
        data = [files.card(file) for file in page]
        ends = {"first_id": page[0].id if page else None, "last_id": page[-1].id if page else None}
        return JSONResponse({"object": "list", "data": data, **ends, "has_more": more})

    @route("GET", "/v1/files/{file_id}")
    async def retrieve(request: Request, file_id: str) -> Response:
        file = store.get(file_id)
        if files.is_uncounted(file):
            file = await work(files.counted, file)
        return JSONResponse(files.card(file))

    @route("GET", "/v1/files/{file_id}/content")
    async def content(request: Request, file_id: str) -> Response:
        file, stream = store.get(file_id), await asyncio.to_thread(store.content, file_id)
        # Never shown by a browser as a page of ours, whatever it is.
        headers = {"Content-Length": str(file.bytes), "X-Content-Type-Options": "nosniff", "Content-Disposition": "attachment"}
        return StreamingResponse(_pieces(stream), media_type="application/octet-stream", headers=headers)

    @route("DELETE", "/v1/files/{file_id}")
    async def delete(request: Request, file_id: str) -> Response:
        await asyncio.to_thread(store.delete, file_id)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    return files


# Upload


def _announced(request: Request, max_bytes: int) -> int:
    """Bytes that a request may bring: what it says, else the most that is accepted. Raises RequestTooLargeError."""
    length = request.headers.get("Content-Length", "")
    if not (length.isascii() and length.isdigit()):
        return max_bytes
    count = int(length[:18])  # no number that takes long to read
    if count > max_bytes + _ENVELOPE_BYTES:
        raise RequestTooLargeError("The request", num_bytes=count, max_bytes=max_bytes)
    return min(count, max_bytes)


@contextlib.asynccontextmanager
async def _form(request: Request, max_bytes: int) -> AsyncIterator[tuple[BinaryIO, str, str]]:
    """(content, clean name, purpose) of an upload; the content is an anonymous temporary file until the end of the block.

    Raises InvalidRequestError (no form, no file, no purpose or an unknown one), UnsupportedParameterError, RequestTooLargeError.
    """
    if not request.headers.get("Content-Type", "").startswith("multipart/form-data"):
        raise InvalidRequestError("Send the file as multipart/form-data, with the fields file and purpose.", param="file")

    async def counted() -> AsyncGenerator[bytes, None]:
        count = 0
        async for piece in request.stream():
            count += len(piece)
            if count > max_bytes + _ENVELOPE_BYTES:
                raise RequestTooLargeError("The request", num_bytes=count, max_bytes=max_bytes)
            yield piece

    parser = MultiPartParser(request.headers, counted(), max_files=1, max_fields=_MAX_FIELDS)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise InvalidRequestError(f"The form cannot be read: {error.message}", param="file") from error
    except ClientDisconnect as error:
        raise RequestCancelledError("The client left before the file had come.") from error
    try:
        file, purpose = form.get("file"), form.get("purpose")
        if not isinstance(file, UploadFile):
            raise InvalidRequestError("The form has no file in its field file.", param="file")
        if purpose not in PURPOSES:
            raise InvalidRequestError(f"purpose must be one of {', '.join(PURPOSES)}, not {str(purpose)[:100]!r}.", param="purpose")
        for name in form:
            if name.startswith("expires_after"):
                raise UnsupportedParameterError("expires_after is not supported: files stay until they are deleted.", param="expires_after")
        name = clean_filename(file.filename or "")
        if (file.size or 0) > max_bytes:
            raise RequestTooLargeError(name, num_bytes=file.size or 0, max_bytes=max_bytes)
        yield file.file, name, str(purpose)
    finally:
        await form.close()
        for unfinished in getattr(parser, "_files_to_close_on_error", ()):  # of a form that ends too early, which the library takes for whole
            unfinished.close()


async def _drain(request: Request) -> None:
    """Throw away what the client still sends."""
    with contextlib.suppress(TimeoutError, ClientDisconnect, RuntimeError):  # RuntimeError: everything has been read
        async with asyncio.timeout(_DRAIN_S):
            async for _ in request.stream():
                pass


# The others


def _page(files: Sequence[StoredFile], asked: QueryParams) -> tuple[list[StoredFile], bool]:
    """One page of a list that is oldest first, and whether more follow. Raises InvalidRequestError naming the parameter."""
    order, limit, after, purpose = asked.get("order", "desc"), asked.get("limit", str(MAX_LISTED)), asked.get("after"), asked.get("purpose")
    if order not in ("asc", "desc"):
        raise InvalidRequestError(f"order must be asc or desc, not {order[:100]!r}.", param="order")
    if not (limit.isascii() and limit.isdigit() and len(limit) <= 5 and 1 <= int(limit) <= MAX_LISTED):
        raise InvalidRequestError(f"limit must be a number from 1 to {MAX_LISTED}, not {limit[:100]!r}.", param="limit")
    ordered = list(files) if order == "asc" else list(reversed(files))
    if after is not None:
        places = [place for place, file in enumerate(ordered) if file.id == after]
        if not places:
            raise InvalidRequestError(f"after must be the id of a file, and {after[:100]!r} is none.", param="after")
        ordered = ordered[places[0] + 1 :]
    if purpose is not None:
        ordered = [file for file in ordered if file.purpose == purpose]
    return ordered[: int(limit)], len(ordered) > int(limit)


async def _pieces(stream: BinaryIO) -> AsyncIterator[bytes]:
    try:
        while piece := await asyncio.to_thread(stream.read, _PIECE_BYTES):
            yield piece
    finally:
        stream.close()
