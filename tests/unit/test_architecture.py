"""The floors of docs/architecture.md: every room stands on one, and imports from lower ones only."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from ctrl_hpc.config import ROOT

PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = {"ctrl_hpc": ROOT, "ctrl_kernels": ROOT / "kernels"}
MAX_FLOORS = 7
MAX_TOP_MODULES = 9
MAX_LINES = 60


def floors() -> dict[str, int]:
    """Floor by room, as the page's table says."""
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {room: int(floor) for floor, rooms in rows for room in re.findall(r"`(\w+)`", rooms)}


def modules() -> dict[str, Path]:
    """Our modules by dotted name."""
    found = {}
    for package, base in PACKAGES.items():
        for file in (base / package).rglob("*.py"):
            parts = file.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def room(module: str) -> str:
    """The folder, or the module at the top, that a module belongs to; "" for the package's face."""
    package, *inside = module.split(".")
    return package if package == "ctrl_kernels" else inside[0] if inside else ""


@cache
def nodes(file: Path) -> tuple[ast.AST, ...]:
    """All that a file's syntax is made of."""
    return tuple(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))


def imports(file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of ours that a file imports, anywhere in it."""
    for node in nodes(file):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else str(node.module) for name in whole]
        else:
            continue
        yield from (name for name in names if name in known)


def test_every_room_stands_on_a_floor_and_there_are_few() -> None:
    told = floors()
    assert {room(name) for name in modules()} - {""} == set(told)
    assert set(told.values()) == set(range(1, MAX_FLOORS + 1))
    top = [file for file in (ROOT / "ctrl_hpc").glob("*.py") if file.name != "__init__.py"]
    assert len(top) <= MAX_TOP_MODULES


def test_no_import_climbs_or_stays_on_its_floor() -> None:
    told, known = floors(), modules()
    wrong = [
        f"{name} (floor {told[room(name)]}) imports {other} (floor {told[room(other)]})"
        for name, file in known.items()
        for other in imports(file, known)
        if room(name) not in ("", room(other)) and room(other) and told[room(name)] <= told[room(other)]
    ]
    assert wrong == []


def test_no_circle_of_modules() -> None:
    known = modules()
    beneath = {name: set(imports(file, known)) - {name} for name, file in known.items()}
    finished: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " imports ".join((*path[path.index(name) :], name))
        if name not in finished:
            for other in sorted(beneath[name]):
                visit(other, (*path, name))
            finished.add(name)

    for name in sorted(known):
        visit(name, ())


def test_the_command_line_and_the_method_import_no_torch() -> None:
    code = "import sys, ctrl_hpc.cli, ctrl_hpc.config, ctrl_hpc.flow.steps; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_function_of_ours_is_longer_than_60_lines() -> None:
    long = [
        f"{file.name}: {node.name}"
        for file in (ROOT / "ctrl_hpc").rglob("*.py")
        for node in nodes(file)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno >= MAX_LINES
    ]
    assert long == []
