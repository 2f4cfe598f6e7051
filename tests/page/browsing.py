"""What a person does on the page, and what the tests of the page share."""

from __future__ import annotations

import json
import shutil
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

expect.set_options(timeout=20_000)  # a busy machine is no failure
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="the page is tested in Chromium: sudo apt-get install chromium (Fedora: dnf)")
NAME = "tiny"
LIMIT = 4096


def stored(url: str) -> dict[str, dict[str, Any]]:
    """What the server keeps, by file name."""
    return {file["filename"]: file for file in httpx.get(f"{url}/v1/files").json()["data"]}


def add(page: Page, **texts: str) -> None:
    """Adds documents NAME.txt, and waits until they are counted."""
    before = page.locator("#document-list .document").count()
    payload = [{"name": f"{name}.txt", "mimeType": "text/plain", "buffer": text.encode()} for name, text in texts.items()]
    page.locator("#files").set_input_files(payload)
    expect(page.locator('.document[data-state="ready"]')).to_have_count(before + len(texts))


def ask(page: Page, question: str) -> Any:
    """Asks, and gives the turn."""
    turns = page.locator(".turn").count()
    page.get_by_label("Question").fill(question)
    page.get_by_label("Question").press("Enter")
    expect(page.locator(".turn")).to_have_count(turns + 1)
    return page.locator(".turn").last


def done(turn: Any) -> Any:
    expect(turn).to_have_attribute("data-state", "done")
    return turn


def fact(turn: Any, term: str) -> str:
    text = turn.locator(".facts div", has=turn.page.locator(f"dt:text-is('{term}')")).locator("dd").inner_text()
    return text.replace("\u00a0", " ")


def asked(page: Page) -> list[dict[str, Any]]:
    """Bodies of the chat requests from now on."""
    bodies: list[dict[str, Any]] = []
    page.on("request", lambda request: request.url.endswith("/v1/chat/completions") and bodies.append(request.post_data_json))
    return bodies


def answers_with(page: Page, status: int = 200, body: str = "", **headers: str) -> None:
    """From now on the server's answer to a chat request is this."""
    page.unroute_all()
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=status, body=body, headers=headers))


def stream(text: str, *, whole: bool = True) -> str:
    chunks: list[Any] = [{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}]
    chunks += [{"choices": [{"index": 0, "delta": {"content": text[at : at + 7]}, "finish_reason": None}]} for at in range(0, len(text), 7)]
    ending = [{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}] if whole else []
    events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks + ending]
    return "".join(events) + ("data: [DONE]\n\n" if whole else "")


def error(code: str, message: str = "It did not work", **details: Any) -> str:
    return json.dumps({"error": {"message": message, "type": "server_error", "param": None, "code": code, **details}})
