"""The server as a process that is told to end: what runs may finish, what comes is told to come back, what was read is kept."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import tiny

from zen_turbo import LLM
from zen_turbo.engine.request import SamplingParams

ROOM = ("--kv-cache-bytes", str(64 << 20), "--prefill-chunk-tokens", "128", "--max-model-len", "4096")
CHAT = "/v1/chat/completions"


class Process:
    """``zen-turbo serve`` on a free port; ``lines``: its log so far."""

    def __init__(self, model: Path, *options: str) -> None:
        command = [sys.executable, "-m", "zen_turbo", "serve", "--model", str(model), "--port", "0", "--log-format", "json", *ROOM, *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.wait(lambda: any("listening on" in line for line in self.lines), "it never listened")
        (self.url,) = re.findall(r"listening on (http://127\.0\.0\.1:\d+)", "".join(self.lines))
        self.wait(lambda: httpx.get(f"{self.url}/health").status_code == 200, "it never got ready")

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)

    def wait(self, condition: Any, why: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (why, self.lines)
            time.sleep(0.02)

    def signal(self, which: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(which)

    def end(self) -> int:
        status = self.process.wait(timeout=60)
        self._reader.join(10)
        return status

    def facts(self) -> list[dict[str, Any]]:
        return [line for line in map(json.loads, self.lines) if line["message"] == "request"]


@pytest.fixture(scope="module")
def slow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers take long enough to be interrupted: many layers, and no token that ends one."""
    model = tiny.model("qwen2", max_position_embeddings=512, num_hidden_layers=24, layer_types=["full_attention"] * 24)
    return tiny.save(model, tmp_path_factory.mktemp("slow"))


@contextmanager
def running(model: Path, *options: str) -> Iterator[Process]:
    process = Process(model, *options)
    try:
        yield process
    finally:
        process.process.kill()
        process.end()
        assert process.process.stdout is not None and process.process.stderr is not None
        process.process.stdout.close()
        process.process.stderr.close()


def body(max_tokens: int, **values: Any) -> dict[str, Any]:
    message = {"role": "user", "content": "The grass is green. " * 30}
    return {"messages": [message], "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0, **values}


def chunks(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def test_a_running_answer_finishes_and_newcomers_are_told(slow_folder: Path) -> None:
    with running(slow_folder) as server, httpx.stream("POST", f"{server.url}{CHAT}", json=body(100, stream=True), timeout=60) as answer:
        events = chunks(answer.iter_lines())
        next(event for event in events if event["choices"][0]["delta"].get("content"))
        server.signal()
        server.wait(lambda: httpx.get(f"{server.url}/health").status_code == 503, "it never closed its door")
        refused = httpx.post(f"{server.url}{CHAT}", json=body(1))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert int(refused.headers["retry-after"]) > 0
        assert 'admission_rejections_total{model_name="' in httpx.get(f"{server.url}/metrics").text
        last = [event for event in events if event.get("choices")][-1]
        assert last["choices"][0]["finish_reason"] == "length"
        assert server.end() == 0
        (done,) = [facts for facts in server.facts() if facts["status"] == 200 and facts["route"] == CHAT]
        assert (done["completion_tokens"], done["finish_reason"]) == (100, "length")


def test_what_does_not_finish_in_time_ends_with_an_error(slow_folder: Path) -> None:
    with running(slow_folder, "--drain-s", "0.3") as server:
        answers: dict[bool, httpx.Response] = {}

        def ask(stream: bool) -> None:
            answers[stream] = httpx.post(f"{server.url}{CHAT}", json=body(2000, stream=stream), timeout=60)

        asking = [threading.Thread(target=ask, args=(stream,), daemon=True) for stream in (True, False)]
        for thread in asking:
            thread.start()
        server.wait(lambda: re.search(r"num_requests_running\{.*\} 2\.0", httpx.get(f"{server.url}/metrics").text), "they never ran")
        server.signal()
        for thread in asking:
            thread.join(30)
        assert answers[True].status_code == 200
        *_, error, done = [line for line in answers[True].text.splitlines() if line]
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "shutting_down" and done == "data: [DONE]"
        assert (answers[False].status_code, answers[False].json()["error"]["code"]) == (503, "shutting_down")
        assert "retry-after" in answers[False].headers
        assert server.end() == 0
        assert [facts["error"] for facts in server.facts() if facts["route"] == CHAT] == ["shutting_down"] * 2


def test_what_was_read_is_kept(tiny_folder: Path, tmp_path: Path) -> None:
    with running(tiny_folder, "--store", str(tmp_path)) as server:
        usage = httpx.post(f"{server.url}{CHAT}", json=body(2), timeout=60).json()["usage"]
        server.signal(signal.SIGINT)
        assert server.end() == 0
    assert list(tmp_path.glob("*/*.manifest")) and not list(tmp_path.glob("*/*.tmp"))
    llm = LLM(tiny_folder, kv_cache_bytes=64 << 20, prefill_chunk_tokens=128, max_model_len=4096, store=str(tmp_path))
    again = llm.chat(body(2)["messages"], SamplingParams(max_tokens=2))
    llm.engine.close()
    assert again.prompt_tokens == usage["prompt_tokens"] and again.cached_tokens >= usage["prompt_tokens"] - 128


def test_a_second_signal_ends_at_once(slow_folder: Path) -> None:
    with running(slow_folder, "--drain-s", "600") as server:
        with httpx.stream("POST", f"{server.url}{CHAT}", json=body(3000, stream=True), timeout=60) as answer:
            events = chunks(answer.iter_lines())
            next(events)
            server.signal()
            server.wait(lambda: any("again to end now" in line for line in server.lines), "the signal was not heard")
            server.signal()
            assert server.end() == 128 + signal.SIGTERM
            with pytest.raises(httpx.RemoteProtocolError):
                list(events)
