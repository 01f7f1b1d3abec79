"""Every shipped configuration compiles ahead of time, in a process without the interpreter, and spills nothing."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import ctrl_kernels
import pytest
import torch
import triton

ROOT = Path(__file__).parents[2]
COMPILE = ROOT / "kernels" / "bench" / "compile.py"
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
INSTRUCTIONS = {
    "statistics *bf16 tile 1x2048": 11.2,
    "statistics *fp32 tile 1x2048": 12.7,
    "statistics *fp32 weights *bf16 tile 1x2048": 14.5,
    "logits gradient *bf16 to *bf16": 20.3,
    "logits gradient *bf16 to *bf16 entropy": 24.1,
    "weights gradient *bf16": 18.5,
    "weights gradient *bf16 entropy": 58.0,
    "policy token": 38.0,
    "policy benchmark": 66.0,
    "gae": 71.0,
}
"""Machine instructions an element on sm_90 that no change may exceed, as triton 3.9 compiles them."""
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
        assert (row["stack_bytes"], row["spilled"]) == (0, 0) or row["target"] not in ("sm_90", "sm_100"), row
        assert row["shared_bytes"] <= 48 << 10, row  # what a program may have without asking


def test_inner_loops_stay_as_short_as_they_are(compiled: tuple[list[dict[str, Any]], str]) -> None:
    found = {row["name"]: row for row in compiled[0] if row["target"] == "sm_90"}
    if not triton.__version__.startswith("3.9."):
        pytest.skip(f"counted with triton 3.9, this is {triton.__version__}")
    for name, most in INSTRUCTIONS.items():
        assert 5 < found[name]["instructions"] <= most, found[name]
        assert found[name]["load_bits"] == 128, found[name]


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


def test_check_finds_the_kernels_right() -> None:
    """``python -m ctrl_kernels.check``: exit code 0, every function named; without a GPU or the interpreter, 2."""
    command = [sys.executable, "-m", "ctrl_kernels.check"]
    run = {"capture_output": True, "text": True, "timeout": 400, "check": False}
    finished = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, **run)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for name in ctrl_kernels.__all__:
        if name.endswith(("loss", "logprobs", "advantages", "gae")):
            assert f"  {name}" in finished.stdout
    assert "WRONG" not in finished.stdout and "all right" in finished.stdout
    if not torch.cuda.is_available():
        outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        assert subprocess.run(command, env=outside, **run).returncode == 2
