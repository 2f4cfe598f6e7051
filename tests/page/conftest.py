"""The web page in a real browser, in front of the real server with a tiny random model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from browsing import CHROMIUM, LIMIT, NAME, expect, stored
from playwright.sync_api import Browser, Page, sync_playwright
from serving import serving, wait_until

from zen_turbo import LLM
from zen_turbo.engine.engine import Engine
from zen_turbo.server.app import create_app


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    return LLM(tiny_folder, prefill_chunk_tokens=128, kv_cache_bytes=64 << 20, max_model_len=LIMIT).engine


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    with serving(create_app(lambda: engine, model_name=NAME, keep_alive_s=0.2, default_max_tokens=24)) as base:
        wait_until(lambda: httpx.get(f"{base}/health").status_code == 200)
        yield base


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens pages of their own storage. Afterwards none of them may have complained; an answer with a bad status is no complaint."""
    contexts, complaints = [], []

    def open_page(address: str, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 800}, "permissions": ["clipboard-read", "clipboard-write"], **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: message.type in ("error", "warning") and complaints.append(message.text))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [each for each in complaints if not each.startswith("Failed to load resource")] == []


@pytest.fixture
def no_files(url: str) -> None:
    for file in stored(url).values():
        httpx.delete(f"{url}/v1/files/{file['id']}")


@pytest.fixture
def page(open_page: Callable[..., Page], url: str, no_files: None) -> Page:
    page = open_page(url)
    expect(page.locator("#context")).to_have_text(f"{LIMIT:,} tokens")
    return page
