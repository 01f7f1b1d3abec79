"""Sweeps: local grid and random searches; the real `wandb sweep` and `wandb agent` against a loopback server."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from one_host_slurm import SlurmCluster
from wandb_server import Store

from ctrl_hpc.cli import main
from ctrl_hpc.config import ROOT, load, value
from ctrl_hpc.experiments import suite, sweep

BIN = Path(sys.executable).parent
FILES = sorted((ROOT / "configs" / "sweep").glob("*.yaml"))
# no model, no training: the canonical solutions as drafts, executed
CHEAP = (
    *("stages=[eval,report]", "generator=oracle", "eval.critics=[none,exec_feedback]", "eval.turns=1"),
    *("data.n_eval=4", "eval.greedy=false", "wandb.services=false", "wandb.checkpoints=none"),
)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_shipped_sweeps_are_valid_for_wandb_and_for_us(file: Path) -> None:
    data = yaml.safe_load(file.read_text())
    assert data["metric"] == {"name": "eval/pass_at_1", "goal": "maximize"}
    assert data["command"][-1] == "${args_no_hyphens}"
    read = sweep.read(file)
    for trial in sweep.trials(read, 6, seed=1):
        config = load(ROOT / read.config, [*read.overrides, *(f"{name}={item}" for name, item in trial.items())])
        for name, item in trial.items():
            assert value(config, name) == item


def test_a_grid_is_every_combination_and_a_random_search_repeats_with_its_seed() -> None:
    grid = sweep.read(ROOT / "configs" / "sweep" / "learning_rate.yaml")
    rates, sizes = (0.0001, 0.0003, 0.001), (4, 8)
    expected = [{"rl.optimizer.lr": rate, "rl.group_size": size} for rate in rates for size in sizes]
    assert list(sweep.trials(grid, None, 0)) == expected
    assert list(sweep.trials(grid, 2, 0)) == expected[:2]
    search = sweep.read(ROOT / "configs" / "sweep" / "policy_loss.yaml")
    first = list(sweep.trials(search, 20, seed=3))
    assert list(sweep.trials(search, 20, seed=3)) == first != list(sweep.trials(search, 20, seed=4))
    assert all(0.0001 <= trial["rl.optimizer.lr"] <= 0.001 and 0.2 <= trial["rl.clip_high"] <= 0.3 for trial in first)
    assert {trial["seed"] for trial in first} == {0, 1, 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "bayes"}, "method: 'bayes' is not allowed with --local; allowed: grid, random"),
        ({"metric": {"name": "loss"}}, "metric.name: 'loss' is not allowed; it is eval/pass_at_1"),
        ({"command": ["python", "train.py"]}, "command: expected [ctrl-hpc, trial, CONFIG.yaml"),
        ({"parameters": {"rl.steps": {"min": 1, "max": 2}}}, "parameters.rl.steps: a grid needs value or values"),
        ({"parameters": {"rl.stepps": {"value": 1}}}, "rl.stepps: unknown key (did you mean steps?)"),
        ({"metric": "loss"}, "metric.name: 'loss' is not allowed; it is eval/pass_at_1"),
        ({"metric": {"name": "eval/pass_at_1", "goal": "best"}}, "metric.goal: 'best' is not allowed; allowed: maxi"),
        ({"command": "ctrl-hpc trial"}, "command: expected [ctrl-hpc, trial, CONFIG.yaml"),
        ({"command": ["ctrl-hpc", "trial", "${args_no_hyphens}"]}, "command: expected [ctrl-hpc, trial, CONFIG.yaml"),
        ({"parameters": [1]}, "parameters: expected KEY: {values: [...]} for at least one key"),
        ({"parameters": {"rl.steps": 5}}, "parameters.rl.steps: 5: write {value: 5} or {values: [...]}"),
        ({"parameters": {"rl.steps": {"values": 5}}}, "parameters.rl.steps.values: 5 is not allowed; a list of"),
        ({"parameters": {"rl.steps": {"values": []}}}, "parameters.rl.steps.values: [] is not allowed; a list of"),
    ],
)
def test_a_wrong_sweep_is_one_line(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = yaml.safe_load((ROOT / "configs" / "sweep" / "learning_rate.yaml").read_text())
    data["command"][2] = str(ROOT / "configs" / "tiny_ci.yaml")
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(data | change))
    assert main(["sweep", str(file), "--local", f"run_dir={tmp_path / 'run'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"min": "1e-4", "max": 1}, "parameters.rl.optimizer.lr: '1e-4' is not a number; write 0.0001 or 1.0e-4"),
        ({"min": 1.0, "max": 0.5}, "parameters.rl.optimizer.lr: min 1.0 is greater than max 0.5"),
        ({"min": 0.0, "max": 1.0, "distribution": "log_uniform_values"}, "lr.min: 0.0 is not allowed with log_uniform"),
        ({"min": 0.0, "max": 1.0, "distribution": "normal"}, "lr.distribution: 'normal': with --local: uniform"),
    ],
)
def test_a_wrong_range_is_one_line(given: dict[str, Any], message: str) -> None:
    read = sweep.read(ROOT / "configs" / "sweep" / "policy_loss.yaml")
    with pytest.raises(ValueError, match=re.escape(message)):
        list(sweep.trials(replace(read, parameters={"rl.optimizer.lr": given}), 1, 0))


def test_a_trial_that_fails_is_told_and_the_others_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "cheap.yaml", tmp_path / "runs" / "one", "disabled")
    failures: list[Exception | None] = [RuntimeError("its disk is full"), None]

    def run_member(member: suite.Member, others: list[suite.Member]) -> None:
        failure = failures.pop(0)
        if failure is not None:
            raise failure

    monkeypatch.setattr(suite, "_run_member", run_member)
    monkeypatch.setattr(sweep, "_objective", lambda run_dir: 0.5)
    assert main(["sweep", str(file), "--local", "wandb.mode=disabled"]) == 1
    folder, said = tmp_path / "runs" / "sweeps" / "cheap", capsys.readouterr().err
    assert "trial-000: its disk is full" in said
    assert (
        said.splitlines()[-1]
        == f"ctrl-hpc: trial 0 of 2 failed (see above, and {folder}); the same command tries again"
    )
    assert [row["eval/pass_at_1"] for row in json.loads((folder / "sweep.json").read_text())] == [None, 0.5]
    assert main(["sweep", str(file), "--local", "--count", "0"]) == 2
    assert "--count: 0 is not allowed" in capsys.readouterr().err


def write(file: Path, run_dir: Path, mode: str) -> Path:
    command = ["ctrl-hpc", "trial", str(ROOT / "configs" / "tiny_faults.yaml"), f"wandb.mode={mode}", *CHEAP]
    data = {
        "method": "grid",
        "metric": {"name": "eval/pass_at_1", "goal": "maximize"},
        "parameters": {"eval.temperature": {"values": [0.5, 1.0]}},
        "command": [*command, f"run_dir={run_dir}", "${args_no_hyphens}"],
    }
    file.write_text(yaml.safe_dump(data))
    return file


@pytest.mark.slow
def test_a_local_sweep_runs_every_trial_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "cheap.yaml", tmp_path / "runs" / "one", "disabled")
    assert main(["sweep", str(file), "--local", "wandb.mode=disabled"]) == 0
    folder = tmp_path / "runs" / "sweeps" / "cheap"
    rows = json.loads((folder / "sweep.json").read_text())
    assert [(row["trial"], row["eval.temperature"]) for row in rows] == [(0, 0.5), (1, 1.0)]
    assert all(row["eval/pass_at_1"] == 1.0 for row in rows)  # the canonical solutions
    ended = [(folder / f"trial-00{number}" / "report" / "done.json").stat().st_mtime_ns for number in (0, 1)]
    shown = capfd.readouterr().out
    assert re.search(r"1 ┃? *│? *1 │ *1 *│?", shown) is not None and str(folder) in shown.replace("\n", "")
    assert main(["sweep", str(file), "--local", "wandb.mode=disabled"]) == 0
    assert ended == [(folder / f"trial-00{number}" / "report" / "done.json").stat().st_mtime_ns for number in (0, 1)]


@pytest.fixture(name="server")
def server_of_agents(server: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_SILENT", raising=False)
    return server


def create(file: Path) -> str:
    done = subprocess.run([BIN / "ctrl-hpc", "sweep", file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = re.search(r"wandb agent (\S+)", done.stderr + done.stdout)
    assert found is not None, done.stderr
    return found[1]


@pytest.mark.slow
def test_an_agent_runs_a_trial_whose_objective_reaches_the_server(server: Store, tmp_path: Path) -> None:
    name = create(write(tmp_path / "cheap.yaml", tmp_path / "runs" / "one", "online"))
    agent = ["wandb", "agent", "--count", "1", name]
    done = subprocess.run(agent, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = server.runs["sweep0-trial0"]
    assert run["sweep"] == "sweep0" and run["config"]["eval"]["temperature"] == 0.5
    assert run["summary"]["eval/pass_at_1"] == 1.0
    (folder,) = (tmp_path / "runs" / "sweeps" / "sweep0").iterdir()
    assert folder.name == "sweep0-trial0" and (folder / "report" / "results.json").exists()
    assert set(server.runs) == {"sweep0-trial0"}  # jobs of the trial are no runs of the sweep


def processes_of(server_url: str) -> list[int]:
    """The processes that would log to this server."""
    mark, found = f"WANDB_BASE_URL={server_url}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended, or is not ours
            if mark in (folder / "environ").read_bytes() and int(folder.name) != os.getpid():
                found.append(int(folder.name))
    return found


@pytest.mark.slow
def test_a_trial_that_the_server_stops_ends_with_its_jobs_and_the_next_begins(
    server: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "early.yaml", tmp_path / "runs" / "one", "online")
    data = yaml.safe_load(file.read_text())
    short = ["rl.eval_every=1", "rl.eval_problems=8", "data.n_eval=8", "eval.critics=[none,rl]", "wandb.services=false"]
    short += ["data.n_train=32", "synthesize.n_critiques=16", "trainer.ranks_per_node=1", "parallel.tensor=1"]
    own = [f"run_dir={tmp_path / 'runs' / 'one'}", "wandb.mode=online"]
    command = ["ctrl-hpc", "trial", str(ROOT / "configs" / "tiny_faults.yaml"), *short, *own, "${args_no_hyphens}"]
    parameters = {"rl.steps": {"values": [500, 3]}}
    file.write_text(yaml.safe_dump(data | {"command": command, "parameters": parameters}))
    seen: list[int] = []  # values that had come when the server looked
    server.stops = lambda run, values: run == "sweep0-trial0" and (seen.append(len(values)) or len(values) >= 2)
    monkeypatch.setenv("CTRL_HPC_TRIAL", str(tmp_path / "trial.json"))
    agent = ["wandb", "agent", "--count", "2", create(file)]
    done = subprocess.run(agent, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=500)
    assert done.returncode == 0, done.stderr
    assert processes_of(os.environ["WANDB_BASE_URL"]) == []
    folder = tmp_path / "runs" / "sweeps" / "sweep0"
    first, second = folder / "sweep0-trial0", folder / "sweep0-trial1"
    assert set(server.stopped) == {"sweep0-trial0"} and 0 in seen  # judged while it ran, not at its end
    rates = [row["eval/pass_at_1"] for row in server.runs["sweep0-trial0"]["rows"] if "eval/pass_at_1" in row]
    logged = [json.loads(line) for line in (first / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert (
        len(rates) >= 2 and rates == [row["eval/pass_at_1"] for row in logged if "eval/pass_at_1" in row][: len(rates)]
    )
    assert (first / "sft" / "done.json").exists() and not (first / "rl" / "done.json").exists()
    assert main(["stop", str(first)]) == 0 and "nothing was running" in capsys.readouterr().out
    run = server.runs["sweep0-trial1"]
    results = json.loads((second / "report" / "results.json").read_text())
    expected = results["datasets"]["tiny"]["critics"]["rl"]["pass_at_1"][1]
    assert run["type"] == "trial" and run["summary"]["eval/pass_at_1"] == expected
    steps = [int(row["step"]) for row in run["rows"] if "rl/reward" in row]
    assert steps == [0, 1, 2] and any("sft/loss" in row for row in run["rows"])
    jobs = {run["type"] for run in server.runs.values() if run["group"] == "sweep0-trial1"}
    assert jobs == {"trial", "sft", "rl"} and {run["sweep"] for run in server.runs.values()} == {"sweep0", None}


@pytest.mark.slow
def test_an_array_of_agents_and_a_requeued_element_continues_its_trial(
    slurm_cluster: SlurmCluster, server: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = create(write(tmp_path / "cheap.yaml", tmp_path / "runs" / "one", "online"))
    monkeypatch.setenv("CTRL_HPC_TRIALS", str(tmp_path / "trials"))
    options = ["--parsable", "--array=0-1", f"--output={tmp_path}/%a.log", f"--chdir={ROOT}"]
    job = int(slurm_cluster.run("sbatch", *options, "slurm/sweep.sbatch", name, "eval.chunk=2"))
    cut_short = tmp_path / "trials" / f"{job}-0.json"
    slurm_cluster.wait_for("element 0 has its trial", cut_short.exists)
    before = json.loads(cut_short.read_text())
    slurm_cluster.run("scontrol", "requeue", f"{job}_0")
    slurm_cluster.wait_for("both have ended", lambda: not slurm_cluster.run("squeue", "-h", "-j", str(job)), 300)
    logs = [(tmp_path / f"{element}.log").read_text() for element in (0, 1)]
    assert "element 0, start 2" in logs[0] and not cut_short.exists(), logs[0]
    assert set(server.runs) == {"sweep0-trial0", "sweep0-trial1"}
    assert all(run["summary"]["eval/pass_at_1"] == 1.0 for run in server.runs.values()), logs
    assert {run["config"]["eval"]["temperature"] for run in server.runs.values()} == {0.5, 1.0}
    assert server.sweeps["sweep0"]["given"] == 2  # the requeued element asked for no other trial
    assert "eval.chunk=2" in before["overrides"] and "WANDB_API_KEY" not in before["environment"]
