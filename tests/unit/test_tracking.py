"""Tracking against the real wandb, offline: what lies on disk is read back from its record file."""

import json
import os
import re
import struct
import subprocess
import sys

import pytest
from wandb_process import kill_wandb

from ctrl_hpc.config import ROOT, load
from ctrl_hpc.tracking.tracker import Tracker, child_environment, run_id

HEADER_BYTES, BLOCK_BYTES = 7, 32768


def records(file):
    """The protobuf records of a ``.wandb`` file: a LevelDB log (blocks of 32 KiB; checksum, length, type, data)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, found, part = file.read_bytes(), [], b""
    assert data[:4] == b":W&B"
    position = HEADER_BYTES
    while position + HEADER_BYTES <= len(data):
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < HEADER_BYTES:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER_BYTES])
        part += data[position + HEADER_BYTES : position + HEADER_BYTES + length]
        position += HEADER_BYTES + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(part)
            found.append(record)
            part = b""
    return found


def history(found):
    """The logged rows, as dictionaries."""
    rows = []
    for record in found:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


@pytest.fixture
def config(tmp_path):
    return load(ROOT / "configs" / "tiny.yaml", [f"run_dir={tmp_path}", "wandb.group=experiment 7"])


def test_an_offline_run_is_on_disk(config, tmp_path):
    with Tracker(config, tmp_path, "rl") as tracker:
        for step in range(3):
            tracker.log({"rl/reward": step / 4, "rl/kl": 0.5}, step)
        tracker.table("rl/samples", ["id", "text"], [["a", "x"], ["b", None]])
        tracker.summary({"eval/pass_at_1": 0.75})
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*-rl.wandb")
    found = records(file)
    (run,) = [record.run for record in found if record.WhichOneof("record_type") == "run"][:1]
    assert (run.run_id, run.run_group, run.job_type, run.project) == (
        run_id(tmp_path, "rl"),
        "experiment 7",
        "rl",
        "ctrl-hpc",
    )
    numbers = [(row["step"], row["rl/reward"], row["rl/kl"]) for row in history(found) if "rl/reward" in row]
    assert numbers == [(0, 0.0, 0.5), (1, 0.25, 0.5), (2, 0.5, 0.5)]
    saved = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert saved["rl"]["group_size"] == 8
    (table,) = tmp_path.glob("wandb/offline-run-*/files/media/table/rl/samples*.json")
    assert json.loads(table.read_text())["data"] == [["a", "x"], ["b", None]]
    summaries = [
        {item.key or ".".join(item.nested_key): item.value_json for item in record.summary.update}
        for record in found
        if record.WhichOneof("record_type") == "summary"
    ]
    assert any(summary.get("eval/pass_at_1") == "0.75" for summary in summaries)


def test_a_restarted_role_keeps_its_id(config, tmp_path):
    for step in (0, 1):
        with Tracker(config, tmp_path, "sft") as tracker:
            tracker.log({"sft/loss": 1.0 - step / 2}, step)
    files = list(tmp_path.glob("wandb/offline-run-*/run-*-sft.wandb"))
    rows = [(row["step"], row["sft/loss"]) for file in files for row in history(records(file)) if "sft/loss" in row]
    assert sorted(rows) == [(0, 1.0), (1, 0.5)]


@pytest.mark.slow
def test_what_wandbs_own_process_had_not_written_when_it_was_killed_is_logged_again(config, tmp_path, capfd):
    expected = [(step, "x" * 40 * (step % 7)) for step in range(400)]
    with Tracker(config, tmp_path, "rl") as tracker:
        tracker.summary({"trainer/kernels": "torch"})
        for step, text in expected:  # about 150 kB: some blocks are written, the last ones are not
            if step in (0, 3, 222):
                kill_wandb()
            tracker.log({"text": text}, step)
        tracker.table("rl/samples", ["id"], [["a"]])
        kill_wandb()
    assert capfd.readouterr().out.count("starting another one") >= 2
    pieces = sorted(tmp_path.glob("wandb/offline-run-*/run-*-rl.wandb"))
    rows = [row for piece in pieces for row in history(records(piece))]
    assert [(row["step"], row["text"]) for row in rows if "text" in row] == expected
    assert len([row for row in rows if "rl/samples._type" in row or "rl/samples" in row]) == 1
    last = [record for record in records(pieces[-1]) if record.WhichOneof("record_type") == "summary"]
    assert any(item.key == "trainer/kernels" for record in last for item in record.summary.update)


def test_an_id_is_the_run_directorys_the_roles_and_the_elements(tmp_path):
    first = run_id(tmp_path / "a", "executor", 0)
    assert first == run_id(tmp_path / "a", "executor", 0) and re.fullmatch(r"[0-9a-f]{8}-executor-0", first)
    assert run_id(tmp_path / "a", "report") == first.replace("executor-0", "report")
    assert run_id(tmp_path / "b", "report") != run_id(tmp_path / "a", "report")
    assert os.listdir(tmp_path / "a") == ["wandb_id"]


def test_a_sweeps_agent_names_the_run_of_this_process_only(config, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "agent1")
    with Tracker(config, tmp_path, "driver") as tracker:
        tracker.log({"eval/pass_at_1": 0.5}, 0)
    assert len(list(tmp_path.glob("wandb/offline-run-*/run-agent1.wandb"))) == 1
    environment = {"WANDB_RUN_ID": "agent1", "WANDB_SWEEP_ID": "s", "WANDB_MODE": "offline", "PATH": "/bin"}
    assert child_environment(environment) == {"WANDB_MODE": "offline", "PATH": "/bin"}


def test_disabled_writes_nothing_and_does_not_import_wandb(tmp_path):
    code = f"""
import sys
from pathlib import Path
from ctrl_hpc.config import ROOT, load
from ctrl_hpc.tracking.tracker import Tracker
config = load(ROOT / "configs" / "tiny.yaml", ["run_dir={tmp_path}", "wandb.mode=disabled"])
with Tracker(config, Path("{tmp_path}"), "rl") as tracker:
    tracker.log({{"rl/reward": 1.0}}, 0)
    tracker.table("t", ["a"], [[1]])
    tracker.summary({{"a": 1.0}})
assert "wandb" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert list(tmp_path.iterdir()) == []
