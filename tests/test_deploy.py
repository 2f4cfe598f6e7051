"""What lies in deploy/ and SECURITY.md fits the program: options, limits and times agree, and every claim names a test that exists."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest
import typer

from zen_turbo.cli import app
from zen_turbo.models.catalogue import CACHE_ENVIRONMENT
from zen_turbo.server.keys import KEY_ENVIRONMENT
from zen_turbo.server.metrics import PREFIX, EngineStats, Metrics
from zen_turbo.server.settings import DEFAULT_MAX_UPLOAD_BYTES, ServerSettings
from zen_turbo.server.shutdown import GRACE_S

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"
UNIT = (DEPLOY / "zen-turbo.service").read_text()
CONTAINER = (DEPLOY / "Containerfile").read_text()
NGINX = (DEPLOY / "nginx.conf").read_text()
SECURITY = (ROOT / "SECURITY.md").read_text()
SIZES = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def joined(text: str) -> str:
    """Continued lines made one, comments left out."""
    return "\n".join(line for line in text.replace("\\\n", " ").splitlines() if not line.startswith("#"))


def unit_values(name: str) -> list[str]:
    return re.findall(rf"^{name}=(.*)$", joined(UNIT), flags=re.MULTILINE)


def served_with(words: list[str]) -> dict[str, object]:
    """The values of ``zen-turbo serve`` for these options; fails for one that does not exist."""
    command: click.Command = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    with command.make_context("serve", words) as context:
        return dict(context.params)


def unit_command() -> list[str]:
    (line,) = unit_values("ExecStart")
    return shlex.split(line)


def container_command() -> list[str]:
    (line,) = re.findall(r"^ENTRYPOINT (\[.*\])$", CONTAINER, flags=re.MULTILINE)
    words = ast.literal_eval(line)
    assert isinstance(words, list)
    return words


@pytest.mark.parametrize("command", [unit_command(), container_command()], ids=["unit", "container"])
def test_the_options_of_services_exist(command: list[str]) -> None:
    assert command[0].endswith("/bin/zen-turbo") and command[1] == "serve"
    assert served_with(command[2:])["log_format"] == "json"


def test_the_unit_agrees_with_itself_and_the_program() -> None:
    values = served_with(unit_command()[2:])
    assert ServerSettings().max_body_bytes == values["max_body_bytes"]
    (stop,) = unit_values("TimeoutStopSec")
    assert int(stop) > values["drain_s"] + GRACE_S, "systemd would kill it while it drains"  # type: ignore[operator]
    (high,), (most,) = unit_values("MemoryHigh"), unit_values("MemoryMax")
    assert values["kv_cache_bytes"] < size_of(high) < size_of(most)  # type: ignore[operator]
    assert "MemoryDenyWriteExecute=yes" not in UNIT, "oneDNN generates code"
    (credential,) = unit_values("LoadCredential")
    assert str(values["api_key_file"]).endswith("/" + credential.split(":")[0])
    state = "/var/lib/" + unit_values("StateDirectory")[0]
    assert str(values["store"]).startswith(state) and str(values["files_dir"]).startswith(state)
    assert unit_values("OOMPolicy") == ["continue"], "a reader of documents that is killed must not stop the service"
    assert any(word.startswith(f"{CACHE_ENVIRONMENT}={state}") for word in unit_values("Environment")[0].split())


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    """With a program that is there: it looks for it."""
    unit = tmp_path / "zen-turbo.service"
    unit.write_text(UNIT.replace("/opt/zen-turbo/bin/zen-turbo", "/bin/true"))
    ran = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True)
    ours = [line for line in ran.stderr.splitlines() if "zen-turbo" in line]
    assert ours == []


def test_the_container() -> None:
    stages = re.split(r"^FROM ", joined(CONTAINER), flags=re.MULTILINE)[1:]
    assert len(stages) == 2 and "g++" in stages[0] and "g++" not in stages[1]
    (volume,) = re.findall(r"^VOLUME (\S+)$", stages[1], flags=re.MULTILINE)
    values = served_with(container_command()[2:])
    assert all(str(values[name]).startswith(volume) for name in ("store", "files_dir")), "what is to outlive the container"
    user = re.findall(r"^USER (\S+)$", stages[1], flags=re.MULTILINE)
    assert user and user[-1] not in ("root", "0"), "the last stage runs as somebody without rights"
    assert re.search(r"^HEALTHCHECK .*/health", stages[1], flags=re.MULTILINE)
    for line in re.findall(r"^COPY (?!--from)(.*)$", stages[0], flags=re.MULTILINE):
        *sources, _ = line.split()
        assert [source for source in sources if not (ROOT / source).exists()] == []
    for name in re.findall(r"\bZEN_TURBO_\w+", CONTAINER):
        assert name in (KEY_ENVIRONMENT, CACHE_ENVIRONMENT)


def size_of(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)([kmg]?)", text.lower()).groups()  # type: ignore[union-attr]
    return int(number) * SIZES.get(unit, 1)


def test_nginx_lets_through_what_the_server_takes() -> None:
    limits = [size_of(text) for text in re.findall(r"client_max_body_size (\w+);", NGINX)]
    assert limits[0] == ServerSettings().max_body_bytes and min(limits) == limits[0]
    uploads = re.search(r"location /v1/files \{.*?client_max_body_size (\w+);", NGINX, flags=re.DOTALL)
    assert uploads and size_of(uploads[1]) > DEFAULT_MAX_UPLOAD_BYTES
    assert "proxy_buffering off;" in NGINX and "proxy_ignore_client_abort off;" in NGINX
    assert NGINX.count("{") == NGINX.count("}")
    for line in joined(NGINX).splitlines():
        line = line.split("#")[0].strip()
        assert not line or line[-1] in "{};", f"{line!r} does not end"


def test_the_metrics_that_are_documented_are_those_there_are() -> None:
    families = list(Metrics("m", lambda: EngineStats(store_bytes=0)).registry.collect())
    exported = {family.name.removeprefix(PREFIX) + ("_total" if family.type == "counter" else "") for family in families}
    assert all(family.name.startswith(PREFIX) for family in families)
    table = (DEPLOY / "README.md").read_text().split("## Metrics")[1]
    assert set(re.findall(r"^\| `(\w+)(?:\{\w+\})?` \|", table, flags=re.MULTILINE)) == exported


def functions_of(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_claim_about_security_names_a_test() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", SECURITY)
    assert len(named) >= 25
    assert [(file, name) for file, name in named if name not in functions_of(ROOT / file)] == []
    held = SECURITY.split("## What is held")[1].split("## What is not defended")[0]
    claims = re.split(r"\n(?=- |\| (?!---|what ))", held)[1:]
    assert len(claims) > 15
    for claim in claims:
        if claim.startswith("- With keys neither is checked"):  # a decision, not a promise
            continue
        assert "`tests/" in claim, f"who says so? {claim}"
