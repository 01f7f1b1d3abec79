"""Every shipped configuration compiles ahead of time, in a process without the interpreter, and spills nothing."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import ctrl_kernels
import pytest
import torch
import triton

ROOT = Path(__file__).parents[2]
COMPILE = ROOT / "kernels" / "bench" / "compile.py"
TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]
CEILINGS = ROOT / "kernels" / "bench" / "sass.json"
"""Registers, and machine instructions an element, that no change may exceed, as triton 3.9 compiles them."""
PEERS = ("TRL", "Liger", "CCE", "verl")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]


def compile_all(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(COMPILE), *arguments]
    return subprocess.run(command, env=outside | environment, capture_output=True, text=True, timeout=900, check=False)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """The rows of the table, and what was printed."""
    folder = tmp_path_factory.mktemp("compile")
    finished = compile_all("--peers", "--json", str(folder / "table.json"), TRITON_CACHE_DIR=str(folder / "cache"))
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
    for row in (row for row in compiled[0] if not row["name"].startswith(PEERS)):
        assert (row["stack_bytes"], row["spilled"]) == (0, 0) or row["target"] not in ("sm_90", "sm_100"), row
        assert row["shared_bytes"] <= 48 << 10, row  # what a program may have without asking


def test_nothing_grows(compiled: tuple[list[dict[str, Any]], str]) -> None:
    """Neither the registers nor the inner loops of a kernel; accesses stay as wide as they are."""
    if not triton.__version__.startswith("3.9."):
        pytest.skip(f"counted with triton 3.9, this is {triton.__version__}")
    found = {(row["name"], row["target"]): row for row in compiled[0] if not row["name"].startswith(PEERS)}
    known = json.loads(CEILINGS.read_text())
    ours = [row for row in known if not row["name"].startswith(PEERS)]
    assert {(row["name"], row["target"]) for row in ours} == {key for key in found if key[1] in ("sm_90", "sm_100")}
    for row in ours:
        now = found[row["name"], row["target"]]
        assert now["registers"] <= row["registers"], now
        assert (now["load_bits"], now["store_bits"]) == (row["load_bits"], row["store_bits"]), now
        assert now["instructions"] is None or 5 < now["instructions"] <= row["instructions"], now


def test_the_peers_rows_are_what_their_kernels_compile_to(compiled: tuple[list[dict[str, Any]], str]) -> None:
    """Of TRL's, which the tests need anyway; the table was made with 1.16."""
    if not (triton.__version__.startswith("3.9.") and metadata.version("trl").startswith("1.16.")):
        pytest.skip(f"counted with triton 3.9 and TRL 1.16, these are {triton.__version__}, {metadata.version('trl')}")
    known = {(row["name"], row["target"]): row for row in json.loads(CEILINGS.read_text())}
    theirs = [row for row in compiled[0] if row["name"].startswith("TRL") and row["target"] in ("sm_90", "sm_100")]
    assert len(theirs) == 8
    assert all(row == known[row["name"], row["target"]] for row in theirs)


def test_inner_loops_are_shorter_than_the_peers() -> None:
    rows = {(row["name"], row["target"]): row["instructions"] for row in json.loads(CEILINGS.read_text())}
    for target in ("sm_90", "sm_100"):
        assert rows["statistics *bf16 tile 1x2048", target] < 0.6 * rows["TRL logits", target]
        assert rows["logits gradient *bf16 to *bf16 entropy", target] < rows["TRL logits backward", target]
        assert {name for name, of in rows if of == target and name.startswith(("CCE", "verl"))} == {
            "CCE forward", "CCE backward", "verl forward", "verl backward, logits' gradient"
        }  # fmt: skip


def test_no_kernel_is_left_out(compiled: tuple[list[dict[str, Any]], str]) -> None:
    """A kernel of the package that is missing in ``configurations`` would never be compiled."""
    package = ROOT / "kernels" / "ctrl_kernels"
    launched = {name for file in package.glob("*.py") for name in re.findall(r"(\w+_kernel)\[", file.read_text())}
    listed = set(re.findall(r"kernel=\w+\.(\w+_kernel)", COMPILE.read_text()))
    assert launched == listed and len(launched) >= 9


def test_interpreted_kernels_are_refused() -> None:
    finished = compile_all(TRITON_INTERPRET="1")
    assert finished.returncode == 2
    assert "TRITON_INTERPRET" in finished.stderr


def test_check_finds_the_kernels_right() -> None:
    """``python -m ctrl_kernels.check``: exit code 0, every function named; without a GPU it interprets, and says so."""
    outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "ctrl_kernels.check"]
    finished = subprocess.run(command, env=outside, capture_output=True, text=True, timeout=900, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    for name in ctrl_kernels.__all__:
        if name.endswith(("loss", "logprobs", "advantages", "gae")):
            assert f"  {name}" in finished.stdout
    assert "WRONG" not in finished.stdout and "all right" in finished.stdout
    assert ("not that they compile" in finished.stdout) != torch.cuda.is_available()
