"""A run's offline wandb files, sent to a loopback server by the real `wandb sync`; and what array elements log."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import wandb_server
from wandb_server import Store

from ctrl_hpc.cli import main
from ctrl_hpc.cluster import service_log, sync
from ctrl_hpc.config import ROOT, Config, load
from ctrl_hpc.tracking import Tracker


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    with wandb_server.running() as (store, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield store


@pytest.fixture
def config(run_dir: Path) -> Config:
    return load(ROOT / "configs" / "tiny_faults.yaml", [f"run_dir={run_dir}", "wandb.group=experiment 7"])


def log(config: Config, run_dir: Path, id: str, steps: range, role: str = "executor") -> None:
    with Tracker(config, run_dir, role, id) as tracker:
        for step in steps:
            tracker.log({"executor/runs_per_s": step / 2}, step)


@pytest.mark.slow
def test_pieces_of_a_requeued_job_become_one_run_in_order(
    server: Store, config: Config, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log(config, run_dir, "ab12-executor-0", range(3))
    log(config, run_dir, "ab12-executor-0", range(3, 5))  # the job was requeued
    (run_dir / "report").mkdir()
    (run_dir / "report" / "plot.png").write_bytes(b"png")
    with Tracker(config, run_dir, "report", "ab12-report") as tracker:
        tracker.log({"eval/pass_at_1": 0.5}, 0)
        tracker.artifact(run_dir / "report", "report", "tiny-report")
    assert main(["sync", str(run_dir)]) == 0
    said = capsys.readouterr().out
    assert "ab12-executor-0: sending 2 of 2 pieces" in said and "3 pieces sent" in said
    run = server.runs["ab12-executor-0"]
    assert (run["group"], run["type"], run["config"]["rl"]["steps"]) == ("experiment 7", "executor", 8)
    numbers = [(row["step"], row["executor/runs_per_s"]) for row in run["rows"] if "executor/runs_per_s" in row]
    assert numbers == [(0, 0.0), (1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    assert ("report", "tiny-report") in server.artifacts and server.files["plot.png"] == b"png"
    assert server.runs["ab12-report"]["summary"]["eval/pass_at_1"] == 0.5

    assert main(["sync", str(run_dir)]) == 0  # nothing is sent twice
    assert "ab12-executor-0: sent before" in capsys.readouterr().out
    log(config, run_dir, "ab12-executor-0", range(5, 6))  # it went on after the sync
    assert main(["sync", str(run_dir)]) == 0
    assert "ab12-executor-0: sending 1 of 3 pieces" in capsys.readouterr().out
    numbers = [row["step"] for row in run["rows"] if "executor/runs_per_s" in row]
    assert numbers == [0, 1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_server_that_is_not_there_is_one_line(
    config: Config, run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log(config, run_dir, "ab12-rl", range(1))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", "/dev/null")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert main(["sync", str(run_dir)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ctrl-hpc: ab12-rl: not sent: ")


def test_a_run_without_wandb_files_is_refused(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sync", str(run_dir)]) == 2
    assert "no offline wandb runs there" in capsys.readouterr().err


def test_pieces_are_ordered_by_their_start(run_dir: Path) -> None:
    for started in ("20260102_000000", "20260101_235959"):
        folder = run_dir / "wandb" / f"offline-run-{started}-x-1"
        folder.mkdir(parents=True)
        (folder / "run-x-1.wandb").touch()
    (found,) = sync.pieces(run_dir).values()
    assert [piece.started for piece in found] == ["20260101_235959", "20260102_000000"]


def test_counters_become_rates_and_gauges_stay() -> None:
    before = service_log.read("# HELP x y\nexecutor_runs_total 10.0\nexecutor_queue_length 7.0\n")
    after = service_log.read('executor_runs_total 40.0\nexecutor_queue_length 3.0\nexecutor_verdicts{a="b"} 1.0\n')
    assert service_log.rates(before, after, 10.0) == {"executor/runs_per_s": 3.0, "executor/queue": 3.0}
    served = service_log.read("ctrl_rollout_completion_tokens_total 600\nctrl_rollout_waiting 2\n")
    assert service_log.rates({}, served, 2.0) == {"rollout/tokens_per_s": 300.0, "rollout/queue": 2.0}


def test_an_elements_id_is_the_runs_and_its_own(run_dir: Path) -> None:
    (run_dir / "services").mkdir()
    first = service_log.wandb_id(run_dir, "executor", 0)
    assert first == service_log.wandb_id(run_dir, "executor", 0)
    assert first.removesuffix("executor-0") == service_log.wandb_id(run_dir, "critic", 2).removesuffix("critic-2")
    shutil.rmtree(run_dir / "services")
    (run_dir / "services").mkdir()
    assert service_log.wandb_id(run_dir, "executor", 0) != first
    assert os.listdir(run_dir / "services") == ["wandb_id"]
