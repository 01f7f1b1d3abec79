"""Journals: every step once, half lines tolerated, read as they grow; and what a monitor journals."""

import json
import os
import re
import resource
import subprocess
import sys
import time

import pytest

from ctrl_hpc.cluster import monitor
from ctrl_hpc.config import ROOT
from ctrl_hpc.run import journal
from ctrl_hpc.run.journal import Artifact, Journal, Table, Tail


def rewards(run_dir):
    return [(line["step"], line["rl/reward"]) for line in journal.lines(journal.place(run_dir, "rl"))]


def test_a_resumed_journal_holds_every_step_once(tmp_path):
    first = Journal(tmp_path, "rl", start=0)
    for step in range(5):
        first.log(step, {"rl/reward": step / 10}, steps=9)
    file = tmp_path / "rl" / "metrics.jsonl"
    with file.open("a") as out:
        out.write('{"step": 5, "rl/re')  # killed while it wrote
    assert [step for step, _ in rewards(tmp_path)] == [0, 1, 2, 3, 4]
    second = Journal(tmp_path, "rl", start=3)
    assert second.next == 3
    second.log(3, {"rl/reward": 0.9}, steps=9)
    assert rewards(tmp_path) == [(0, 0.0), (1, 0.1), (2, 0.2), (3, 0.9)]
    found = journal.progress(tmp_path, "rl")
    assert (found["step"], found["steps"], found["metrics"]) == (4, 9, {"rl/reward": 0.9})
    assert journal.progress(tmp_path, "sft") == {}


def test_a_line_names_its_files_by_their_place_in_the_run(tmp_path):
    (tmp_path / "rl" / "hf").mkdir(parents=True)
    (tmp_path / "rl" / "hf" / "weights").write_bytes(b"four")
    table = Table(columns=["id", "text"], rows=[["a", "x"]])
    tables = {"rl/samples": table, "rl/none": Table(columns=["id"], rows=[])}
    kept = Artifact(name="critic", type="model", path=tmp_path / "rl" / "hf")
    Journal(tmp_path, "rl").log(19, {"rl/kl": 0.5}, tables=tables, artifacts=[kept], images=[tmp_path / "curve.png"])
    line = journal.last(tmp_path / "rl" / "metrics.jsonl")
    assert line is not None and line.pop("time") == pytest.approx(time.time(), abs=60)
    assert line == {
        "step": 19,
        "rl/kl": 0.5,
        "tables": {"rl/samples": "rl/tables/rl-samples-000019.json"},
        "images": {"curve": "curve.png"},
        "artifacts": [{"name": "critic", "type": "model", "path": "rl/hf", "files": {"weights": 4}}],
    }
    data = json.loads((tmp_path / "rl" / "tables" / "rl-samples-000019.json").read_text())
    assert data == {"columns": ["id", "text"], "data": [["a", "x"]]}
    assert journal.numbers(line) == {"rl/kl": 0.5}


def test_journals_are_found_by_name_and_go_on_after_their_last_line(tmp_path):
    Journal(tmp_path, "rl").log(0, {"rl/reward": 1.0})
    Journal(tmp_path, "executor", 3).log(1000, {"executor/queue": 1.0})
    again = Journal(tmp_path, "executor", 3)
    again.log(again.next, {"executor/queue": 2.0})
    found = journal.journals(tmp_path)
    assert {name: [line["step"] for line in journal.lines(file)] for name, file in found.items()} == {
        "rl": [0],
        "executor-3": [1000, 1001],
    }


def test_the_progress_of_a_stage_of_an_earlier_version_is_read(tmp_path):
    (tmp_path / "rl").mkdir()
    (tmp_path / "rl" / "metrics.jsonl").write_text('{"step": 0, "rl/kl": 0.1}\n{"step": 1, "rl/kl": 0.2}\n')
    assert journal.progress(tmp_path, "rl") == {"step": 2, "metrics": {"rl/kl": 0.2}}
    (tmp_path / "rl" / "progress.json").write_text('{"stage": "rl", "step": 2, "steps": 50}')
    assert journal.progress(tmp_path, "rl") == {"step": 2, "steps": 50, "metrics": {"rl/kl": 0.2}}


def test_the_last_line_is_found_behind_long_ones(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "a/b": "' + "x" * 5000 + '"}\n{"step": 3')
    line = journal.last(file, tail=64)
    assert line is not None and line["step"] == 2
    assert journal.last(tmp_path / "none.jsonl") is None


def test_a_follower_reads_whole_lines_and_a_file_that_was_cut_anew(tmp_path):
    writer = Journal(tmp_path, "rl")
    tail = Tail(writer.file)
    assert tail.new() == []
    for step in range(4):
        writer.log(step, {"rl/kl": 0.0})
    with writer.file.open("a") as out:
        out.write('{"step": 4')
    assert [line["step"] for line in tail.new()] == [0, 1, 2, 3]
    assert tail.new() == []
    Journal(tmp_path, "rl", start=2).log(2, {"rl/kl": 1.0})
    assert [line["step"] for line in tail.new()] == [0, 1, 2]


def test_a_line_for_which_there_is_no_space_is_not_there_in_part(tmp_path):
    writer = Journal(tmp_path, "rl")
    writer.log(0, {"rl/kl": 0.0})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (writer.file.stat().st_size + 10, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            writer.log(1, {"rl/kl": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    writer.log(1, {"rl/kl": 2.0})
    assert [(line["step"], line["rl/kl"]) for line in journal.lines(writer.file)] == [(0, 0.0), (1, 2.0)]


@pytest.mark.parametrize(
    ("modules", "unwanted"),
    [
        ("cluster.element cluster.trainer rollout.server sandbox.server evaluate.run report.page pipeline", "wandb"),
        ("train.rl train.sft", "ctrl_hpc.tracking"),  # megatron-core imports wandb for itself, where it is installed
    ],
)
def test_who_journals_knows_nothing_of_wandb(modules, unwanted):
    imports = "; ".join(f"import ctrl_hpc.{module}" for module in modules.split())
    code = f"import sys; {imports}; print([name for name in sys.modules if name.startswith({unwanted!r})])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_mirror_alone_imports_wandb():
    found = [
        file
        for file in (ROOT / "ctrl_hpc").rglob("*.py")
        if re.search(r"^\s*(import|from) wandb", file.read_text(), re.M)
    ]
    assert [file.name for file in found] == ["mirror.py"]


def test_a_monitor_journals_its_node_until_it_is_closed(tmp_path):
    with monitor.Monitor(tmp_path, "executor", 0, 0.05):
        time.sleep(0.4)
    lines = journal.lines(tmp_path / "journals" / "executor-0.jsonl")
    steps = [line["step"] for line in lines]
    assert len(steps) >= 3 and steps == sorted(set(steps)) and abs(steps[0] - time.time()) < 60
    for line in lines:
        assert 0.0 <= line["node/cpu_percent"] <= 100.0 and 0.0 < line["node/memory_percent"] < 100.0
        assert 0.0 < line["node/memory_gib"] < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30


def test_counters_become_rates_and_gauges_stay():
    before = monitor.read("# HELP x y\nexecutor_runs_total 10.0\nexecutor_queue_length 7.0\n")
    after = monitor.read('executor_runs_total 40.0\nexecutor_queue_length 3.0\nexecutor_verdicts{a="b"} 1.0\n')
    assert monitor.rates(before, after, 10.0) == {"executor/runs_per_s": 3.0, "executor/queue": 3.0}
    served = monitor.read("ctrl_rollout_completion_tokens_total 600\nctrl_rollout_waiting 2\n")
    assert monitor.rates({}, served, 2.0) == {"rollout/tokens_per_s": 300.0, "rollout/queue": 2.0}


def test_the_versions_of_training_are_told_and_evaluations_are_not():
    for version, told in ((7, {"rollout/weight_version": 7.0}), (1_763_740_000_000, {})):
        assert monitor.rates({}, monitor.read(f"ctrl_rollout_weight_version {version}\n"), 2.0) == told
