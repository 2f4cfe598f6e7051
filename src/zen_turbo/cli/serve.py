"""``zen-turbo serve``: the OpenAI endpoint."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zen_turbo.cli.ask import DEFAULT_MODEL, MODEL_HELP, load_llm
from zen_turbo.cli.engine_flags import engine_options
from zen_turbo.config import EngineConfig
from zen_turbo.errors import ConfigurationError
from zen_turbo.server.settings import DEFAULT_MAX_UPLOAD_BYTES, DEFAULT_QUOTA_BYTES

if TYPE_CHECKING:
    from zen_turbo.engine.engine import Engine

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
    api_key: Annotated[
        list[str] | None, typer.Option(help="Key that clients must send; may be given several times. Other users of this machine can see it.")
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with one key per line.")] = None,
    max_requests_per_key: Annotated[
        int | None, typer.Option(help="Most requests of one key at a time; more are refused with 429. Default: no limit.")
    ] = None,
    max_queue: Annotated[int, typer.Option(help="Most requests that wait before their prompt is begun; more are refused with 429.")] = 64,
    max_body_bytes: Annotated[int, typer.Option(help="Largest request body in bytes; a larger one is refused with 413.")] = 64 << 20,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(help="Web page that may use the server from a browser, as scheme://host:port, or *; may be given several times."),
    ] = None,
    log_format: Annotated[str, typer.Option(metavar="text|json", help="Lines of the log: text, or one JSON object each.")] = "text",
    drain_s: Annotated[float, typer.Option(help="Seconds that running answers may take to finish when the server is told to end.")] = 30.0,
    pad_slow_answers: Annotated[
        bool, typer.Option(help="Send spaces before an answer that is not streamed, once half of the client's read timeout is over.")
    ] = True,
    *,
    config: EngineConfig,
) -> None:
    """Serve a model behind the OpenAI API."""
    import uvicorn

    from zen_turbo.server import logs
    from zen_turbo.server.app import create_app
    from zen_turbo.server.keys import collect_keys
    from zen_turbo.server.settings import ServerSettings
    from zen_turbo.server.shutdown import GRACE_S, DrainingServer

    if log_format not in logs.FORMATS:
        raise ConfigurationError(f"log_format must be one of {', '.join(logs.FORMATS)}, not {log_format!r}.", param="log_format")
    settings = ServerSettings(
        keys=collect_keys(api_key or (), api_key_file, os.environ),
        max_requests_per_key=max_requests_per_key,
        max_queue=max_queue,
        max_body_bytes=max_body_bytes,
        allow_origins=tuple(allow_origin or ()),
        loopback=_is_loopback(host),
        drain_s=drain_s,
        pad_slow_answers=pad_slow_answers,
    )
    logs.configure(log_format)
    # Open the port first: whoever waits for the model can ask /health, and a taken port is known before minutes of loading.
    listener = listen(host, port)
    # uvicorn names a socket that it is given by its tuple; people want something to click on, and --port 0 has to be told.
    shown = f"[{host}]" if ":" in host else host
    logger.info("listening on http://%s:%d, loading %s", shown, listener.getsockname()[1], served_model_name or model)
    if not settings.keys and not settings.loopback:
        logger.warning("no API key is set: whoever reaches this address may use the server")

    def stop() -> None:
        server.should_exit = True

    with contextlib.ExitStack() as at_end:

        def load() -> Engine:
            return at_end.enter_context(contextlib.closing(load_llm(model, config).engine))

        app = create_app(
            load,
            model_name=served_model_name or model,
            keep_alive_s=keep_alive_s,
            default_max_tokens=default_max_tokens,
            on_failure=stop,
            settings=settings,
            files_dir=files_dir,
            max_upload_bytes=max_upload_bytes,
            files_quota_bytes=files_quota_bytes,
        )
        served = app.state.zen_turbo
        server = DrainingServer(
            # The log is ours, and so is its line for each request.
            uvicorn.Config(app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=GRACE_S),
            drain=served.operations.drain,
            in_flight=lambda: len(served.operations.in_flight),
            abort=served.close,
        )
        server.run(sockets=[listener])
    # Closing the engine has written what the store had not yet.
    if served.failure is not None:
        raise served.failure


def listen(host: str, port: int) -> socket.socket:
    """Raises ConfigurationError where that cannot be."""
    try:
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigurationError(f"{host}:{port} cannot be listened on: {error.strerror}.", param="port") from error
    # asyncio sets this only where a socket names its protocol, which those of create_server do not. Without it each small write, a token too,
    # waits up to 40 ms for the client to acknowledge the one before. Connections inherit it.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
