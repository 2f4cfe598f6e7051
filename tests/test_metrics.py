"""/metrics after a scripted set of requests says exactly what happened, and the queue lets in as many as it may."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import Held, Slowly, failing, server, serving, wait_until

from zen_turbo import LLM
from zen_turbo.engine.engine import Engine
from zen_turbo.engine.request import Failed, Finished, PrefillProgress, RequestMetrics, RequestOutput, SamplingParams, TokenDelta
from zen_turbo.engine.service import EngineService, RequestStream, _Place
from zen_turbo.errors import EmptyPromptError, RateLimitExceededError, ShuttingDownError
from zen_turbo.server.app import create_app
from zen_turbo.server.keys import KeyRing
from zen_turbo.server.metrics import FINISH_REASONS, REJECTIONS, EngineStats, Metrics

CHAT = "/v1/chat/completions"
GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


@pytest.fixture
def engine(tiny_folder: Path) -> Iterator[Engine]:
    result = LLM(tiny_folder, prefill_chunk_tokens=128, kv_cache_bytes=64 << 20, max_model_len=4096).engine
    yield result
    result.pool.verify([result.reuse.prefixes.slots])  # nothing but the index holds a page
    result.close()


class Scrape:
    """Values by name, without prefix and model; ``label``: the other label's value."""

    def __init__(self, text: str) -> None:
        self.values: dict[tuple[str, str | None], float] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                labels = dict(sample.labels)
                assert labels.pop("model_name") == "tiny"
                self.values[sample.name.removeprefix("zen_turbo:"), next(iter(labels.values()), None)] = sample.value

    def __call__(self, name: str, label: str | None = None) -> float:
        return self.values[name, label]


def scrape(client: httpx.Client) -> Scrape:
    answer = client.get("/metrics")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
    return Scrape(answer.text)


def body(text: str, **values: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 4, "ignore_eos": True, **values}


class Sums(NamedTuple):
    prompt: int
    cached: int
    written: int


def test_the_numbers_after_a_script(engine: Engine) -> None:
    with server(engine) as client:
        before = scrape(client)
        assert all(value == 0 for (name, _), value in before.values.items() if not name.endswith("_created"))
        answers = [client.post(CHAT, json=body(text, max_tokens=tokens)).json() for text, tokens in (("Long one. " * 80, 5), ("Long one. " * 80, 1))]
        streamed = client.post(CHAT, json=body("Another. ", stream=True, max_tokens=3, stream_options={"include_usage": True}))
        assert streamed.status_code == 200
        again = client.post(CHAT, json=body("Another. ", max_tokens=2)).json()
        usages = [answer["usage"] for answer in (*answers, again)]
        sums = Sums(
            sum(usage["prompt_tokens"] for usage in usages) + again["usage"]["prompt_tokens"],  # which is the streamed one's
            sum(usage["prompt_tokens_details"]["cached_tokens"] for usage in usages),
            sum(usage["completion_tokens"] for usage in usages) + 3,
        )
        assert sums.cached > 0
        after = scrape(client)
        assert after("prompt_tokens_total") == after("prefix_cache_queries_total") == after("request_prompt_tokens_sum") == sums.prompt
        assert after("prompt_tokens_cached_total") == after("prefix_cache_hits_total") == sums.cached
        assert after("generation_tokens_total") == after("request_generation_tokens_sum") == sums.written == 5 + 1 + 3 + 2
        assert [after("request_success_total", reason) for reason in FINISH_REASONS] == [0, 4, 0, 0]
        for name in ("time_to_first_token_seconds", "request_queue_time_seconds", "request_prefill_time_seconds", "e2e_request_latency_seconds"):
            assert after(f"{name}_count") == 4
        assert after("request_time_per_output_token_seconds_count") == 3, "an answer of one token has no time between tokens"
        assert after("inter_token_latency_seconds_count") == sums.written - 4
        assert after("attention_density_count") == 4 and after("attention_density_sum") == 4
        assert after("attention_recall_count") == 0, "dense attention keeps everything and samples nothing"
        assert all(after(name) == 0 for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefill_progress_tokens"))
        assert ("store_bytes", None) not in after.values
        assert sum(after("admission_rejections_total", reason) for reason in REJECTIONS) == 0
    ttft = sum(answer["zen_turbo"]["ttft_s"] for answer in (*answers, again))
    assert after("time_to_first_token_seconds_sum") > ttft


def test_what_runs_waits_and_is_refused(engine: Engine) -> None:
    results: list[int] = []
    with server(engine, max_queue=2) as client:

        def ask(text: str) -> None:
            results.append(httpx.post(f"{client.base_url}{CHAT}", json=body(text), timeout=60).status_code)

        with Held(engine) as held:
            threads = [threading.Thread(target=ask, args=(f"Number {number}. " * 40,)) for number in range(2)]
            for thread in threads:
                thread.start()
            held.wait_for_work(2)
            assert (scrape(client)("num_requests_running"), scrape(client)("num_requests_waiting")) == (0, 2)
            refused = client.post(CHAT, json=body("One too many."))
            error = refused.json()["error"]
            assert (refused.status_code, error["code"], error["reason"], error["limit"]) == (429, "rate_limit_exceeded", "max_queue", 2)
            assert error["type"] == "rate_limit_error" and 1 <= int(refused.headers["retry-after"]) <= 120
            assert scrape(client)("admission_rejections_total", "max_queue") == 1
            held.steps(1)
            wait_until(lambda: scrape(client)("num_requests_running") == 2)
            busy = scrape(client)
            assert busy("num_requests_waiting") == 0
            pages = sum(len(request.cache.slots) for request in engine._known.values() if request.cache)
            assert busy("kv_cache_usage_perc") == pages / engine.pool.num_slots > 0
        for thread in threads:
            thread.join()
        assert results == [200, 200]
        assert client.post(CHAT, json=body("Now there is room.")).status_code == 200
        assert scrape(client)("num_requests_running") == 0


def test_reasons_of_refusal(engine: Engine) -> None:
    with server(engine, keys=KeyRing(["k"]), max_requests_per_key=1) as client:
        client.headers["Authorization"] = "Bearer k"
        assert client.post(CHAT, json=body("x " * 9000)).json()["error"]["code"] == "context_length_exceeded"
        assert client.post(CHAT, json=body("x", temperature=-1)).status_code == 400
        with Held(engine) as held:
            thread = threading.Thread(target=client.post, args=(CHAT,), kwargs={"json": body("x")})
            thread.start()
            held.wait_for_work()
            assert client.post(CHAT, json=body("y")).status_code == 429
        thread.join()
        after = scrape(client)
        counts = {reason: after("admission_rejections_total", reason) for reason in REJECTIONS}
        assert counts == dict.fromkeys(REJECTIONS, 0) | {"context_length_exceeded": 1, "max_requests_per_key": 1}


def test_aborted_and_failed_requests_count_as_such(engine: Engine) -> None:
    with server(engine) as client:
        with failing(engine):
            assert client.post(CHAT, json=body("This fails.")).status_code == 500
        with Slowly(engine, 0.01), client.stream("POST", CHAT, json=body("This is left. " * 30, stream=True, max_tokens=3000)) as answer:
            for line in answer.iter_lines():
                if '"content":"' in line and '"content":""' not in line:
                    break
        wait_until(lambda: scrape(client)("request_success_total", "abort") == 1)
        after = scrape(client)
        assert [after("request_success_total", reason) for reason in FINISH_REASONS] == [0, 0, 1, 1]
        assert after("time_to_first_token_seconds_count") == 0
        assert 1 <= after("generation_tokens_total") < 3000
        assert after("prompt_tokens_total") < after("prefix_cache_queries_total"), "the prompt that failed was looked up and not read"
        assert all(after(name) == 0 for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefill_progress_tokens"))


def test_two_applications_share_nothing(engine: Engine) -> None:
    with server(engine) as one:
        with server(engine) as other:
            assert other.post(CHAT, json=body("Hello.")).status_code == 200
            assert scrape(other)("request_success_total", "length") == 1
        assert scrape(one)("request_success_total", "length") == 0


def test_a_store_tells_its_size(tiny_folder: Path, tmp_path: Path) -> None:
    llm = LLM(tiny_folder, prefill_chunk_tokens=128, kv_cache_bytes=64 << 20, max_model_len=2048, store=str(tmp_path))
    with server(llm.engine) as client:
        assert scrape(client)("store_bytes") == 0
        client.post(CHAT, json=body("A page is 64 tokens. " * 40))
        wait_until(lambda: scrape(client)("store_bytes") > 0)
        wait_until(lambda: not list(tmp_path.glob("*/*.tmp")))
        size = sum(path.stat().st_size for path in tmp_path.glob("*/*") if path.suffix in (".pages", ".manifest"))
        assert scrape(client)("store_bytes") == size
    llm.engine.close()


def test_metrics_while_the_model_is_loaded(engine: Engine) -> None:
    gate = threading.Event()

    def load() -> Engine:
        gate.wait(20)
        return engine

    with serving(create_app(load, model_name="tiny")) as url, httpx.Client(base_url=url) as client:
        assert scrape(client)("num_requests_running") == 0
        assert [client.get("/health").status_code for _ in range(3)] == [503] * 3, "who asks for no work is not refused any"
        assert client.post(CHAT, json=body("x")).status_code == 503
        assert scrape(client)("admission_rejections_total", "loading") == 1
        gate.set()
        wait_until(lambda: client.get("/health").status_code == 200)


# What one request adds, event by event


def output(reason: str, *, tokens: int = 3, recall: float | None = 0.9) -> RequestOutput:
    times = RequestMetrics(queue_s=1.0, ttft_s=15_000.0, prefill_s=14_999.0, decode_s=8.0, density=0.25, recall=recall)
    return RequestOutput(
        request_id="r", text="", token_ids=tuple(range(tokens)), prompt_tokens=1000, cached_tokens=640, finish_reason=reason, metrics=times
    )


@pytest.fixture
def metrics() -> Metrics:
    return Metrics("tiny", lambda: EngineStats(1, 2, 0.5, 4096))


def now(metrics: Metrics) -> Scrape:
    return Scrape(metrics.render().decode())


def test_progress_shows_while_a_prompt_is_read(metrics: Metrics) -> None:
    meter = metrics.meter()
    meter.on_event(PrefillProgress(1000, 640, 640, 0.0))
    meter.on_event(PrefillProgress(1000, 640, 768, 0.1))
    assert now(metrics)("prefill_progress_tokens") == now(metrics)("prompt_tokens_total") == 768
    meter.on_event(PrefillProgress(1000, 640, 1000, 0.2))
    meter.on_event(TokenDelta("", (5,)))
    meter.on_event(TokenDelta("", ()))
    meter.on_event(TokenDelta("a", (6,)))
    meter.on_event(Finished(output("stop")))
    after = now(metrics)
    assert after("prefill_progress_tokens") == 0 and after("prompt_tokens_total") == 1000
    assert after("generation_tokens_total") == 2 and after("inter_token_latency_seconds_count") == 1
    assert (after("num_requests_running"), after("num_requests_waiting"), after("kv_cache_usage_perc"), after("store_bytes")) == (1, 2, 0.5, 4096)


def test_latencies_are_of_requests_that_ended_by_themselves(metrics: Metrics) -> None:
    for event in (Finished(output("stop")), Finished(output("length", tokens=1, recall=None)), Finished(output("abort")), Failed(ValueError())):
        metrics.meter().on_event(event)
    after = now(metrics)
    assert [after("request_success_total", reason) for reason in FINISH_REASONS] == [1, 1, 1, 1]
    assert after("time_to_first_token_seconds_sum") == 30_000
    assert after("time_to_first_token_seconds_bucket", "14400.0") == 0 and after("time_to_first_token_seconds_bucket", "+Inf") == 2
    assert after("request_time_per_output_token_seconds_sum") == 4 and after("e2e_request_latency_seconds_sum") == 30_016
    assert (after("attention_density_count"), after("attention_density_sum")) == (2, 0.5)
    assert (after("attention_recall_count"), after("attention_recall_sum")) == (1, 0.9)
    assert after("attention_recall_bucket", "0.85") == 0 and after("attention_recall_bucket", "0.9") == 1


# Places in the queue


@pytest.fixture
def service(engine: Engine) -> Iterator[EngineService]:
    result = EngineService(engine, max_queue=2)
    yield result
    result.close()


def test_a_place_is_given_back_once_however_a_request_ends(engine: Engine, service: EngineService) -> None:
    with pytest.raises(EmptyPromptError):
        service.submit([], GREEDY)
    assert (service.num_waiting, service.num_running) == (0, 0)
    with Held(engine):
        for end in ("cancelled", "twice cancelled"):
            stream = service.submit([5, 6], GREEDY)
            stream.cancel()
            if end == "twice cancelled":
                stream.cancel()
        assert service.num_waiting == 2, "its tokens are in memory until the engine has seen that it is cancelled"
        with pytest.raises(RateLimitExceededError):
            service.submit([5], GREEDY)
        assert service.num_waiting == 2, "who was refused has no place"
    wait_until(lambda: service.num_waiting == 0)
    ends = [list(service.submit([5, 6, 7], GREEDY))[-1] for _ in range(5)]
    assert all(isinstance(end, Finished) for end in ends)
    begin = engine.decoder.begin
    engine.decoder.begin = lambda *args, **kwargs: 1 / 0  # type: ignore[method-assign, assignment]
    assert isinstance(list(service.submit([5, 6, 7, 8], GREEDY))[-1], Failed)
    engine.decoder.begin = begin  # type: ignore[method-assign]
    assert (service.num_waiting, service.num_running) == (0, 0)


def test_a_full_queue_says_when_to_come_back(engine: Engine, service: EngineService) -> None:
    assert service.retry_after_s == 30
    service._pass_on(_Place(RequestStream(engine.abort), None), Finished(output("stop")))
    assert service.retry_after_s == 120, "15,007 seconds are more than clients wait"
    for _ in range(60):
        list(service.submit([5], GREEDY))
    assert service.retry_after_s == 1


def test_an_observer_that_fails_harms_nothing(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        def on_event(self, event: object) -> None:
            raise ValueError("broken")

        def on_refused(self) -> None:
            raise AssertionError

    service = EngineService(engine, watch=Broken)
    assert isinstance(list(service.submit([5, 6], GREEDY))[-1], Finished)
    service.close()
    assert "could not be observed" in caplog.text


def test_closing_says_why(engine: Engine) -> None:
    service = EngineService(engine)
    running = service.submit(list(range(5, 105)), SamplingParams(max_tokens=3000, ignore_eos=True))
    next(iter(running))
    service.close(ShuttingDownError("The server is shutting down."))
    service.close()
    for _ in range(2):
        with pytest.raises(ShuttingDownError):
            service.submit([5], GREEDY)
    *_, last = running
    assert isinstance(last, Failed) and isinstance(last.error, ShuttingDownError)
    assert not engine.has_work()


def test_a_client_that_leaves_the_queue_gives_its_place_back(engine: Engine) -> None:
    with server(engine, max_queue=1) as client:
        with Held(engine) as held:
            content = httpx.Request("POST", f"{client.base_url}{CHAT}", json=body("waits")).content
            with socket.create_connection((client.base_url.host, client.base_url.port)) as connection:
                connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n".encode() + content)
                held.wait_for_work()
                assert client.post(CHAT, json=body("y")).status_code == 429
            wait_until(lambda: all(request.aborted.is_set() for request in engine._known.values()))
        wait_until(lambda: scrape(client)("num_requests_waiting") == 0)
        assert client.post(CHAT, json=body("y")).status_code == 200
        assert scrape(client)("request_success_total", "abort") == 1
