"""The trainer job on submitit's local executor, with a stand-in for the training stage."""

import dataclasses
import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ctrl_hpc.cluster import trainer
from ctrl_hpc.cluster.jobs import Job, Jobs
from ctrl_hpc.cluster.services import Services
from ctrl_hpc.config import Config

pytestmark = [pytest.mark.slow, pytest.mark.alone]  # heartbeats may be missing for seconds only


@pytest.fixture(autouse=True)
def stub_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trainer.TRAIN, "sft", "stub_train")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("WANDB_RUN_ID", "of-the-driver")


def behave(run_dir: Path, **wishes: object) -> None:
    (run_dir / "behaviour.json").write_text(json.dumps(wishes))


def test_every_rank_gets_its_place(make_config: Callable[..., Config], run_dir: Path) -> None:
    behave(run_dir)
    with Services(make_config(), run_dir):
        trainer.run_trainer(make_config(), run_dir, "sft")
    seen = [json.loads((run_dir / f"rank-{rank}-of-2").read_text()) for rank in range(2)]
    assert [item["LOCAL_RANK"] for item in seen] == ["0", "1"]
    assert {item["MASTER_ADDR"] for item in seen} == {"127.0.0.1"}
    assert len({item["MASTER_PORT"] for item in seen}) == 1 and int(seen[0]["MASTER_PORT"]) > 1024
    assert {item["WANDB_RUN_ID"] for item in seen} == {None}


def test_a_failing_rank_ends_the_job_with_its_error(make_config: Callable[..., Config], run_dir: Path) -> None:
    behave(run_dir, fail_rank=1)
    with Services(make_config(), run_dir), pytest.raises(RuntimeError) as caught:
        trainer.run_trainer(make_config(), run_dir, "sft")
    message = str(caught.value)
    assert message.startswith("sft: rank 1 failed: ValueError: the data set is empty (log: ")
    assert "the data set is empty" in Path(message.partition("(log: ")[2].rstrip(")")).read_text()


def test_a_killed_rank_is_a_new_start_from_the_checkpoint(
    make_config: Callable[..., Config], run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    behave(run_dir, kill_rank_once=1)
    with Services(make_config(), run_dir):
        trainer.run_trainer(make_config(), run_dir, "sft")
    assert (run_dir / "killed-once").exists()
    said = " ".join(capfd.readouterr().err.split())
    assert re.search(
        r"sft: the job lost a process \(no (result|heartbeat) of rank (0, )?1\); continuing from the last checkpoint",
        said,
    )


def test_a_rank_that_is_told_to_stop_while_the_others_wait_for_it_is_a_new_start(
    make_config: Callable[..., Config], run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    behave(run_dir, stop_main_once=True)
    with Services(make_config(), run_dir):
        trainer.run_trainer(make_config(), run_dir, "sft")
    said = " ".join(capfd.readouterr().err.split())
    assert "no result of rank 0); continuing from the last checkpoint" in said


def test_results_that_come_with_the_end_of_the_job_are_a_success(
    make_config: Callable[..., Config], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is seen to have ended after a look at the results that came too early."""
    behave(run_dir)
    ended_late: list[str] = []

    def state(_: Jobs, job: Job) -> str:
        deadline = time.monotonic() + 120.0
        while any(job.result(task) is None for task in range(job.tasks)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        ended_late.append(job.id)
        return "ended"

    monkeypatch.setattr(Jobs, "state", state)
    with Services(make_config(), run_dir):
        trainer.run_trainer(make_config(), run_dir, "sft")
    assert len(set(ended_late)) == 1


def test_a_rank_that_hangs_is_a_new_start(
    make_config: Callable[..., Config], run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    behave(run_dir, freeze_rank_once=1)
    config = make_config()
    config = dataclasses.replace(config, launch=dataclasses.replace(config.launch, dead_after_s=3.0))
    with Services(config, run_dir):
        trainer.run_trainer(config, run_dir, "sft")
    assert "sft: the job lost a process (no heartbeat of rank 1)" in " ".join(capfd.readouterr().err.split())


def test_interrupting_the_driver_ends_the_ranks(make_config: Callable[..., Config], run_dir: Path) -> None:
    behave(run_dir, hang=True)

    class Stop(Exception):
        pass

    def progress(*_: object) -> tuple[int, int, str]:
        if len(list(run_dir.glob("rank-*"))) == 2:
            raise Stop
        return 0, 0, ""

    with pytest.MonkeyPatch.context() as patch, Services(make_config(), run_dir), pytest.raises(Stop):
        patch.setattr(trainer, "_progress", progress)
        trainer.run_trainer(make_config(), run_dir, "sft")


def test_a_trainer_needs_a_driver(make_config: Callable[..., Config], run_dir: Path) -> None:
    with pytest.raises(ValueError, match="enter Services"):
        trainer.run_trainer(make_config(), run_dir, "sft")


def test_a_silent_trainer_is_reported_with_its_log(
    make_config: Callable[..., Config],
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    behave(run_dir, hang=True)
    monkeypatch.setattr(trainer, "STUCK_S", 0.5)
    told = threading.Event()
    show = trainer.console.print

    def listen(*words: object) -> None:
        show(*words)
        told.set()

    monkeypatch.setattr(trainer.console, "print", listen)

    class Stop(Exception):
        pass

    before = trainer._progress

    def progress(folder: Path, stage: trainer.Stage) -> tuple[int, int, str]:
        if told.is_set():
            raise Stop
        return before(folder, stage)

    monkeypatch.setattr(trainer, "_progress", progress)
    began = time.monotonic()
    with Services(make_config(), run_dir), pytest.raises(Stop):
        trainer.run_trainer(make_config(), run_dir, "sft")
    assert time.monotonic() - began < 60
    said = capfd.readouterr().err
    assert "sft: no progress for 0 s (job " in said and "/logs/trainer/" in said.replace("\n", "")
