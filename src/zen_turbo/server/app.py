"""The HTTP application: routes, and the engine's life behind them.

The port opens before the model is loaded; until then /health says 503 and requests are refused with ``loading``. Everything that can be
refused (schema, model, template, length, memory) is refused before the first byte of an answer, because clients cannot tell errors apart
later. Bodies of several megabytes are parsed and tokenised in a worker thread.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from zen_turbo import __version__
from zen_turbo.engine.engine import Engine
from zen_turbo.errors import InvalidRequestError
from zen_turbo.server import answering, chat, completions, errors, openapi, page, responses
from zen_turbo.server import files as files_api
from zen_turbo.server.errors import LoadingError
from zen_turbo.server.file_store import FileStore
from zen_turbo.server.operations import Operations
from zen_turbo.server.schemas import ChatRequest, DetokenizeRequest, TokenizeRequest, parse, parse_generation
from zen_turbo.server.served import ServedModel
from zen_turbo.server.settings import DEFAULT_MAX_UPLOAD_BYTES, DEFAULT_QUOTA_BYTES, ServerSettings

DEFAULT_MAX_TOKENS = 4096


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
    ``files_dir``: where uploaded files stay, None for a temporary folder; raises ConfigurationError if it cannot be used. ``max_upload_bytes``:
    of one file; ``files_quota_bytes``: of all files and their text."""
    operations = Operations(settings or ServerSettings(), model_name)
    store = FileStore(files_dir, quota_bytes=files_quota_bytes)
    served = ServedModel(load, model_name, on_failure, operations, keep_alive_s=keep_alive_s, default_max_tokens=default_max_tokens)

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
        served.check_model(name)
        return card()

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    def tokenize(body: bytes) -> dict[str, Any]:
        engine, asked = served.engine, parse(TokenizeRequest, body)
        served.check_model(asked.model)
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
        served.check_model(asked.model)
        if not all(0 <= token < engine.model_config.vocab_size for token in asked.tokens):
            raise InvalidRequestError(f"Token ids must lie in [0, {engine.model_config.vocab_size}).", param="tokens")
        return {"prompt": engine.tokenizer.decode(asked.tokens)}

    def count_input(body: bytes) -> dict[str, Any]:
        return {"input_tokens": len(chat.prompt_of(served, parse_generation(ChatRequest, body), files.expand).token_ids)}

    def about_text(path: str, work: Callable[[bytes], dict[str, Any]]) -> None:
        """A route that computes on text alone, in a worker thread: a million tokens take seconds."""

        async def handler(request: Request) -> Response:
            return JSONResponse(await asyncio.to_thread(work, await request.body()))

        answering.post(app, path, handler)

    about_text("/tokenize", tokenize)
    about_text("/detokenize", detokenize)
    about_text("/v1/chat/completions/input_tokens", count_input)
    chat.install(app, served, files.expand)
    completions.install(app, served)
    responses.install(app, served, files.expand)
    return app
