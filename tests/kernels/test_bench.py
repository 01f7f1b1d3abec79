"""The benchmark runs from end to end without a GPU, and judges goals by the numbers it has."""

import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

BENCH = Path(__file__).parents[2] / "kernels" / "bench"


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """Its modules, as the program sees them."""
    monkeypatch.syspath_prepend(str(BENCH))
    names = ("measure", "cases", "goals", "report")
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_smoke_run(tmp_path: Path) -> None:
    """Every row, tiny; also which peers took part or were named as skipped."""
    command = [sys.executable, str(BENCH / "run.py"), "--smoke", "--out", str(tmp_path)]
    finished = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=400, check=False)
    assert finished.returncode == 0, finished.stderr[-4000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["left_out"] == []
    rows = results["rows"]
    assert {row["family"] for row in rows} == {
        "logits", "linear", "one pass", "group advantages", "gae", "policy loss"
    }  # fmt: skip
    assert all(row["total_ms"] > 0 for row in rows if "failed" not in row)
    assert all("failed" not in row for row in rows if row["ours"])
    took_part = {row["contender"] for row in rows} | {name.split(" [")[0] for name in results["skipped"]}
    assert took_part >= {
        "ctrl", "torch eager", "torch.compile", "torch linear_cross_entropy", "Megatron-core fused cross entropy",
        "Liger vocabulary-parallel CE", "Liger fused linear CE", "cut-cross-entropy, exact", "TRL", "verl",
    }  # fmt: skip
    checked = [row for row in results["accuracy"] if row["ours"]]
    assert len(checked) == 6 and all(row["passed"] and row["values"] < 1 for row in checked)
    report = (tmp_path / "results.md").read_text()
    assert "| one pass N=8 V=320 D=16 shards=2 | ctrl |" in report and "not measured" in report
    assert (tmp_path / "results.png").stat().st_size > 10_000


@pytest.mark.slow
def test_wrong_arguments() -> None:
    for arguments in (["--smoke"], ["--only", "softmax"]):
        finished = subprocess.run([sys.executable, str(BENCH / "run.py"), *arguments], capture_output=True, check=False)
        assert finished.returncode == 2


def row(contender: str, family: str, **values: Any) -> dict[str, Any]:
    shape = {"rows": 8192, "columns": 152_064, "width": 3584, "shards": 1}
    return {"contender": contender, "family": family, "ours": contender.startswith("ctrl"), **shape, **values}


def test_goals_are_judged_by_hand_worked_numbers(bench: dict[str, ModuleType]) -> None:
    limits = bench["measure"].Limits(copy_tb_per_s=4.0, matmul_tflop_per_s=750.0)
    floor_ms = 6 * 8192 * 152_064 * 3584 / 750e12 * 1e3
    gradients_and_accumulators_mb = 6 * (8192 + 152_064) * 3584 / 2**20
    rows = [
        row("ctrl", "logits", forward_ms=1.0, backward_ms=2.0, forward_limit=0.9, backward_limit=0.7),
        row("Liger vocabulary-parallel CE", "logits", forward_ms=4.0, backward_ms=8.0),
        row("torch eager", "logits", failed="out of memory"),
        row("ctrl", "one pass", total_ms=1.1 * floor_ms, peak_mb=gradients_and_accumulators_mb + 500),
        row("torch eager", "one pass", total_ms=1.32 * floor_ms),
    ]
    judged = {item["goal"]: (item["found"], item["met"]) for item in bench["goals"].judge(rows, limits)}
    assert judged["logits forward, part of copy bandwidth"] == (0.9, True)
    assert judged["logits backward, part of copy bandwidth"] == (0.7, False)
    assert judged["logits, times as fast as Liger's vocabulary-parallel CE"] == (4.0, True)
    assert judged["logits forward, times as fast as eager"] == (None, None)
    assert judged["one pass, times the time of its operations at the matrix limit"] == (pytest.approx(1.1), True)
    assert judged["one pass, MiB beyond gradients and accumulators"] == (pytest.approx(500), True)
    assert judged["one pass, times as fast as eager"] == (pytest.approx(1.2), False)
    assert judged["gae, part of copy bandwidth"] == (None, None)


def test_parity_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss written out by hand agrees with ours; with another clipping its gradient is told apart."""
    monkeypatch.syspath_prepend(str(BENCH))
    parity = importlib.import_module("parity")

    def ppo(x: dict[str, torch.Tensor]) -> torch.Tensor:
        ratio = (x["logprobs"] - x["old_logprobs"]).exp()
        terms = torch.maximum(-x["advantages"] * ratio, -x["advantages"] * ratio.clamp(0.8, 1.28))
        return parity.mean(terms, x["mask"])

    agreed = parity.compare(ppo, {"clip_low": 0.2, "clip_high": 0.28}, "torch")
    assert max(agreed) < parity.AGREEMENT
    assert parity.compare(ppo, {"clip_low": 0.2, "clip_high": 0.2}, "torch")[1] > 0.1
    source = parity.from_sources({BENCH / "roofline.py": ("_waves",)}, math=math, TILE=(128, 256), PROCESSORS=132)
    assert source._waves(8192, 8192) == 16
    with pytest.raises(ValueError, match="does not define all of"):
        parity.from_sources({BENCH / "roofline.py": ("absent",)})
