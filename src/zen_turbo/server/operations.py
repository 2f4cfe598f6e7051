"""What an operator sees and sets, put around an application: layers, metrics, the log, and what the engine's service reports to them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from fastapi import FastAPI, Response
from starlette.middleware.cors import CORSMiddleware

from zen_turbo.engine.engine import Engine
from zen_turbo.engine.request import Event
from zen_turbo.engine.service import EngineService
from zen_turbo.errors import RateLimitExceededError, ZenTurboError
from zen_turbo.kv.store import segments_of
from zen_turbo.server.access import Access
from zen_turbo.server.exchange import Exchange, current
from zen_turbo.server.metrics import CONTENT_TYPE, EngineStats, Meter, Metrics
from zen_turbo.server.security import OPEN_PATHS, BodyLimit, Door, KeyGuard, OriginGuard
from zen_turbo.server.settings import ServerSettings
from zen_turbo.server.shutdown import Drain


class Operations:
    """One per application. ``service`` makes the engine's service, watched and with its queue bounded; ``install`` does the rest."""

    def __init__(self, settings: ServerSettings, model_name: str) -> None:
        self.settings = settings
        self.metrics = Metrics(model_name, self._stats)
        self.drain = Drain(settings.drain_s)
        self.in_flight: set[Exchange] = set()
        self._service: EngineService | None = None
        self._engine: Engine | None = None

    def service(self, engine: Engine) -> EngineService:
        self._engine = engine
        self._service = EngineService(engine, max_queue=self.settings.max_queue, watch=self._watch)
        return self._service

    def install(self, app: FastAPI) -> None:
        """The layers, innermost first, and /metrics."""
        settings = self.settings
        app.add_middleware(BodyLimit, default=settings.max_body_bytes, limits=settings.body_limits)
        app.add_middleware(KeyGuard, keys=settings.keys, most=settings.max_requests_per_key)
        if not settings.keys:
            app.add_middleware(OriginGuard, allow_origins=settings.allow_origins, loopback=settings.loopback)
        app.add_middleware(Door, closing=self.drain.closing)
        if settings.allow_origins:
            app.add_middleware(
                CORSMiddleware,
                allow_origins=settings.allow_origins,
                allow_methods=["*"],
                allow_headers=["*"],
                expose_headers=["X-Request-Id", "Retry-After"],
            )
        app.add_middleware(Access, on_end=self._count, in_flight=self.in_flight)

        @app.get("/metrics")
        async def metrics() -> Response:
            # In a thread: the size of the store is asked of the file system.
            return Response(await asyncio.to_thread(self.metrics.render), media_type=CONTENT_TYPE)

    def _stats(self) -> EngineStats:
        service, engine = self._service, self._engine
        if service is None or engine is None:
            return EngineStats()
        store = engine.config.store
        size = None if store is None else sum(segment.num_bytes for segment in segments_of(Path(store).expanduser()))
        return EngineStats(service.num_running, service.num_waiting, engine.kv_cache_usage, size)

    def _watch(self) -> _Watcher:
        return _Watcher(self.metrics.meter(), current.get())

    def _count(self, exchange: Exchange) -> None:
        error = exchange.error
        if exchange.path in OPEN_PATHS:  # monitors ask for no work
            return
        if exchange.accepted and not exchange.refused:  # it failed later, and is counted by its meter
            return
        if isinstance(error, RateLimitExceededError):
            self.metrics.rejected(error.details["reason"])
        elif isinstance(error, ZenTurboError):
            self.metrics.rejected(error.code)


class _Watcher:
    """One request of the engine: for the metrics, and for the exchange that it belongs to."""

    def __init__(self, meter: Meter, exchange: Exchange | None) -> None:
        self._meter = meter
        self._exchange = exchange
        if exchange is not None:
            exchange.engine_began()

    def on_event(self, event: Event) -> None:
        self._meter.on_event(event)
        if self._exchange is not None:
            self._exchange.engine_event(event)

    def on_refused(self) -> None:
        if self._exchange is not None:
            self._exchange.engine_refused()
