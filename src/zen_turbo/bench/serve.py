"""``zen-turbo bench serve``: the server under people. Three cases, each against a server process of its own, over real sockets:

    overhead           the same parallel requests to the server and to the offline engine in this process, in turns
                       vs_offline: median wall time of the server over the engine's, minus 1
    short_during_long  a long prompt alone, then another one while short questions arrive at fixed times
                       ttft_p95_s of the short ones; long_slowdown: time to first token of the second long prompt over the first's, minus 1
    load               clients that ask without pause for some minutes: prompts of log-uniform length, some of them several times, a fifth
                       left by their clients at a random moment
                       lost: neither finished nor refused; mixed_up: greedy answers that differ from another one to the same prompt;
                       rss_growth_mib: of the server, from after its KV pool was filled once to the end

Prompts are parts of the standard library's source, none twice but where said. Clients are threads with blocking sockets: they cost little.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import http.client
import json
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from zen_turbo.bench.prefill import engine_facts
from zen_turbo.bench.report import Experiment, Row
from zen_turbo.bench.text import read_tokens
from zen_turbo.config import EngineConfig, flag_of
from zen_turbo.engine.engine import Engine
from zen_turbo.engine.request import Event, Finished, SamplingParams
from zen_turbo.errors import ConfigurationError, ZenTurboError
from zen_turbo.llm import LLM

CASES = ("overhead", "short_during_long", "load")
COLUMNS = ("case", "vs_offline", "ttft_p95_s", "long_slowdown", "clients", "requests", "lost", "errors", "mixed_up", "rss_growth_mib")
_MIB = 2**20
_READY_S = 600.0
_HANGING_S = 3600.0  # a request that says nothing for so long is lost
OVERHEAD_ROUNDS = 5  # after one that warms up
SETTLE_S = 2.0  # from the last answer under load until memory is looked at

Message = list[dict[str, str]]


class Answer(NamedTuple):
    """outcome: finished, cancelled (by us), refused (an error in the API's shape) or lost. Seconds from sending."""

    outcome: str
    text: str
    ttft_s: float | None
    total_s: float
    error: str = ""


class Server:
    """``zen-turbo serve`` in a process of its own, from when it is ready. Raises ZenTurboError with its words if it ends before."""

    def __init__(self, model: str, config: EngineConfig) -> None:
        command = [sys.executable, "-m", "zen_turbo", "serve", "--model", model, "--port", "0", *flags_of(config)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self._words: list[str] = []
        self._address = threading.Event()
        self._port = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        deadline = time.monotonic() + _READY_S
        while not (self._address.is_set() and self._get("/health") == 200):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.close()
                raise ZenTurboError("The server did not start: " + " ".join(self._words[-5:]))
            time.sleep(0.1)
        self._facts = psutil.Process(self._process.pid)

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._words = [*self._words[-20:], line.strip()]
            if found := re.search(r"listening on http://[\d.]+:(\d+)", line):
                self._port = int(found[1])
                self._address.set()

    def _get(self, path: str) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        with contextlib.closing(connection):
            try:
                connection.request("GET", path)
                with connection.getresponse() as response:
                    return response.status
            except OSError:
                return 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def rss_bytes(self) -> int:
        return self._facts.memory_info().rss

    def ask(self, messages: Message, *, max_tokens: int, leave_after_s: float | None = None) -> Answer:
        """One streamed request, greedy, to the end or until the client leaves."""
        body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "stream": True}
        began = time.perf_counter()
        first: float | None = None
        text = ""

        def done(outcome: str, error: str = "") -> Answer:
            return Answer(outcome, text, first, time.perf_counter() - began, error)

        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=leave_after_s or _HANGING_S)
        with contextlib.closing(connection):
            try:
                connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
                with connection.getresponse() as response:
                    if response.status != 200:
                        return done("refused", str(json.loads(response.read())["error"]["code"]))
                    for line in response:
                        if leave_after_s is not None and time.perf_counter() - began > leave_after_s:
                            return done("cancelled")
                        if not line.startswith(b"data: "):
                            continue
                        if line.strip() == b"data: [DONE]":
                            return done("finished")
                        event = json.loads(line[6:])
                        if "error" in event:
                            return done("refused", str(event["error"]["code"]))
                        for choice in event["choices"]:
                            if content := choice["delta"].get("content"):
                                first = first or time.perf_counter() - began
                                text += content
                return done("lost", "the stream ended without its last line")
            except TimeoutError:
                return done("cancelled") if leave_after_s is not None else done("lost", "no word for an hour")
            except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
                return done("lost", repr(error))

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(10)
        if self._process.stderr is not None:
            self._process.stderr.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def flags_of(config: EngineConfig) -> list[str]:
    """The flags that give ``config`` on the command line."""
    flags: list[str] = []
    for knob in dataclasses.fields(config):
        value, flag = getattr(config, knob.name), flag_of(knob.name)
        if value == knob.default:
            continue
        flags += [flag if value else f"--no-{flag[2:]}"] if isinstance(value, bool) else [flag, str(value)]
    return flags


class Prompts:
    """Parts of a text, one after the other, each begun with its number so that no two share more than the template."""

    def __init__(self, engine: Engine, num_tokens: int) -> None:
        self._decode = engine.tokenizer.decode
        self._tokens = read_tokens(engine.tokenizer, num_tokens)
        self._at = 0
        self._count = 0

    def next(self, num_tokens: int) -> Message:
        """About so many tokens; from the beginning again when the text is used up, with another number."""
        if self._at + num_tokens > len(self._tokens):
            self._at = 0
        part = self._decode(self._tokens[self._at : self._at + num_tokens])
        self._at += num_tokens
        self._count += 1
        return [{"role": "user", "content": f"Part {self._count}.\n{part}\n\nWhat does this program do?"}]


def run(
    *,
    model: str,
    cases: Sequence[str],
    long_tokens: int,
    short_every_s: float,
    clients: int,
    minutes: float,
    config: EngineConfig,
    output: Path | None = None,
) -> dict[str, Any]:
    """Measure the cases, print the report, return the record. Raises ConfigurationError for an unknown case or impossible numbers,
    ZenTurboError where a request that is measured does not finish, and the engine's own errors."""
    if not cases or set(cases) - set(CASES):
        raise ConfigurationError(f"cases must be of {', '.join(CASES)}.", param="cases")
    if min(long_tokens, clients) < 1 or min(short_every_s, minutes) <= 0:
        raise ConfigurationError("long_tokens, short_every_s, clients and minutes must be positive.", param="cases")
    settings = {
        "model": model,
        "cases": list(cases),
        "long_tokens": long_tokens,
        "short_every_s": short_every_s,
        "clients": clients,
        "minutes": minutes,
    }
    experiment = Experiment("bench", "serve", settings=settings, output=output)
    engine = LLM(model, config=config).engine
    experiment.settings |= engine_facts(engine)
    prompts = Prompts(engine, max(2 * long_tokens + 50_000, 200_000))
    rows: list[Row] = []
    try:
        for case in (case for case in CASES if case in cases):
            if case == "overhead":
                row = _overhead(experiment, engine, model, config, prompts)
            elif case == "short_during_long":
                row = _short_during_long(experiment, model, config, prompts, long_tokens, short_every_s)
            else:
                row = _load(experiment, engine, model, config, prompts, clients, minutes)
            rows.append({"case": case, **row})
    finally:
        engine.close()
    return experiment.finish(rows, columns=COLUMNS, note="Ratios are over the same work in the same run.")


def _overhead(experiment: Experiment, engine: Engine, model: str, config: EngineConfig, prompts: Prompts) -> Row:
    parallel, prompt_tokens, answer_tokens, rounds = 8, 500, 64, OVERHEAD_ROUNDS
    greedy = SamplingParams(temperature=0.0, max_tokens=answer_tokens, ignore_eos=True)
    offline: list[float] = []
    served: list[float] = []
    with Server(model, config) as server:
        for number in range(rounds + 1):
            batch = [prompts.next(prompt_tokens) for _ in range(parallel)]
            began = time.perf_counter()
            last: dict[int, Event] = {}
            for index, messages in enumerate(batch):
                prompt = engine.chat_template.encode(messages)
                engine.submit(prompt, greedy, on_event=functools.partial(last.__setitem__, index))
            while engine.step():
                pass
            alone = time.perf_counter() - began
            if not all(isinstance(event, Finished) for event in last.values()):
                raise ZenTurboError("A request of the measurement failed in the offline engine.")
            began = time.perf_counter()
            answers = _all_at_once([lambda messages=messages: server.ask(messages, max_tokens=answer_tokens) for messages in batch])
            together = time.perf_counter() - began
            for answer in answers:
                _finished(answer)
            if number:  # the first round warms both up
                offline.append(alone)
                served.append(together)
                experiment.log(f"overhead, round {number}: offline {alone:.2f} s, served {together:.2f} s")
    return {
        "parallel": parallel,
        "prompt_tokens": prompt_tokens,
        "answer_tokens": answer_tokens,
        "rounds": rounds,
        "offline_s": statistics.median(offline),
        "served_s": statistics.median(served),
        "vs_offline": statistics.median(served) / statistics.median(offline) - 1,
    }


def _short_during_long(
    experiment: Experiment, model: str, config: EngineConfig, prompts: Prompts, long_tokens: int, every_s: float
) -> Row:
    short_tokens, short_answer = 200, 8
    with Server(model, config) as server:
        server.ask(prompts.next(short_tokens), max_tokens=short_answer)
        alone = _finished(server.ask(prompts.next(long_tokens), max_tokens=1))
        experiment.log(f"{long_tokens} tokens alone: {alone.total_s:.1f} s")
        answers: list[Answer] = []
        over = threading.Event()

        def ask_short() -> None:
            while not over.wait(every_s):
                answers.append(_finished(server.ask(prompts.next(short_tokens), max_tokens=short_answer)))

        asking = threading.Thread(target=ask_short)
        asking.start()
        disturbed = _finished(server.ask(prompts.next(long_tokens), max_tokens=1))
        over.set()
        asking.join()
    # One that was asked after the long prompt was read says nothing.
    times = sorted(answer.ttft_s for answer in answers if answer.ttft_s is not None)
    if not times:
        raise ConfigurationError(f"No short request fits into {disturbed.total_s:.1f} s at one every {every_s} s.", param="short_every_s")
    experiment.log(f"{long_tokens} tokens with {len(times)} short requests: {disturbed.total_s:.1f} s")
    return {
        "long_tokens": long_tokens,
        "long_alone_s": alone.total_s,
        "long_with_short_s": disturbed.total_s,
        "long_slowdown": disturbed.total_s / alone.total_s - 1,
        "short_tokens": short_tokens,
        "short_answer_tokens": short_answer,
        "short_every_s": every_s,
        "short_requests": len(times),
        "ttft_p50_s": _percentile(times, 0.5),
        "ttft_p95_s": _percentile(times, 0.95),
        "ttft_max_s": times[-1],
    }


def _load(
    experiment: Experiment, engine: Engine, model: str, config: EngineConfig, prompts: Prompts, clients: int, minutes: float
) -> Row:
    shortest, longest, answer_tokens, cancelled_share, repeated_share = 200, 16_384, 32, 0.2, 0.3
    longest = min(longest, engine.max_model_len // 2)
    if config.kv_cache_bytes is None:  # small enough to be filled before memory is looked at
        config = dataclasses.replace(config, kv_cache_bytes=64 * engine.geometry.bytes_for(1024))
    pool_tokens = config.kv_cache_bytes // engine.geometry.bytes_for(64) * 64
    longest = min(longest, pool_tokens // 2)
    often = [prompts.next(300) for _ in range(8)]
    answers: list[tuple[int, Answer]] = []
    lock = threading.Lock()
    with Server(model, config) as server:
        experiment.log(f"load: filling the pool of {pool_tokens:,} tokens")
        read = 0
        while read < 1.2 * pool_tokens:
            _finished(server.ask(prompts.next(longest // 2), max_tokens=1))
            read += longest // 2
        started = server.rss_bytes
        deadline = time.monotonic() + 60 * minutes

        def client(number: int) -> None:
            chance = random.Random(number)
            while time.monotonic() < deadline:
                which = chance.randrange(len(often)) if chance.random() < repeated_share else -1
                size = int(shortest * (longest / shortest) ** chance.random())
                with lock:
                    messages = often[which] if which >= 0 else prompts.next(size)
                leave = chance.expovariate(1 / 20) if chance.random() < cancelled_share else None
                answer = server.ask(messages, max_tokens=answer_tokens, leave_after_s=leave)
                with lock:
                    answers.append((which, answer))
                if answer.outcome == "refused":
                    time.sleep(1)

        began = time.perf_counter()
        _all_at_once([lambda number=number: client(number) for number in range(clients)])
        seconds = time.perf_counter() - began
        # Whoever left is forgotten by now if a request that follows is served.
        _finished(server.ask(prompts.next(shortest), max_tokens=1))
        time.sleep(SETTLE_S)
        ended = server.rss_bytes
    outcomes: dict[str, int] = defaultdict(int)
    same: dict[int, set[str]] = defaultdict(set)
    for which, answer in answers:
        outcomes[answer.outcome] += 1
        if which >= 0 and answer.outcome == "finished":
            same[which].add(answer.text)
    times = sorted(answer.ttft_s for _, answer in answers if answer.outcome == "finished" and answer.ttft_s is not None)
    return {
        "clients": clients,
        "minutes": minutes,
        "seconds": seconds,
        "requests": len(answers),
        "finished": outcomes["finished"],
        "cancelled": outcomes["cancelled"],
        "errors": outcomes["refused"],
        "error_codes": sorted({answer.error for _, answer in answers if answer.outcome == "refused"}),
        "lost": outcomes["lost"],
        "lost_why": sorted({answer.error for _, answer in answers if answer.outcome == "lost"})[:5],
        "mixed_up": sum(len(texts) - 1 for texts in same.values()),
        "prompt_tokens_from": shortest,
        "prompt_tokens_to": longest,
        "pool_tokens": pool_tokens,
        "ttft_p50_s": _percentile(times, 0.5) if times else None,
        "ttft_p95_s": _percentile(times, 0.95) if times else None,
        "rss_start_mib": started / _MIB,
        "rss_end_mib": ended / _MIB,
        "rss_growth_mib": (ended - started) / _MIB,
    }


def _finished(answer: Answer) -> Answer:
    if answer.outcome != "finished":
        raise ZenTurboError(f"A request of the measurement was {answer.outcome}: {answer.error}.")
    return answer


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _all_at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Every call in a thread of its own; their results in order, or the first call's exception when all have ended."""
    with ThreadPoolExecutor(len(calls)) as threads:
        running = [threads.submit(call) for call in calls]
    return [future.result() for future in running]
