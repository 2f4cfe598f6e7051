"""The HTTP application: routes, and the engine's life behind them.

The port opens before the model is loaded; until then /health says 503 and requests are refused with ``loading``. Everything that can be
refused (schema, model, template, length, memory) is refused before the first byte of an answer, because clients cannot tell errors apart
later. Bodies of several megabytes are parsed and tokenised in a worker thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from zen_turbo import __version__
from zen_turbo.engine.engine import Engine
from zen_turbo.engine.request import SamplingParams
from zen_turbo.engine.service import EngineService, RequestStream
from zen_turbo.errors import InvalidRequestError, ModelNotFoundError, ShuttingDownError
from zen_turbo.server import errors, openapi, page
from zen_turbo.server import files as files_api
from zen_turbo.server.chat import Reply, stream_body, whole_answer
from zen_turbo.server.errors import LoadingError
from zen_turbo.server.file_store import DEFAULT_MAX_UPLOAD_BYTES, DEFAULT_QUOTA_BYTES, FileStore
from zen_turbo.server.operations import Operations
from zen_turbo.server.schemas import ChatRequest, DetokenizeRequest, TokenizeRequest, parse, parse_chat_request
from zen_turbo.server.settings import ServerSettings
from zen_turbo.server.slow_answers import CancellingResponse, answer_when_done

logger = logging.getLogger("zen_turbo.server")

DEFAULT_MAX_TOKENS = 4096


class ServedModel:
    """The engine behind the routes. ``failure``: why loading ended without one."""

    def __init__(self, load: Callable[[], Engine], name: str, on_failure: Callable[[], None], operations: Operations) -> None:
        self.name = name
        self.created = int(time.time())
        self.failure: Exception | None = None
        self._load = load
        self._on_failure = on_failure
        self.operations = operations
        self._service: EngineService | None = None
        self._closed = False
        self._lock = threading.Lock()

    def start(self) -> None:
        threading.Thread(target=self._run, name="zen-turbo-load", daemon=True).start()

    def _run(self) -> None:
        try:
            engine = self._load()
        except Exception as error:
            self.failure = error
            self._on_failure()
            return
        with self._lock:
            if not self._closed:
                self._service = self.operations.service(engine)
                logger.info("%s is ready, up to %d tokens", self.name, engine.max_model_len)

    def close(self) -> None:
        with self._lock:
            self._closed = True
        if self._service is not None:
            self._service.close(ShuttingDownError("The server is shutting down."))

    @property
    def ready(self) -> bool:
        return self._service is not None

    @property
    def service(self) -> EngineService:
        """Raises LoadingError while there is none."""
        if self._service is None:
            raise LoadingError(f"{self.name} is being loaded.")
        return self._service

    @property
    def engine(self) -> Engine:
        engine = self.service.engine
        assert isinstance(engine, Engine)
        return engine


def create_app(
    load: Callable[[], Engine],
    *,
    model_name: str,
    keep_alive_s: float = 15.0,
    default_max_tokens: int | None = DEFAULT_MAX_TOKENS,
    on_failure: Callable[[], None] = lambda: None,
    settings: ServerSettings | None = None,
    files_dir: Path | None = None,
    max_upload_bytes: int = DEFAULT_MAX_UPLOAD_BYTES,
    files_quota_bytes: int = DEFAULT_QUOTA_BYTES,
) -> FastAPI:
    """``load`` runs in a thread when the application starts; ``on_failure`` is called in it if it raises, and ``app.state.zen_turbo.failure``
    then holds the exception. ``default_max_tokens``: longest answer of a request that names no limit. ``settings``: keys and limits.
    ``files_dir``: where uploaded files stay, None for a temporary folder; raises ConfigurationError if it cannot be used."""
    operations = Operations(settings or ServerSettings(), model_name)
    served = ServedModel(load, model_name, on_failure, operations)

    @contextlib.asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        served.start()
        yield
        await asyncio.to_thread(served.close)
        await asyncio.to_thread(files.close)

    app = FastAPI(title="zen-turbo", version=__version__, lifespan=life, docs_url=None, redoc_url=None)  # their scripts come from elsewhere
    app.state.zen_turbo = served
    errors.install(app)
    operations.install(app)
    page.install(app)
    store = FileStore(files_dir, quota_bytes=files_quota_bytes)
    files = files_api.install(app, store, lambda: served.engine if served.ready else None, max_upload_bytes=max_upload_bytes)
    openapi.install(app)

    def card() -> dict[str, Any]:
        limit = served.engine.max_model_len
        facts = {"max_model_len": limit, "context_length": limit}
        return {"id": served.name, "object": "model", "created": served.created, "owned_by": "zen-turbo", **facts}

    @app.get("/health")
    async def health() -> Response:
        if not served.ready:
            return errors.error_response(LoadingError(f"{served.name} is being loaded."))
        return JSONResponse({"status": "ok"})

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        _check_model(name, served.name)
        return card()

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    def tokenize(body: bytes) -> dict[str, Any]:
        engine, asked = served.engine, parse(TokenizeRequest, body)
        _check_model(asked.model, served.name)
        if (asked.prompt is None) == (asked.messages is None):
            raise InvalidRequestError("Send either prompt or messages.", param="prompt")
        if asked.messages is not None:
            tokens = engine.chat_template.encode(files.expand(asked.messages))
        else:
            tokens = engine.tokenizer.encode(asked.prompt or "", add_special_tokens=asked.add_special_tokens)
        strings = [engine.tokenizer.decode([token]) for token in tokens] if asked.return_token_strs else None
        return {"count": len(tokens), "max_model_len": engine.max_model_len, "tokens": tokens, "token_strs": strings}

    def detokenize(body: bytes) -> dict[str, Any]:
        engine, asked = served.engine, parse(DetokenizeRequest, body)
        _check_model(asked.model, served.name)
        if not all(0 <= token < engine.model_config.vocab_size for token in asked.tokens):
            raise InvalidRequestError(f"Token ids must lie in [0, {engine.model_config.vocab_size}).", param="tokens")
        return {"prompt": engine.tokenizer.decode(asked.tokens)}

    def count_input(body: bytes) -> dict[str, Any]:
        chat = parse_chat_request(body)
        _check_model(chat.model, served.name)
        return {"input_tokens": len(served.engine.chat_template.encode(files.expand(chat.messages), **chat.template_options()))}

    def about_text(path: str, work: Callable[[bytes], dict[str, Any]]) -> None:
        """A route that computes on text alone, in a worker thread: a million tokens take seconds."""

        @app.post(path)
        async def route(request: Request) -> Response:
            try:
                return JSONResponse(await asyncio.to_thread(work, await request.body()))
            except Exception as error:
                return errors.answer_to(request, error)

    about_text("/tokenize", tokenize)
    about_text("/detokenize", detokenize)
    about_text("/v1/chat/completions/input_tokens", count_input)

    def admit(body: bytes, request_id: str) -> tuple[ChatRequest, RequestStream]:
        service = served.service
        chat = parse_chat_request(body)
        _check_model(chat.model, served.name)
        sampling = chat.sampling(default_max_tokens)
        prompt = served.engine.chat_template.encode(files.expand(chat.messages), **chat.template_options())
        if chat.max_tokens is None and chat.max_completion_tokens is None:
            sampling = _shorten(sampling, served.engine.max_model_len - len(prompt))
        return chat, service.submit(prompt, sampling, request_id=request_id)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        try:
            return await answer(request)
        except Exception as error:
            # Here and not in a handler: the framework raises again what a handler of Exception has answered, and that costs the connection.
            return errors.answer_to(request, error)

    async def answer(request: Request) -> Response:
        request_id = f"chatcmpl-{uuid.uuid4().hex}"
        chat, stream = await asyncio.to_thread(admit, await request.body(), request_id)
        reply = Reply(
            request_id=request_id,
            model=served.name,
            include_usage=chat.include_usage,
            return_progress=bool(chat.return_progress),
        )
        if chat.stream:
            headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            body = stream_body(stream, reply, keep_alive_s=chat.sse_ping_interval or keep_alive_s)
            return CancellingResponse(body, cancel=stream.cancel, media_type="text/event-stream", headers=headers)
        return await answer_when_done(request, whole_answer(stream, reply), cancel=stream.cancel, pad=operations.settings.pad_slow_answers)

    return app


def _check_model(name: str | None, served: str) -> None:
    if name is not None and name != served:
        raise ModelNotFoundError(f"The model {name!r} is not served here; {served!r} is.", param="model")


def _shorten(sampling: SamplingParams, room: int) -> SamplingParams:
    """A default is not a wish: where the context ends earlier, so does the default."""
    if sampling.max_tokens is None or room >= sampling.max_tokens or room < 1:
        return sampling
    return dataclasses.replace(sampling, max_tokens=room)
