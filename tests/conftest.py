"""Fixtures and options shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# Examples are the same in every run, are timed by nobody, and leave no folder behind.
hypothesis.settings.register_profile("repeatable", derandomize=True, database=None, deadline=None, max_examples=50)
hypothesis.settings.load_profile("repeatable")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow (long contexts, peers)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: run with ./scripts/test --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The default model's weights, downloaded once into the cache; a download that fails is a failure of the test."""
    return _resolve("qwen2.5-coder-0.5b-instruct")


@pytest.fixture(scope="session")
def small_model_path() -> Path:
    """Weights of the smallest model of the catalogue, downloaded as ``default_model_path``."""
    return _resolve("smollm2-135m-instruct")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen2 with a chat template, trained window 512: DCA spans of 384 tokens."""
    import tiny

    return tiny.save(tiny.model("qwen2", max_position_embeddings=512), tmp_path_factory.mktemp("tiny"))


def _resolve(name: str) -> Path:
    from zen_turbo.models.catalogue import resolve_model

    return resolve_model(name)


# Written out, because a test's name must not depend on the machine.
ISAS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx")


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once under each instruction set; those that this CPU lacks are skipped by name."""
    from zen_turbo import native

    if request.param not in native.available_isas():
        pytest.skip(f"this CPU has no {request.param}")
    with native.use_isa(request.param):
        yield request.param
