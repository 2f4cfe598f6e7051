"""Programs that people put in front of an OpenAI endpoint, each in its own words (tests/clients), against a tiny random model.

They live in an environment of their own, .venv-clients, which the first run makes: their dependencies are not ours.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from serving import NAME, serving_client
from test_tools import HERMES_TEMPLATE, load

from zen_turbo.engine.engine import Engine

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv-clients"
PACKAGES = {
    "litellm": "litellm==1.110.2",
    "langchain": "langchain-openai==1.7.4",
    "lm_eval": "lm-eval[api]==0.4.13 transformers==5.24.0",
    "nvidia": "nvidia-long-context-eval==26.3",
}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python() -> Path:
    """The interpreter of the clients' environment, made if the pinned packages are not there."""
    python, stamp = ENVIRONMENT / "bin" / "python", ENVIRONMENT / "packages.txt"
    wanted = " ".join(PACKAGES.values())
    if not stamp.exists() or stamp.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", ENVIRONMENT], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *wanted.split()], check=True)
        stamp.write_text(wanted)
    return python


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """It knows tools and no thoughts, which a random model would not end."""
    template = HERMES_TEMPLATE.partition("{% if enable_thinking is defined %}")[0] + "{% endif %}"
    engine = load(tmp_path_factory.mktemp("clients"), template)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def client(engine: Engine) -> Iterator[openai.OpenAI]:
    with serving_client(engine) as client:
        yield client


@pytest.mark.parametrize("name", PACKAGES)
def test_a_client_is_content(name: str, python: Path, client: openai.OpenAI, engine: Engine) -> None:
    base_url = str(client.base_url).rstrip("/")
    script = ROOT / "tests" / "clients" / f"{name}_client.py"
    result = subprocess.run([python, script, base_url, NAME, engine.model_path], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and result.stdout.rstrip().endswith("ok"), result.stdout[-2000:] + result.stderr[-6000:]
