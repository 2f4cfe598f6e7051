"""Who may send what: keys, foreign pages, how much at once, how large, and what the log says of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serving import Held, server, wait_until
from starlette.types import Message, Receive, Scope, Send

from zen_turbo import LLM
from zen_turbo.engine.engine import Engine
from zen_turbo.errors import ConfigurationError, RequestTooLargeError
from zen_turbo.server.keys import KeyRing, collect_keys
from zen_turbo.server.logs import JsonFormatter, TextFormatter
from zen_turbo.server.openapi import BODIES
from zen_turbo.server.security import BODIES_IN_FLIGHT, OPEN_PATHS, BodyLimit
from zen_turbo.server.settings import ServerSettings

CHAT = "/v1/chat/completions"
BODY = {"messages": [{"role": "user", "content": "The grass is green."}], "max_tokens": 2, "temperature": 0}
KEYS = ("sk-first-of-two", "sk-second-of-two")


def new_engine(folder: Path) -> Engine:
    """For every server its own: two servers that live at the same time would step one engine from two threads."""
    return LLM(folder, prefill_chunk_tokens=128, kv_cache_bytes=64 << 20, max_model_len=4096).engine


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    """Of the server that a test starts itself."""
    return new_engine(tiny_folder)


@pytest.fixture(scope="module")
def keyed_engine(tiny_folder: Path) -> Engine:
    return new_engine(tiny_folder)


@pytest.fixture(scope="module")
def open_server(tiny_folder: Path) -> Iterator[httpx.Client]:
    with server(new_engine(tiny_folder), loopback=True, max_body_bytes=100_000, body_limits=(("/v1/chat/completions/input_tokens", 1000),)) as client:
        yield client


@pytest.fixture(scope="module")
def keyed_server(keyed_engine: Engine) -> Iterator[httpx.Client]:
    with server(keyed_engine, keys=KeyRing(KEYS), max_requests_per_key=1) as client:
        yield client


@pytest.fixture(scope="module")
def roomy_server(tiny_folder: Path) -> Iterator[httpx.Client]:
    with server(new_engine(tiny_folder)) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def expect(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    body = answer.json()["error"]
    assert {"message", "type", "param", "code"} <= set(body)
    assert answer.headers["x-request-id"]
    return body


# Keys


def test_every_path_but_the_open_ones_asks_for_a_key(keyed_server: httpx.Client) -> None:
    routes = [route for route in keyed_server.get("/openapi.json", headers=bearer(KEYS[0])).json()["paths"]]
    assert CHAT in routes and "/metrics" in routes
    for path in [*routes, "/openapi.json", "/nothing", "/v1/chat/completions/", "/health/", "/metrics/../v1/models"]:
        for method in ("GET", "POST"):
            answer = keyed_server.request(method, path)
            if path in OPEN_PATHS:
                assert answer.status_code in (200, 405)
            else:
                expect(answer, 401, "invalid_api_key")
                assert answer.headers["www-authenticate"] == "Bearer"
    assert keyed_server.request("OPTIONS", CHAT).status_code == 405
    assert keyed_server.get("/").headers["content-type"].startswith("text/html")
    assert keyed_server.get("/page/other").json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer wrong", f"Basic {KEYS[0]}", KEYS[0], f"Bearer {KEYS[0]}x", f"Bearer {KEYS[0][:-1]}", "Bearer " + "x" * 9000],
)
def test_a_wrong_key_is_refused(keyed_server: httpx.Client, header: str) -> None:
    expect(keyed_server.post(CHAT, json=BODY, headers={"Authorization": header}), 401, "invalid_api_key")


def test_two_authorizations_are_none(keyed_server: httpx.Client) -> None:
    headers = [("Authorization", f"Bearer {KEYS[0]}"), ("Authorization", "Bearer wrong")]
    expect(keyed_server.post(CHAT, json=BODY, headers=headers), 401, "invalid_api_key")


@pytest.mark.parametrize("key", KEYS)
def test_any_of_the_keys_opens(keyed_server: httpx.Client, key: str) -> None:
    with openai.OpenAI(base_url=f"{keyed_server.base_url}/v1", api_key=key, max_retries=0) as client:
        assert client.models.list().data[0].id == "tiny"
        assert client.chat.completions.create(model="tiny", **BODY).usage.completion_tokens == 2  # type: ignore[call-overload]
    with openai.OpenAI(base_url=f"{keyed_server.base_url}/v1", api_key="no", max_retries=0) as client, pytest.raises(openai.AuthenticationError) as e:
        client.models.list()
    assert e.value.code == "invalid_api_key"


def test_a_body_without_a_key_is_not_read(keyed_server: httpx.Client) -> None:
    with socket.create_connection((keyed_server.base_url.host, keyed_server.base_url.port)) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 401")


def test_every_key_is_compared_whatever_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    monkeypatch.setattr("zen_turbo.server.keys.hmac.compare_digest", lambda one, other: compared.append(other) or one == other)
    ring = KeyRing(["a", "b", "c"])
    for key in (b"a", b"c", b"none"):
        compared.clear()
        assert ring.label_of(key) == (dict(zip((b"a", b"b", b"c"), ring.labels, strict=True)).get(key))
        assert len(compared) == 3


def test_keys_come_from_everywhere_together(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\n  file-1  \nfile-2\n")
    ring = collect_keys(["flag"], file, {"ZEN_TURBO_API_KEY": "environment"})
    assert [ring.label_of(key) is not None for key in (b"flag", b"file-1", b"file-2", b"environment", b"# ours", b"")] == [True] * 4 + [False] * 2
    assert not collect_keys([], None, {})
    assert "flag" not in repr(ring)
    file.write_text("# none\n")
    for given, where, environment in (([""], None, {}), (["a b"], None, {}), (["ä"], None, {}), ([], file, {}), ([], tmp_path / "no", {}),
                                      ([], None, {"ZEN_TURBO_API_KEY": ""})):  # fmt: skip
        with pytest.raises(ConfigurationError):
            collect_keys(given, where, environment)


def test_a_key_has_so_many_requests_at_a_time(keyed_server: httpx.Client, keyed_engine: Engine) -> None:
    answers: list[httpx.Response] = []

    def ask() -> None:
        answers.append(httpx.post(f"{keyed_server.base_url}{CHAT}", json=BODY, headers=bearer(KEYS[0]), timeout=60))

    with Held(keyed_engine) as held:
        thread = threading.Thread(target=ask)
        thread.start()
        held.wait_for_work()
        refused = keyed_server.post(CHAT, json=BODY, headers=bearer(KEYS[0]))
        assert expect(refused, 429, "rate_limit_exceeded")["reason"] == "max_requests_per_key"
        assert int(refused.headers["retry-after"]) > 0
        assert keyed_server.get("/v1/models", headers=bearer(KEYS[1])).status_code == 200
    thread.join()
    assert answers[0].status_code == 200
    assert keyed_server.post(CHAT, json=BODY, headers=bearer(KEYS[0])).status_code == 200


# Pages


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Host": "evil.example", "Origin": "http://evil.example"}, 403),
        ({"Host": "evil.example"}, 403),
        ({"Host": "localhost.evil.example"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Host": "localhost:8000", "Origin": "http://localhost:8000"}, 200),
        ({"Host": "[::1]:8000", "Origin": "http://[::1]:8000"}, 200),
        ({"Host": "192.168.0.7"}, 200),
    ],
)
def test_without_a_key_foreign_pages_are_refused(open_server: httpx.Client, headers: dict[str, str], status: int) -> None:
    answer = open_server.post(CHAT, json=BODY, headers=headers)
    assert answer.status_code == status
    if status == 403:
        expect(answer, 403, "forbidden_origin")


def test_the_page_of_the_server_itself_may_use_it(open_server: httpx.Client) -> None:
    own = str(open_server.base_url).rstrip("/")
    assert open_server.post(CHAT, json=BODY, headers={"Origin": own}).status_code == 200
    assert "access-control-allow-origin" not in open_server.post(CHAT, json=BODY, headers={"Origin": own}).headers


def test_a_name_that_is_rebound_reads_nothing_either(open_server: httpx.Client) -> None:
    expect(open_server.get("/v1/models", headers={"Host": "evil.example"}), 403, "forbidden_origin")


def test_cors_is_for_the_origins_that_were_named(engine: Engine) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    with server(engine, allow_origins=("https://chat.example",)) as client:
        allowed = client.options(CHAT, headers={"Origin": "https://chat.example", **asks})
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
        assert "authorization" in allowed.headers["access-control-allow-headers"]
        answer = client.post(CHAT, json=BODY, headers={"Origin": "https://chat.example"})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, "https://chat.example")
        assert "access-control-allow-origin" not in client.options(CHAT, headers={"Origin": "https://evil.example", **asks}).headers
        assert client.post(CHAT, json=BODY, headers={"Origin": "https://evil.example"}).status_code == 403
    with server(engine, keys=KeyRing(KEYS), allow_origins=("*",)) as client:
        refused = client.post(CHAT, json=BODY, headers={"Origin": "https://any.example"})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, "*"), "a page must be able to read why"


@pytest.mark.parametrize(
    "settings",
    [
        {"allow_origins": ("chat.example",)},
        {"allow_origins": ("https://chat.example/",)},
        {"allow_origins": ("https://*.example",)},
        {"max_requests_per_key": 2},
        {"max_queue": 0},
        {"max_body_bytes": -1},
        {"drain_s": float("nan")},
        {"drain_s": -1},
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        ServerSettings(**settings)


@pytest.mark.parametrize("origin", ["*", "http://localhost:5173", "https://chat.example", "moz-extension://f745c4ad-86bf", "http://[::1]:8000"])
def test_origins_as_browsers_send_them(origin: str) -> None:
    assert ServerSettings(allow_origins=(origin,)).allow_origins == (origin,)


# Bodies


def chunks(size: int) -> Iterator[bytes]:
    for _ in range(size // 1000):
        yield b" " * 1000


def test_a_body_that_is_too_large(open_server: httpx.Client) -> None:
    announced = open_server.post(CHAT, content=b" " * 100_001)
    body = expect(announced, 413, "request_too_large")
    assert (body["num_bytes"], body["max_bytes"]) == (100_001, 100_000)
    assert "100001" in body["message"] and "100000" in body["message"]
    streamed = expect(open_server.post(CHAT, content=chunks(200_000)), 413, "request_too_large")
    assert streamed["max_bytes"] == 100_000 < streamed["num_bytes"] <= 200_000
    expect(open_server.post(CHAT, content=b" " * 100_000), 400, "invalid_request")
    expect(open_server.post(CHAT, content=chunks(100_000)), 400, "invalid_request")


def test_a_path_has_its_own_limit(open_server: httpx.Client) -> None:
    path = "/v1/chat/completions/input_tokens"
    assert expect(open_server.post(path, content=b" " * 1001), 413, "request_too_large")["max_bytes"] == 1000
    assert expect(open_server.post(path, content=chunks(3000)), 413, "request_too_large")["max_bytes"] == 1000


def test_the_announced_length_is_refused_before_a_byte_is_read(open_server: httpx.Client) -> None:
    with socket.create_connection((open_server.base_url.host, open_server.base_url.port)) as connection:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99999999999999\r\nExpect: 100-continue\r\n\r\n"
        connection.sendall(head.encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_all_bodies_together_have_a_limit(engine: Engine) -> None:
    """Nine bodies of nine tenths of the limit are more than eight limits: not all of them are taken."""
    with server(engine, max_body_bytes=10_000) as client:
        address = (client.base_url.host, client.base_url.port)
        connections = [socket.create_connection(address) for _ in range(BODIES_IN_FLIGHT + 1)]
        try:
            for connection in connections:
                connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 9500\r\n\r\n".encode() + b" " * 9000)
            refused, _, _ = select.select(connections, [], [], 20)
            assert refused
            for connection in refused:
                answer = b""
                while b'"reason":"body_bytes"' not in answer:
                    piece = connection.recv(4096)
                    assert piece, answer
                    answer += piece
                assert answer.startswith(b"HTTP/1.1 429")
        finally:
            for connection in connections:
                connection.close()
        wait_until(lambda: client.post(CHAT, content=b" " * 9000).status_code == 400)


@pytest.mark.parametrize("end", ["read", "left unread", "too large", "failed"])
def test_a_body_counts_until_its_request_ends_however(end: str) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        while end != "left unread" and (await receive())["more_body"]:
            assert limit._in_memory > 0
        if end == "failed":
            raise ValueError

    async def receive() -> Message:
        sent.append(100)
        return {"type": "http.request", "body": b" " * 100, "more_body": end == "too large" or len(sent) < 5}

    async def send(message: Message) -> None: ...

    sent: list[int] = []
    limit = BodyLimit(app, default=1000)
    expected: type[Exception] | None = {"too large": RequestTooLargeError, "failed": ValueError}.get(end)
    with pytest.raises(expected) if expected else contextlib.nullcontext():
        asyncio.run(limit({"type": "http", "path": "/", "headers": []}, receive, send))
    assert limit._in_memory == 0


def test_headers_are_bounded(open_server: httpx.Client) -> None:
    with socket.create_connection((open_server.base_url.host, open_server.base_url.port)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Long: " + b"x" * 70_000)
        assert connection.recv(100).startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("path", sorted(BODIES))
def test_nesting_is_bounded(roomy_server: httpx.Client, path: str) -> None:
    for bomb in (b"[" * 5_000_000, b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"a":' * 100_000 + b"1" + b"}" * 100_000):
        expect(roomy_server.post(path, content=bomb), 400, "invalid_request")


# Request ids and the log


def test_a_request_id_is_taken_or_made(open_server: httpx.Client) -> None:
    def id_of(path: str = "/health", **headers: str) -> str:
        return open_server.get(path, headers=headers).headers["x-request-id"]

    assert id_of(**{"X-Request-Id": "client:7/a_b-c.d"}) == "client:7/a_b-c.d"
    for bad in ("", "a b", "x" * 129, "<script>", "a\tb"):
        assert id_of(**{"X-Request-Id": bad}).startswith("req-")
    assert id_of() != id_of()
    assert id_of("/nothing", **{"X-Request-Id": "mine"}) == "mine"
    streamed = open_server.post(CHAT, json={**BODY, "stream": True}, headers={"X-Request-Id": "a b"})
    assert streamed.headers.get_list("x-request-id", split_commas=True)[0].startswith("req-")


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.split(".")[0] in ("httpx", "httpcore"):  # the client's own, in the same process
            return
        self.records.append(record)

    def of(self, *request_ids: str) -> list[dict[str, Any]]:
        """The facts of these requests, in this order, when all are there; each has one line. A line is written when its response is over, so
        that of an earlier request may still come."""

        def found() -> list[dict[str, Any]]:
            facts = [record.__dict__["facts"] for record in self.records if "facts" in record.__dict__]
            return [each for each in facts if each["request_id"] in request_ids]

        wait_until(lambda: {facts["request_id"] for facts in found()} == set(request_ids))
        assert len(found()) == len(request_ids)
        return sorted(found(), key=lambda facts: request_ids.index(facts["request_id"]))


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler, root = Lines(), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield handler
    root.removeHandler(handler)
    root.setLevel(level)


def test_one_line_per_request_and_no_content(keyed_server: httpx.Client, lines: Lines) -> None:
    secret = "a very private question"
    message = {"messages": [{"role": "user", "content": secret}], "max_tokens": 3, "temperature": 0}
    label = KeyRing(KEYS).labels[0]
    ids = [f"line-{number}" for number in range(4)]
    headers = [{**bearer(KEYS[0]), "X-Request-Id": each} for each in ids[:3]]
    answer = keyed_server.post(CHAT, json=message, headers=headers[0]).json()
    keyed_server.post(CHAT, json={**message, "stream": True}, headers=headers[1])
    keyed_server.post(CHAT, json={**message, "temperature": -1}, headers=headers[2])
    keyed_server.post(f"/{secret.replace(' ', '%0A')}?key={KEYS[0]}", json=message, headers={"X-Request-Id": ids[3]})
    first, streamed, bad, foreign = lines.of(*ids)
    usage = answer["usage"]
    assert first["route"] == CHAT and first["method"] == "POST" and first["status"] == 200
    assert first["prompt_tokens"] == usage["prompt_tokens"] and first["completion_tokens"] == usage["completion_tokens"] == 3
    assert first["cached_tokens"] == usage["prompt_tokens_details"]["cached_tokens"]
    assert first["key"] == label and first["finish_reason"] == "length" and "error" not in first
    assert first["ttft_s"] == round(answer["zen_turbo"]["ttft_s"], 4) <= first["duration_s"]
    assert (streamed["status"], streamed["completion_tokens"], streamed["finish_reason"]) == (200, 3, "length")
    assert (bad["status"], bad["error"]) == (400, "invalid_request") and "prompt_tokens" not in bad
    assert (foreign["status"], foreign["error"]) == (401, "invalid_api_key") and "key" not in foreign
    shown = "\n".join(format.format(record) for record in lines.records for format in (TextFormatter(), JsonFormatter()))
    assert label in shown
    for hidden in (*KEYS, secret, "private question", answer["choices"][0]["message"]["content"]):
        assert hidden not in shown
    assert [shown.count(each) for each in ids] == [2] * 4, "one line in each format"


def test_log_lines_are_text_or_json() -> None:
    record = logging.LogRecord("zen_turbo.access", logging.INFO, "", 0, "request", (), None)
    record.facts = {"request_id": "a", "status": 200, "error": 'with "quotes"\nand lines'}
    line = JsonFormatter().format(record)
    assert "\n" not in line
    value = json.loads(line)
    assert value["request_id"] == "a" and value["status"] == 200 and value["level"] == "info" and value["time"].endswith("Z")
    assert TextFormatter().format(record).startswith(TextFormatter().formatTime(record))
    assert "status=200" in TextFormatter().format(record)
