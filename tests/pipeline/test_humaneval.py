"""HumanEval by the command a user types, through real services: canonical solutions, and a model that knows nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import random_qwen
from process_table import processes_of

from ctrl_hpc import cli
from ctrl_hpc.config import ROOT

CONFIG = str(ROOT / "configs" / "humaneval.yaml")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_canonical_solutions_pass(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert cli.main(["run", CONFIG, "generator=oracle", f"run_dir={folder}", "wandb.mode=disabled"]) == 0
    entry = json.loads((folder / "report" / "results.json").read_text())["datasets"]["humaneval"]
    assert entry["n_problems"] == 164
    for critic in ("none", "exec_feedback"):
        assert entry["critics"][critic]["pass_at_1"] == [1.0, 1.0]
    assert entry["critics"]["exec_feedback"]["judgement"]["accuracy"] == 1.0
    assert processes_of(folder) == []


def test_a_random_model_is_served_and_fails(tmp_path: Path) -> None:
    model = random_qwen.build(tmp_path / "model", positions=4096)
    folder = tmp_path / "run"
    settings = [f"generator={model}", f"critic.model={model}", "eval.critics=[none,base,exec_feedback]"]
    settings += ["data.n_eval=40", "eval.max_tokens=16", "eval.greedy=false"]
    settings += [f"run_dir={folder}", "wandb.mode=disabled"]
    assert cli.main(["run", CONFIG, *settings]) == 0
    entry = json.loads((folder / "report" / "results.json").read_text())["datasets"]["humaneval"]
    assert entry["critics"]["base"]["pass_at_1"] == [0.0, 0.0]
    assert entry["critics"]["base"]["judgements"] == {"correct": 0, "incorrect": 0, "none": 40}
    assert entry["critics"]["base"]["critique_tokens"] > 0
    assert entry["critics"]["exec_feedback"]["judgement"]["accuracy"] == 1.0
    assert processes_of(folder) == []
