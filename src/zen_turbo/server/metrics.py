"""Prometheus metrics of one application: its own registry, vLLM's suffixes after ``zen_turbo:``.

Gauges ask the engine when they are read. Everything else is counted from the events of requests as they pass, so a prompt of a million tokens
shows its progress while it is read. Latencies are of requests that ended by themselves; one that was aborted or failed counts as such, with the
tokens that were computed for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from zen_turbo.engine.request import Event, Failed, Finished, PrefillProgress, RequestOutput, TokenDelta

PREFIX = "zen_turbo:"
CONTENT_TYPE = CONTENT_TYPE_LATEST
FINISH_REASONS = ("stop", "length", "abort", "error")
REJECTIONS = tuple(
    "max_queue max_requests_per_key body_bytes insufficient_memory context_length_exceeded readers_busy loading shutting_down".split()
)

_LONG_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560, 5120, 10240, 14400)
_TOKEN_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80)
_TOKENS = tuple(2**power for power in range(21))
_DENSITY = (0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
_RECALL = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99, 0.995, 0.999, 1)


class EngineStats(NamedTuple):
    """store_bytes: None where there is no store."""

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    store_bytes: int | None = None


class _EngineGauges(Collector):
    def __init__(self, model_name: str, stats: Callable[[], EngineStats]) -> None:
        self._model_name = model_name
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        rows = [
            ("num_requests_running", "Requests whose prompt is being read or that are being answered.", stats.num_running),
            ("num_requests_waiting", "Requests whose prompt is not begun.", stats.num_waiting),
            ("kv_cache_usage_perc", "Share of the KV pages that requests hold, between 0 and 1.", stats.kv_cache_usage),
        ]
        if stats.store_bytes is not None:
            rows.append(("store_bytes", "Bytes of the page store on disk.", stats.store_bytes))
        for name, help, value in rows:
            family = GaugeMetricFamily(PREFIX + name, help, labels=["model_name"])
            family.add_metric([self._model_name], value)
            yield family


class Metrics:
    """stats: what the engine says of itself now; called from the thread that renders."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineGauges(model_name, stats))

        def counter(name: str, help: str) -> Counter:
            return Counter(PREFIX + name, help, ["model_name"], registry=self.registry).labels(model_name)

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(PREFIX + name, help, ["model_name"], buckets=buckets, registry=self.registry).labels(model_name)

        def by(name: str, help: str, label: str, values: tuple[str, ...]) -> dict[str, Counter]:
            """All label values from the start: a rate over a series that does not exist yet is no rate."""
            family = Counter(PREFIX + name, help, ["model_name", label], registry=self.registry)
            return {value: family.labels(model_name, value) for value in values}

        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens read, those found in the cache included.")
        self.prompt_tokens_cached = counter("prompt_tokens_cached", "Prompt tokens found in the cache.")
        self.generation_tokens = counter("generation_tokens", "Tokens generated.")
        self.prefix_cache_queries = counter("prefix_cache_queries", "Prompt tokens looked up in the cache.")
        self.prefix_cache_hits = counter("prefix_cache_hits", "Prompt tokens found in the cache.")
        self.request_success = by("request_success", "Requests that ended, by how.", "finished_reason", FINISH_REASONS)
        self.admission_rejections = by("admission_rejections", "Requests refused before any work, by reason.", "reason", REJECTIONS)
        self.ttft = histogram("time_to_first_token_seconds", "From arrival to the first token.", _LONG_S)
        self.inter_token = histogram("inter_token_latency_seconds", "Between two tokens of an answer.", _TOKEN_S)
        self.per_token = histogram("request_time_per_output_token_seconds", "Mean time per token after the first, per request.", _TOKEN_S)
        self.e2e = histogram("e2e_request_latency_seconds", "From arrival to the last token.", _LONG_S)
        self.queue_time = histogram("request_queue_time_seconds", "From arrival until the prompt is begun.", _LONG_S)
        self.prefill_time = histogram("request_prefill_time_seconds", "From the beginning of the prompt to the first token.", _LONG_S)
        self.decode_time = histogram("request_decode_time_seconds", "From the first token to the last.", _LONG_S)
        self.request_prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens per request.", _TOKENS)
        self.request_generation_tokens = histogram("request_generation_tokens", "Generated tokens per request.", _TOKENS)
        self.density = histogram("attention_density", "Share of block pairs that a prefill read.", _DENSITY)
        self.recall = histogram("attention_recall", "Sampled share of attention mass that a sparse prefill kept.", _RECALL)
        self.prefill_progress: Gauge = Gauge(
            f"{PREFIX}prefill_progress_tokens", "Tokens read of the prompts that are being read.", ["model_name"], registry=self.registry
        ).labels(model_name)

    def meter(self) -> Meter:
        """For one request of the engine."""
        return Meter(self)

    def rejected(self, reason: str) -> None:
        """Reasons that are none of REJECTIONS do not count."""
        if reason in self.admission_rejections:
            self.admission_rejections[reason].inc()

    def render(self) -> bytes:
        return generate_latest(self.registry)


class Meter:
    """Counts the events of one request."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._processed = 0
        self._reading = False
        self._last_token: float | None = None

    def on_event(self, event: Event) -> None:
        if isinstance(event, PrefillProgress):
            self._progress(event)
        elif isinstance(event, TokenDelta):
            self._tokens(event)
        else:
            self._end_of_reading()
            if isinstance(event, Failed):
                self._metrics.request_success["error"].inc()
            elif isinstance(event, Finished):
                self._finished(event.output)

    def _progress(self, event: PrefillProgress) -> None:
        metrics = self._metrics
        if not self._reading:
            self._reading = True
            metrics.prefix_cache_queries.inc(event.total_tokens)
            metrics.prefix_cache_hits.inc(event.cached_tokens)
            metrics.prompt_tokens_cached.inc(event.cached_tokens)
        new = event.processed_tokens - self._processed
        self._processed = event.processed_tokens
        metrics.prompt_tokens.inc(new)
        metrics.prefill_progress.inc(new)

    def _end_of_reading(self) -> None:
        if self._reading:
            self._metrics.prefill_progress.dec(self._processed)
        self._reading = False

    def _tokens(self, event: TokenDelta) -> None:
        self._end_of_reading()
        if not event.token_ids:  # held-back text
            return
        self._metrics.generation_tokens.inc(len(event.token_ids))
        now = time.monotonic()
        if self._last_token is not None:
            self._metrics.inter_token.observe(now - self._last_token)
        self._last_token = now

    def _finished(self, output: RequestOutput) -> None:
        metrics, times, written = self._metrics, output.metrics, len(output.token_ids)
        metrics.request_success[output.finish_reason].inc()
        if output.finish_reason == "abort":
            return
        metrics.ttft.observe(times.ttft_s)
        metrics.queue_time.observe(times.queue_s)
        metrics.prefill_time.observe(times.prefill_s)
        metrics.decode_time.observe(times.decode_s)
        metrics.e2e.observe(times.ttft_s + times.decode_s)
        if written > 1:
            metrics.per_token.observe(times.decode_s / (written - 1))
        metrics.request_prompt_tokens.observe(output.prompt_tokens)
        metrics.request_generation_tokens.observe(written)
        metrics.density.observe(times.density)
        if times.recall is not None:
            metrics.recall.observe(times.recall)
