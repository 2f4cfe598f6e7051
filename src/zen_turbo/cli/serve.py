"""``zen-turbo serve``: the OpenAI endpoint."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Annotated

import typer

from zen_turbo.cli.ask import DEFAULT_MODEL, MODEL_HELP, load_llm
from zen_turbo.cli.engine_flags import engine_options
from zen_turbo.config import EngineConfig
from zen_turbo.errors import ConfigurationError
from zen_turbo.server.file_store import DEFAULT_MAX_UPLOAD_BYTES, DEFAULT_QUOTA_BYTES

logger = logging.getLogger("zen_turbo.server")


@engine_options
def serve(
    model: Annotated[str, typer.Option("--model", "-m", help=MODEL_HELP)] = DEFAULT_MODEL,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is every one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 picks a free one.")] = 8000,
    served_model_name: Annotated[str | None, typer.Option(help="Name clients use. Default: the model's own.")] = None,
    default_max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens, of a request that names no limit.")] = 4096,
    keep_alive_s: Annotated[float, typer.Option(min=0.05, help="Seconds of silence after which a stream sends a comment.")] = 15.0,
    files_dir: Annotated[
        Path | None, typer.Option(help="Folder in which uploaded files stay until they are deleted. Default: a temporary one, removed at exit.")
    ] = None,
    max_upload_bytes: Annotated[int, typer.Option(min=1, help="Largest file that can be uploaded, in bytes.")] = DEFAULT_MAX_UPLOAD_BYTES,
    files_quota_bytes: Annotated[int, typer.Option(min=1, help="Most bytes that all uploaded files and their text may take.")] = DEFAULT_QUOTA_BYTES,
    *,
    config: EngineConfig,
) -> None:
    """Serve a model behind the OpenAI API."""
    import uvicorn

    from zen_turbo.server.app import create_app

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Open the port first: whoever waits for the model can ask /health, and a taken port is known before minutes of loading.
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigurationError(f"{host}:{port} cannot be listened on: {error.strerror}.", param="port") from error

    # uvicorn names a socket that it is given by its tuple; people want something to click on, and --port 0 has to be told.
    shown = f"[{host}]" if ":" in host else host
    logger.info("listening on http://%s:%d, loading %s", shown, listener.getsockname()[1], served_model_name or model)

    def stop() -> None:
        server.should_exit = True

    app = create_app(
        lambda: load_llm(model, config).engine,
        model_name=served_model_name or model,
        keep_alive_s=keep_alive_s,
        default_max_tokens=default_max_tokens,
        on_failure=stop,
        files_dir=files_dir,
        max_upload_bytes=max_upload_bytes,
        files_quota_bytes=files_quota_bytes,
    )
    server = uvicorn.Server(uvicorn.Config(app, log_level="info", timeout_graceful_shutdown=5))
    server.run(sockets=[listener])
    if app.state.zen_turbo.failure is not None:
        raise app.state.zen_turbo.failure
