"""The mirror against the real wandb: every line of every journal is once in wandb, whatever was killed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import wandb_records
from wandb_process import kill_wandb
from wandb_server import Store

from ctrl_hpc.config import ROOT, Config, load
from ctrl_hpc.pipeline import mirrored
from ctrl_hpc.run.journal import Journal, Table, place
from ctrl_hpc.tracking import mirror
from ctrl_hpc.tracking.marks import mark, run_id
from ctrl_hpc.tracking.mirror import LiveMirror


@pytest.fixture(autouse=True)
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "LOOK_S", 0.05)


def config(run_dir: Path, mode: str = "offline") -> Config:
    settings = [f"run_dir={run_dir}", f"wandb.mode={mode}", "wandb.group=experiment 7"]
    return load(ROOT / "configs" / "tiny_faults.yaml", settings)


def train(run_dir: Path, start: int, stop: int) -> None:
    """Steps as a trainer journals them, which begins at ``start``."""
    writer = Journal(run_dir, "rl", start=start)
    for step in range(start, stop):
        writer.log(step, {"rl/reward": step / 8}, steps=9)


def await_(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def await_told(live: LiveMirror, run_dir: Path, step: int) -> None:
    """Wait until the mirror has told wandb this step of RL."""
    await_(lambda: live.told(run_id(run_dir, "rl")) >= step)


def test_journals_become_runs_of_one_group_on_disk(run_dir: Path) -> None:
    with LiveMirror(config(run_dir), run_dir):
        writer = Journal(run_dir, "rl")
        for step in range(3):
            tables = {"rl/samples": Table(columns=["id", "text"], rows=[["a", "x"], ["b", None]])} if step == 1 else {}
            writer.log(step, {"rl/reward": step / 4, "rl/kl": 0.5}, tables=tables, steps=3)
        Journal(run_dir, "executor", 0).log(1_700_000_000, {"executor/runs_per_s": 2.5})
        Journal(run_dir, "report").log(0, {"eval/pass_at_1": 0.75}, summary={"eval/pass_at_1": 0.75})
    rows = wandb_records.history(run_dir, "rl")
    assert [(row["step"], row["rl/reward"], row["rl/kl"]) for row in rows] == [
        (0, 0.0, 0.5),
        (1, 0.25, 0.5),
        (2, 0.5, 0.5),
    ]
    assert "time" not in rows[0] and "steps" not in rows[0]
    assert wandb_records.steps(run_dir, "executor-0") == [1_700_000_000]
    assert wandb_records.summary(run_dir, "report")["eval/pass_at_1"] == 0.75
    (table,) = run_dir.glob("wandb/offline-run-*/files/media/table/rl/samples*.json")
    assert json.loads(table.read_text())["data"] == [["a", "x"], ["b", None]]
    (file,) = wandb_records.pieces(run_dir, "rl")
    run = next(record.run for record in wandb_records.records(file) if record.WhichOneof("record_type") == "run")
    assert (run.run_id, run.run_group, run.job_type, run.project, run.display_name) == (
        *(run_id(run_dir, "rl"), "experiment 7", "rl", "ctrl-hpc", "tiny_faults-rl"),
    )  # fmt: skip
    saved = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert saved["rl"]["group_size"] == config(run_dir).rl.group_size


def test_an_id_is_the_run_directorys_and_the_journals(tmp_path: Path) -> None:
    first = run_id(tmp_path / "a", "executor-0")
    assert first == run_id(tmp_path / "a", "executor-0") and re.fullmatch(r"[0-9a-f]{8}-executor-0", first)
    assert run_id(tmp_path / "a", "report") == first.replace("executor-0", "report")
    assert run_id(tmp_path / "b", "report") != run_id(tmp_path / "a", "report")
    assert os.listdir(tmp_path / "a") == ["wandb_id"]


def test_disabled_writes_nothing(run_dir: Path) -> None:
    train(run_dir, 0, 2)
    with mirrored(config(run_dir, "disabled"), run_dir):
        pass
    assert [path.name for path in run_dir.iterdir()] == ["rl"]


@pytest.mark.slow
def test_a_trainer_that_goes_on_from_a_checkpoint_is_told_once(run_dir: Path) -> None:
    with LiveMirror(config(run_dir), run_dir) as live:
        train(run_dir, 0, 5)
        await_told(live, run_dir, 4)
        train(run_dir, 3, 7)  # the checkpoint was of step 3
    assert wandb_records.steps(run_dir, "rl") == [0, 1, 2, 3, 4, 5, 6]
    with LiveMirror(config(run_dir), run_dir):  # the driver is started again
        train(run_dir, 5, 9)
    assert wandb_records.steps(run_dir, "rl") == list(range(9))
    with LiveMirror(config(run_dir), run_dir):
        pass
    assert len(wandb_records.pieces(run_dir, "rl")) == 2  # nothing was new


@pytest.mark.slow
def test_a_stage_whose_folder_is_removed_is_told_anew(run_dir: Path) -> None:
    for _ in range(2):
        with LiveMirror(config(run_dir), run_dir):
            train(run_dir, 0, 3)
        shutil.rmtree(run_dir / "rl")
    assert wandb_records.steps(run_dir, "rl") == [0, 1, 2] * 2


@pytest.mark.slow
def test_nothing_is_told_again_where_pieces_that_were_sent_are_gone(run_dir: Path) -> None:
    with LiveMirror(config(run_dir), run_dir):
        train(run_dir, 0, 3)
    (sent,) = run_dir.glob("wandb/offline-run-*")
    sent.rename(run_dir / "elsewhere")
    for start, stop in ((3, 5), (5, 6)):
        with LiveMirror(config(run_dir), run_dir):
            train(run_dir, start, stop)
    assert wandb_records.steps(run_dir, "rl") == [3, 4, 5]


@pytest.mark.slow
def test_what_a_killed_wandb_had_not_written_is_told_again(run_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with LiveMirror(config(run_dir), run_dir) as live:
        writer = Journal(run_dir, "rl")
        for step in range(400):  # about 150 kB: some blocks are written, the last ones are not
            tables = {"rl/samples": Table(columns=["id"], rows=[["a"]])} if step == 300 else {}
            writer.log(step, {"rl/text": "x" * 40 * (step % 7)}, tables=tables)  # type: ignore[dict-item]
            if step in (0, 3, 222):
                await_told(live, run_dir, step)
                kill_wandb()
        await_told(live, run_dir, 399)
        kill_wandb()
    assert capfd.readouterr().out.count("starting another one") >= 2
    rows = wandb_records.history(run_dir, "rl")
    assert [(row["step"], row["rl/text"]) for row in rows] == [(step, "x" * 40 * (step % 7)) for step in range(400)]
    assert len([row for row in rows if "rl/samples._type" in row or "rl/samples" in row]) == 1
    assert len(wandb_records.pieces(run_dir, "rl")) == 1  # what the lost ones had written is thrown away


def killed_driver(run_dir: Path, mode: str, steps: int) -> None:
    """A driver that tells steps to wandb, and is killed with wandb's process."""
    code = f"""
import os, signal, sys
sys.path[:] = {sys.path!r}
import test_mirror as steps
from pathlib import Path
run_dir = Path({str(run_dir)!r})
steps.mirror.LOOK_S = 0.05
live = steps.LiveMirror(steps.config(run_dir, {mode!r}), run_dir).__enter__()
steps.train(run_dir, 0, {steps})
steps.await_told(live, run_dir, {steps - 1})
steps.kill_wandb()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == -signal.SIGKILL


@pytest.mark.slow
def test_the_next_driver_tells_what_was_lost_with_a_node(run_dir: Path) -> None:
    killed_driver(run_dir, "offline", 5)
    assert wandb_records.steps(run_dir, "rl") == []  # none had reached the disk
    with LiveMirror(config(run_dir), run_dir):
        train(run_dir, 3, 7)
    assert wandb_records.steps(run_dir, "rl") == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_online_a_driver_goes_on_with_what_the_server_lacks(server: Store, run_dir: Path) -> None:
    with LiveMirror(config(run_dir, "online"), run_dir):
        train(run_dir, 0, 5)
    rows = server.runs[run_id(run_dir, "rl")]["rows"]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert mark(place(run_dir, "rl"), run_id(run_dir, "rl")).sent == 4
    del rows[2:]  # as if it had been killed before it sent the others
    server.runs[run_id(run_dir, "rl")]["summary"] = {"step": 1, "_step": 1}
    with LiveMirror(config(run_dir, "online"), run_dir):
        train(run_dir, 4, 7)
    assert [(row["step"], row["_step"], row["rl/reward"]) for row in rows] == [(i, i, i / 8) for i in range(7)]


@pytest.mark.slow
def test_online_every_line_arrives_once_whatever_is_killed(
    server: Store, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed_driver(run_dir, "online", 5)
    with LiveMirror(config(run_dir, "online"), run_dir) as live:
        writer = Journal(run_dir, "executor", 0)
        for step in range(60):
            writer.log(1_700_000_000 + step, {"executor/runs_per_s": step / 2})
            if step in (1, 20, 41):
                await_(lambda: live.told(run_id(run_dir, "executor-0")) >= writer.next - 1)
                kill_wandb()
        train(run_dir, 3, 8)
        await_told(live, run_dir, 7)
        kill_wandb()
    assert capsys.readouterr().out.count("starting another one") >= 2
    rows = server.runs[run_id(run_dir, "executor-0")]["rows"]
    assert [(row["step"], row["_step"]) for row in rows] == [(1_700_000_000 + step, step) for step in range(60)]
    assert [row["step"] for row in server.runs[run_id(run_dir, "rl")]["rows"]] == list(range(8))


def test_online_without_a_server_is_one_line_before_anything_starts(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "server_url", lambda: "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    with pytest.raises(RuntimeError, match=r"wandb: http://127.0.0.1:9 cannot be reached: .*; wandb.mode=off"):
        LiveMirror(config(run_dir, "online"), run_dir).__enter__()


def test_rows_that_the_disk_did_not_take_are_told_again(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """wandb goes on when it cannot write; so its file is as the first end of its process leaves it here."""
    end, ended = mirror._teardown, []
    monkeypatch.setattr(mirror, "_SPACE_WAITS_S", (0.1,))

    def torn() -> None:
        end()
        if not ended:
            (file,) = wandb_records.pieces(run_dir, "rl")
            os.truncate(file, file.stat().st_size // 2)
        ended.append(True)

    monkeypatch.setattr(mirror, "_teardown", torn)
    with LiveMirror(config(run_dir), run_dir):
        train(run_dir, 0, 40)
    assert wandb_records.steps(run_dir, "rl") == list(range(40))
    assert len(ended) == 2 and mark(place(run_dir, "rl"), run_id(run_dir, "rl")).told == 39


def test_a_driver_killed_as_wandb_begins_leaves_no_row_untold(run_dir: Path) -> None:
    train(run_dir, 0, 3)
    killed = (
        "import os, sys, wandb; from pathlib import Path; from ctrl_hpc.tracking import mirror; "
        "from ctrl_hpc.config import load; run_dir = Path(sys.argv[1]); begin = mirror.begin\n"
        "def torn(*of): begin(*of); os._exit(9)\n"
        "mirror.begin = torn\n"
        "mirror.Mirror(load(sys.argv[2], [f'run_dir={run_dir}', 'wandb.mode=offline']), run_dir, online=False).look()"
    )
    words = [sys.executable, "-c", killed, str(run_dir), str(ROOT / "configs" / "tiny_faults.yaml")]
    assert subprocess.run(words, check=False).returncode == 9
    assert len(wandb_records.pieces(run_dir, "rl")) == 1  # begun, and told nothing
    with mirrored(config(run_dir), run_dir):
        pass
    assert wandb_records.steps(run_dir, "rl") == [0, 1, 2]
