"""Arrays of many elements on a real Slurm: one submission, few questions, and what is larger than Slurm allows."""

from __future__ import annotations

import dataclasses
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from ctrl_hpc.cluster import slurm
from ctrl_hpc.cluster.jobs import Job, Jobs
from ctrl_hpc.config import Config, load

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("slurm_conf")]
ROOT = Path(__file__).parents[2]
COMMANDS = ("sbatch", "squeue", "sacct", "scontrol", "scancel")


@pytest.fixture
def on_slurm(make_config: Callable[..., Config]) -> Config:
    launch = load(ROOT / "configs" / "tiny_ci.yaml", ["cluster=testcluster"]).launch
    executor = dataclasses.replace(launch.executor, cpus=1)
    return make_config(launch=dataclasses.replace(launch, executor=executor))


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Counter[str]]:
    """How often each of Slurm's commands was called by this process."""
    folder, log = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    log.touch()
    for name in COMMANDS:
        script = folder / name
        script.write_text(f'#!/bin/sh\necho {name} >> {log}\nexec {shutil.which(name)} "$@"\n')
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return lambda: Counter(log.read_text().split())


def follow(jobs: Jobs, array: list[Job], seconds: float) -> float:
    """Ask for the state of every element until all have ended; how long that took."""
    began = time.monotonic()
    while any(jobs.state(job) != "ended" for job in array):
        assert time.monotonic() - began < seconds, [jobs.state(job) for job in array]
        time.sleep(0.2)
    return time.monotonic() - began


def test_256_elements_are_one_submission_and_one_question_at_a_time(
    on_slurm: Config, run_dir: Path, calls: Callable[[], Counter[str]]
) -> None:
    jobs = Jobs(on_slurm, run_dir, "test")
    array = jobs.submit("executor", divmod, [(number, 7) for number in range(256)], on_slurm.launch.executor)
    assert {job.id for job in array} == {f"{array[0].id.partition('_')[0]}_{number}" for number in range(256)}
    took = follow(jobs, array, 400)
    assert [job.result() for job in array] == [("success", divmod(number, 7)) for number in range(256)]
    assert all(jobs.reason(job) == "" for job in array)
    counted = calls()
    assert counted["sbatch"] == 1 and counted["sacct"] <= 1 + took / slurm.SACCT_EVERY_S
    assert counted["squeue"] <= 1 + took / slurm.SQUEUE_EVERY_S
    jobs.end(array)


def test_an_array_larger_than_slurm_allows_is_several(
    on_slurm: Config, run_dir: Path, calls: Callable[[], Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = Jobs(on_slurm, run_dir, "test")
    assert jobs._slurm.largest_array() == slurm.DEFAULT_MAX_ARRAY  # what scontrol tells of the test cluster
    monkeypatch.setattr(jobs._slurm, "largest_array", lambda: 2)
    array = jobs.submit("executor", divmod, [(number, 2) for number in range(5)], on_slurm.launch.executor)
    assert [job.element for job in array] == [0, 1, 2, 3, 4]
    assert calls()["sbatch"] == 3 and len({job.id for job in array}) == 5
    follow(jobs, array, 120)
    assert [job.result() for job in array] == [("success", divmod(number, 2)) for number in range(5)]
    jobs.end(array)


@pytest.mark.parametrize("without", [(), ("sacct",)])
def test_why_an_element_ended_is_told_without_sacct_too(
    without: tuple[str, ...], on_slurm: Config, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "some").mkdir()
    for name in set(COMMANDS) - set(without):
        (tmp_path / "some" / name).symlink_to(str(shutil.which(name)))
    (tmp_path / "some" / "srun").symlink_to(str(shutil.which("srun")))
    monkeypatch.setenv("PATH", f"{tmp_path / 'some'}:/bin" if not without else f"{tmp_path / 'some'}")
    jobs = Jobs(on_slurm, run_dir, "test")
    array = jobs.submit("executor", os._exit, [(3,), (0,)], on_slurm.launch.executor)
    follow(jobs, array, 120)
    deadline = time.monotonic() + 60
    while jobs.reason(array[0]) != "FAILED: ":  # accounting may lag
        assert time.monotonic() < deadline
        time.sleep(0.5)
    jobs.end(array)
