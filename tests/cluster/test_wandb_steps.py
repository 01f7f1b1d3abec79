"""Every step of training is once in wandb, whatever was killed: the trainer, wandb's process, or both."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from wandb_process import kill_wandb
from wandb_server import Store

from ctrl_hpc.config import ROOT, Config, load
from ctrl_hpc.tracking import wandb_file
from ctrl_hpc.tracking.tracker import Tracker, run_id
from ctrl_hpc.train.journal import Journal


def config(run_dir: Path, mode: str) -> Config:
    return load(ROOT / "configs" / "tiny_faults.yaml", [f"run_dir={run_dir}", f"wandb.mode={mode}"])


def train(run_dir: Path, mode: str, start: int, stop: int) -> None:
    """Steps as a trainer logs them, which begins at ``start``."""
    with Journal(config(run_dir, mode), run_dir, "rl", steps=9, start=start, main=True) as journal:
        for step in range(start, stop):
            journal.log(step, {"rl/reward": step / 8})


def on_disk(run_dir: Path) -> list[int | None]:
    """The steps in the record files, in the order in which a sync sends them."""
    return [step for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")) for step in wandb_file.rows(file)]


@pytest.mark.slow
def test_a_trainer_that_goes_on_from_a_checkpoint_logs_no_step_again(run_dir: Path) -> None:
    train(run_dir, "offline", 0, 5)
    train(run_dir, "offline", 3, 7)  # the checkpoint was of step 3
    assert on_disk(run_dir) == [0, 1, 2, 3, 4, 5, 6]
    metrics = (run_dir / "rl" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_stage_that_is_begun_anew_is_logged_anew(run_dir: Path) -> None:
    train(run_dir, "offline", 0, 3)
    (run_dir / "rl" / "metrics.jsonl").unlink()
    train(run_dir, "offline", 0, 3)
    assert on_disk(run_dir) == [0, 1, 2] * 2


@pytest.mark.slow
def test_steps_that_were_lost_with_a_node_are_logged_by_the_next_start(run_dir: Path) -> None:
    code = f"""
import os, signal, sys
sys.path[:] = {sys.path!r}
import test_wandb_steps as steps
from pathlib import Path
run_dir = Path({str(run_dir)!r})
journal = steps.Journal(steps.config(run_dir, "offline"), run_dir, "rl", steps=9, start=0, main=True)
for step in range(5):
    journal.log(step, {{"rl/reward": step / 8}})
steps.kill_wandb()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -signal.SIGKILL
    assert on_disk(run_dir) == []  # none had reached the disk
    train(run_dir, "offline", 3, 7)
    assert on_disk(run_dir) == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_nothing_is_logged_again_where_files_that_were_sent_are_gone(run_dir: Path) -> None:
    train(run_dir, "offline", 0, 3)
    (sent,) = run_dir.glob("wandb/offline-run-*")
    sent.rename(run_dir / "elsewhere")
    train(run_dir, "offline", 3, 5)
    train(run_dir, "offline", 5, 6)
    assert on_disk(run_dir) == [3, 4, 5]


@pytest.mark.slow
def test_online_a_trainer_goes_on_with_what_the_server_lacks(server: Store, run_dir: Path) -> None:
    train(run_dir, "online", 0, 5)
    rows = server.runs[run_id(run_dir, "rl")]["rows"]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    del rows[2:]  # as if it had been killed before it sent the others
    server.runs[run_id(run_dir, "rl")]["summary"] = {"step": 1, "_step": 1}
    train(run_dir, "online", 4, 7)
    assert [(row["step"], row["_step"], row["rl/reward"]) for row in rows] == [(i, i, i / 8) for i in range(7)]


@pytest.mark.slow
def test_online_what_a_killed_wandb_had_not_sent_is_sent(
    server: Store, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Tracker(config(run_dir, "online"), run_dir, "executor", 0) as tracker:
        for step in range(60):
            if step in (1, 20, 41):
                kill_wandb()
            tracker.log({"executor/runs_per_s": step / 2}, step)
        kill_wandb()
    assert capsys.readouterr().out.count("starting another one") >= 2
    rows = server.runs[run_id(run_dir, "executor", 0)]["rows"]
    assert [row["step"] for row in rows if "executor/runs_per_s" in row] == list(range(60))
    assert os.listdir(run_dir / "wandb")
