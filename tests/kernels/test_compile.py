"""Every shipped configuration compiles ahead of time, in a process without the interpreter, and spills nothing."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
COMPILE = ROOT / "kernels" / "bench" / "compile.py"
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
pytestmark = pytest.mark.slow


def compile_all(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(COMPILE), *arguments]
    return subprocess.run(command, env=outside | environment, capture_output=True, text=True, timeout=400, check=False)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """The rows of the table, and what was printed."""
    folder = tmp_path_factory.mktemp("compile")
    finished = compile_all("--json", str(folder / "table.json"), TRITON_CACHE_DIR=str(folder / "cache"))
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    return json.loads((folder / "table.json").read_text()), finished.stdout


def test_every_kernel_compiles_for_every_target(compiled: tuple[list[dict[str, Any]], str]) -> None:
    rows, printed = compiled
    names = {row["name"] for row in rows}
    assert {(row["name"], row["target"]) for row in rows} == {(name, target) for name in names for target in TARGETS}
    for row in rows:
        assert 0 < row["registers"] <= 255
        assert row["name"] in printed
        assert row["target"] in printed


def test_nothing_spills(compiled: tuple[list[dict[str, Any]], str]) -> None:
    for row in compiled[0]:
        assert (row["stack_bytes"], row["spilled"]) == (0, 0) or row["target"] != "sm_90", row
        assert row["shared_bytes"] <= 48 << 10, row  # what a program may have without asking


def test_no_kernel_is_left_out(compiled: tuple[list[dict[str, Any]], str]) -> None:
    """A kernel of the package that is missing in ``configurations`` would never be compiled."""
    package = ROOT / "kernels" / "ctrl_kernels"
    launched = {name for file in package.glob("*.py") for name in re.findall(r"(_\w+_kernel)\[", file.read_text())}
    listed = set(re.findall(r"kernel=\w+\.(_\w+_kernel)", COMPILE.read_text()))
    assert launched == listed and len(launched) >= 9


def test_interpreted_kernels_are_refused() -> None:
    finished = compile_all(TRITON_INTERPRET="1")
    assert finished.returncode == 2
    assert "TRITON_INTERPRET" in finished.stderr
