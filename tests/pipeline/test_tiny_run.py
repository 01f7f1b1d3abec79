"""The whole pipeline at test size, by the command a user types: it learns, its report is consistent, and it resumes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from process_table import processes_of

from ctrl_hpc import jsonl
from ctrl_hpc.config import ROOT
from ctrl_hpc.records import Problem, Solution
from ctrl_hpc.run import journal

CONFIG = ROOT / "configs" / "tiny_ci.yaml"


def ctrl_hpc(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "ctrl_hpc.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run of ``configs/tiny_ci.yaml``."""
    folder = tmp_path_factory.mktemp("tiny_ci") / "run"
    done = ctrl_hpc("run", str(CONFIG), f"run_dir={folder}")
    assert done.returncode == 0, done.stderr[-4000:]
    yield folder
    assert processes_of(folder) == []


@pytest.fixture(scope="module")
def results(finished: Path) -> dict[str, Any]:
    """Its ``report/results.json``."""
    loaded: dict[str, Any] = json.loads((finished / "report" / "results.json").read_text())
    return loaded


pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_it_learns(results: dict[str, Any]) -> None:
    critics = results["datasets"]["tiny"]["critics"]
    zero_shot = critics["none"]["pass_at_1"][0]
    one_turn = {name: critics[name]["pass_at_1"][1] for name in ("sft", "rl")}
    assert 0.38 <= zero_shot <= 0.55
    assert one_turn["sft"] > zero_shot
    assert one_turn["rl"] >= zero_shot + 0.18
    assert one_turn["rl"] >= one_turn["sft"] + 0.08
    assert critics["rl"]["delta_down"] <= 0.05
    assert critics["rl"]["judgement"]["f1_pass"] >= 0.8
    assert critics["rl"]["judgement"]["f1_fail"] >= 0.8


def test_the_report_keeps_its_contract(results: dict[str, Any], finished: Path) -> None:
    tiny = results["datasets"]["tiny"]
    assert tiny["n_problems"] == 400
    for name in ("none", "base", "sft", "rl", "exec_feedback", "oracle"):
        for critic in (name, f"{name}_greedy"):
            row = tiny["critics"][critic]
            before, after = row["pass_at_1"][:2]
            assert after == pytest.approx(before + row["delta_up"] - row["delta_down"], abs=1e-12)
            low, high = row["ci95"]["pass_at_1"]
            assert 0.0 <= low <= after <= high <= 1.0
    assert tiny["critics"]["none"]["pass_at_1"][0] == tiny["critics"]["none"]["pass_at_1"][1]
    assert set(results["wall_time_s"]) >= {"sample", "synthesize", "sft", "rl", "eval"}
    assert [point["step"] for point in results["learning_curve"]] == list(range(1, 51))
    page = (finished / "report" / "index.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    for plot in (finished / "report").glob("*.png"):
        assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_frozen_generator_is_not_the_policy(finished: Path) -> None:
    """After all those updates of the critic, the served generator still answers as the model on disk does."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from ctrl_hpc.flow.prompts import Prompts

    torch.set_num_threads(1)
    model = ROOT / "models" / "tiny" / "generator"
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model)
    prompts = Prompts.load("tiny", None)
    problems = {problem.id: problem for problem in jsonl.read(Problem, finished / "problems" / "eval-tiny.jsonl")}
    drafts = jsonl.read(Solution, finished / "eval" / "tiny" / "drafts_greedy.jsonl")[:30]
    for draft in drafts:
        chat = [
            {"role": message.role, "content": message.content}
            for message in prompts.solution(problems[draft.problem_id])
        ]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = network.generate(**ids, max_new_tokens=48, do_sample=False)
        text = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text.strip() == draft.text.strip()


def test_its_logs_and_its_status_end_well(finished: Path) -> None:
    said = {role: ctrl_hpc("logs", str(finished), role) for role in ("rl", "driver", "trainer", "executor")}
    assert all(done.returncode == 0 for done in said.values())
    assert said["rl"].stdout == said["trainer"].stdout
    assert "rl: done in" in said["driver"].stdout and "report: " in said["driver"].stdout
    status = json.loads(ctrl_hpc("status", str(finished), "--json").stdout)
    assert not status["running"] and status["errors"] == []
    assert all(stage["state"] == "done" for name, stage in status["stages"].items() if name != "models")


def test_a_second_run_skips_everything_and_changes_nothing(finished: Path) -> None:
    before = (finished / "report" / "results.json").read_bytes()
    again = ctrl_hpc("run", str(CONFIG), f"run_dir={finished}")
    assert again.returncode == 0
    assert again.stderr.count("done before, skipped") == 6
    assert (finished / "report" / "results.json").read_bytes() == before


def test_another_configuration_is_refused(finished: Path) -> None:
    refused = ctrl_hpc("run", str(CONFIG), f"run_dir={finished}", "rl.steps=3")
    assert refused.returncode == 2
    assert "belongs to another configuration: rl.steps is 50 there and 3 now" in refused.stderr


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_process_and_continues(how: signal.Signals, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    small = ["rl.steps=8", "rl.save_every=2", "data.n_train=64", "data.n_eval=24", "synthesize.n_critiques=40"]
    small += ["stages=[sample,synthesize,sft,rl]", "wandb.mode=disabled"]
    small += ["tiny.require_conditions=false", "launch.dead_after_s=10"]
    command = [sys.executable, "-m", "ctrl_hpc.cli", "run", str(CONFIG), f"run_dir={folder}", *small]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 480
    while journal.progress(folder, "rl").get("step", 0) < 3:
        assert process.poll() is None and time.monotonic() < deadline, "the run ended or hung before its third RL step"
        time.sleep(0.1)
    process.send_signal(how)
    assert process.wait(60) != 0
    while processes_of(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(folder) == []
    done = ctrl_hpc("run", str(CONFIG), f"run_dir={folder}", *small)
    assert done.returncode == 0, done.stderr[-4000:]
    steps = [json.loads(line)["step"] for line in (folder / "rl" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(8))
