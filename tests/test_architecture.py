"""The rooms and who may enter whose: import rules read from the syntax trees, so that nothing needs to be imported to be checked."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import zen_turbo

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "zen_turbo"
FILES = sorted(PACKAGE.rglob("*.py"))

# Room -> the rooms it may import: server, llm, cli -> engine -> models, kv -> attention -> kernels -> native. "zen_turbo" is the public face.
_GROUND = {"errors", "config"}
_COMPUTE = {*_GROUND, "native", "kernels", "attention"}
_ENGINE = {*_COMPUTE, "text", "kv", "models", "engine"}
MAY_IMPORT = {
    "zen_turbo": {"cli"},  # for python -m; the package itself imports lazily
    "errors": set(),
    "config": {"errors"},
    "native": _GROUND,
    "kernels": {*_GROUND, "native"},
    "attention": {*_GROUND, "kernels"},
    "text": _GROUND,
    "kv": _COMPUTE,
    "models": {*_COMPUTE, "text"},
    "engine": _ENGINE - {"engine"},
    "llm": _ENGINE,
    "progress": {"engine"},
    "server": {*_ENGINE, "llm", "zen_turbo"},
    "bench": {*_ENGINE, "llm", "progress", "zen_turbo"},
    "evals": {*_ENGINE, "llm", "bench", "progress", "zen_turbo"},
    "cli": {*_ENGINE, "llm", "server", "bench", "evals", "progress", "zen_turbo"},
}

# What a pure function of tensors can need. Names, not "no I/O modules": whatever is new has to be thought about.
PURE_MODULES = {"__future__", "collections", "dataclasses", "enum", "functools", "itertools", "math", "torch", "typing"}
IO_CALLS = {"open", "print", "input", "exec", "eval", "__import__", "breakpoint"}


class Import(NamedTuple):
    module: str
    line: int


def imports_at_run_time(source: str) -> Iterator[Import]:
    """Every module that the source imports, in functions too, but for what only type checkers see. Names are absolute."""
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            pending += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (Import(name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: import by absolute name"
            if node.module == "zen_turbo":  # its names are rooms, but for those of the package itself (__version__)
                names = ("zen_turbo" if name.name.startswith("__") else f"zen_turbo.{name.name}" for name in node.names)
                yield from (Import(name, node.lineno) for name in names)
            else:
                yield Import(node.module or "", node.lineno)
        pending += ast.iter_child_nodes(node)


def room_of_module(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def room_of_file(path: Path) -> str:
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "zen_turbo" if first in ("__init__", "__main__") else first


def broken_imports(source: str, room: str) -> list[str]:
    assert room in MAY_IMPORT, f"room {room!r} is new: decide in MAY_IMPORT what it may import"
    allowed = MAY_IMPORT[room] | {room}
    return [
        f"line {line}: {room} must not import {module}"
        for module, line in imports_at_run_time(source)
        if module.split(".")[0] == "zen_turbo" and room_of_module(module) not in allowed
    ]


def impurities(source: str) -> list[str]:
    found = [
        f"line {line}: {module}"
        for module, line in imports_at_run_time(source)
        if module.split(".")[0] not in PURE_MODULES and room_of_module(module) not in {*_GROUND, "attention"}
    ]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in {*IO_CALLS, "torch.load", "torch.save"}:
            found.append(f"line {node.lineno}: {ast.unparse(node.func)}()")
    return found


def names_kernels(source: str) -> bool:
    return re.search(r"libzen_turbo_kernels|\bzt_\w+", source) is not None


def calls_native_code(source: str) -> bool:
    return any(module.split(".")[0] in ("ctypes", "cffi", "_ctypes") for module, _ in imports_at_run_time(source))


def of_package(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", FILES, ids=of_package)
def test_rooms_import_downwards_only(path: Path) -> None:
    assert broken_imports(path.read_text(), room_of_file(path)) == []


@pytest.mark.parametrize("path", sorted((PACKAGE / "attention" / "policies").rglob("*.py")), ids=of_package)
def test_policies_do_no_input_or_output(path: Path) -> None:
    assert impurities(path.read_text()) == []


def test_reference_imports_only_torch() -> None:
    roots = {module.split(".")[0] for module, _ in imports_at_run_time((PACKAGE / "attention" / "reference.py").read_text())}
    assert roots - set(sys.stdlib_module_names) == {"torch"}


def test_few_files_call_native_code() -> None:
    assert [of_package(path) for path in FILES if calls_native_code(path.read_text())] == ["engine/memory.py", "kv/mapping.py", "native.py"]
    named = [of_package(path) for path in FILES if names_kernels(path.read_text())]
    assert named == ["kernels/attention.py", "kernels/layers.py", "kernels/tokens.py", "native.py"]


@pytest.mark.parametrize(
    ("source", "room"),
    [
        ("from zen_turbo.models.config import RopeConfig", "attention"),
        ("from zen_turbo import engine", "models"),
        ("import zen_turbo.config", "errors"),
        ("import zen_turbo", "kernels"),
        ("def later():\n    from zen_turbo.engine.engine import Engine", "kv"),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    from zen_turbo import llm", "engine"),
    ],
)
def test_a_broken_rule_is_seen(source: str, room: str) -> None:
    assert len(broken_imports(source, room)) == 1


def test_what_only_type_checkers_see_breaks_no_rule() -> None:
    assert broken_imports("if TYPE_CHECKING:\n    from zen_turbo.models.config import RopeConfig", "attention") == []


@pytest.mark.parametrize("source", ["import os", "from pathlib import Path", "open('x')", "torch.save(x, 'y')", "import zen_turbo.kernels"])
def test_an_impurity_is_seen(source: str) -> None:
    assert len(impurities(source)) == 1


@pytest.mark.parametrize("source", ["import ctypes", "from ctypes import util", "library.zt_attend(0)"])
def test_a_touch_of_the_native_library_is_seen(source: str) -> None:
    assert calls_native_code(source) or names_kernels(source)


def test_public_names_are_those_promised() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = {
        name.name
        for block in tree.body
        if isinstance(block, ast.If)
        for node in ast.walk(block)
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    assert typed | {"__version__"} == set(zen_turbo.__all__)
    assert dir(zen_turbo) == sorted(zen_turbo.__all__)
    for name in typed:
        value = getattr(zen_turbo, name)
        assert value.__name__ == name
        assert value is getattr(importlib.import_module(value.__module__), name)
    with pytest.raises(AttributeError, match="Engine"):
        _ = zen_turbo.Engine


def test_importing_the_package_is_cheap() -> None:
    heavy = subprocess.run(
        [sys.executable, "-c", "import sys, zen_turbo; print(*sorted({'torch', 'numpy', 'fastapi'} & set(sys.modules)))"],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT / "src",
    )
    assert heavy.stdout.strip() == ""


def test_every_path_of_the_request_walk_exists() -> None:
    walk = ROOT / "docs" / "walk.md"
    if not walk.exists():
        pytest.skip("docs/walk.md is not written yet")
    paths = re.findall(r"`([\w./-]+\.(?:py|cpp|h|inl|md))`", walk.read_text())
    assert len(paths) >= 5, "a walk without files: are they in backquotes?"
    missing = [path for path in paths if not (ROOT / path).exists() and not (PACKAGE / path).exists()]
    assert missing == []
