"""The documentation says what is true: generated pages are up to date, commands exist, links and paths lead somewhere."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType

import click
import pytest
import typer

from zen_turbo.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*(ROOT / name for name in ("README.md", "CHANGELOG.md", "SECURITY.md", "deploy/README.md")), *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = ("README.md", "docs/cli.md", "docs/configuration.md", "docs/errors.md", "docs/results.md", "docs/rooms.md")


def generator() -> ModuleType:
    specification = importlib.util.spec_from_file_location("generate_docs", ROOT / "scripts" / "generate_docs.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return generator().pages()


@pytest.mark.parametrize("name", GENERATED)
def test_generated_pages_are_up_to_date(name: str, pages: dict[str, str]) -> None:
    assert pages[name] == (ROOT / name).read_text(), "run scripts/generate_docs.py"


def test_every_generated_page_is_checked(pages: dict[str, str]) -> None:
    assert set(pages) == set(GENERATED)


def fenced_commands(text: str) -> list[str]:
    """Lines of fenced blocks that start with zen-turbo or one of our scripts; a pipe ends a command."""
    lines = []
    for block in re.findall(r"^```\w*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip().removeprefix("$ ").removeprefix(".venv/bin/")
            if line.startswith(("zen-turbo ", "./scripts/", "python scripts/")):
                lines.append(line.split(" | ")[0].split(" > ")[0])
    return lines


COMMANDS = [
    pytest.param(line, id=f"{page.name}: {line[:60]}") for page in PAGES if page.name != "cli.md" for line in fenced_commands(page.read_text())
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_of_the_documentation_exist(line: str) -> None:
    words = shlex.split(line, comments=True)
    if words[0] != "zen-turbo":
        script = words[1] if words[0] == "python" else words[0]
        assert (ROOT / script).exists()
        return
    words = words[1:]
    while words and words[0] in ("--debug", "--version"):
        words.pop(0)
    command: click.Command = typer.main.get_command(app)
    context = None
    while hasattr(command, "commands"):
        assert words[0] in command.commands, f"no command {words[0]}"
        command = command.commands[words.pop(0)]
    context = command.make_context("zen-turbo", words, resilient_parsing=False)  # raises for an option or a value that does not exist
    context.close()


def test_the_readme_has_commands() -> None:
    assert len(fenced_commands((ROOT / "README.md").read_text())) >= 4


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def result_files() -> list[Path]:
    return sorted((ROOT / "results").glob("*.json"))


@pytest.mark.parametrize("path", result_files(), ids=lambda path: path.name)
def test_results_are_records(path: Path) -> None:
    (line,) = path.read_text().splitlines()
    record = json.loads(line)
    assert {"bench", "eval", "compare"} & set(record)
    assert record["rows"] and record["settings"] and record["machine"]["cpu"]
    assert re.fullmatch(r"[0-9a-f]{40}", record["git"]["commit"])
    assert record["git"]["dirty"] is False


def test_there_are_results() -> None:
    assert result_files()
