"""The model behind the routes, from the opening of the port to its end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from zen_turbo.engine.engine import Engine
from zen_turbo.engine.service import EngineService
from zen_turbo.errors import InvalidRequestError, ModelNotFoundError, ShuttingDownError, shown
from zen_turbo.server.errors import LoadingError
from zen_turbo.server.operations import Operations

logger = logging.getLogger("zen_turbo.server")


class ServedModel:
    """``failure``: why loading ended without an engine. keep_alive_s: longest silence of a stream; default_max_tokens: longest answer of a
    request that names no limit."""

    def __init__(
        self,
        load: Callable[[], Engine],
        name: str,
        on_failure: Callable[[], None],
        operations: Operations,
        *,
        keep_alive_s: float,
        default_max_tokens: int | None,
    ) -> None:
        self.name = name
        self.created = int(time.time())
        self.failure: Exception | None = None
        self.operations = operations
        self.keep_alive_s = keep_alive_s
        self.default_max_tokens = default_max_tokens
        self._load = load
        self._on_failure = on_failure
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

    def check_model(self, name: str | None) -> None:
        """Raises ModelNotFoundError for any other name; None is a client that names no model."""
        if name is not None and name != self.name:
            raise ModelNotFoundError(f"The model {shown(name)} is not served here; {self.name!r} is.", param="model")

    def check_answers(self, count: int, *, param: str) -> None:
        """Raises InvalidRequestError if one body asks for more answers than may wait, since no later moment would be better for it."""
        most = self.operations.settings.max_queue
        if not 1 <= count <= most:
            raise InvalidRequestError(f"One request may ask for 1 to {most} answers, as many as may wait, not for {count}.", param=param)
