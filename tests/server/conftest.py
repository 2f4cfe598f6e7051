"""One server with a tiny random model for each module, and its clients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from serving import client_of, served

from zen_turbo import LLM
from zen_turbo.engine.engine import Engine


@pytest.fixture(scope="module")
def engine(tiny_folder: Path) -> Engine:
    return LLM(tiny_folder, prefill_chunk_tokens=128, kv_cache_bytes=64 << 20, max_model_len=4096).engine


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    with served(engine) as base:
        yield base


@pytest.fixture(scope="module")
def http(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with client_of(url) as result:
        yield result
