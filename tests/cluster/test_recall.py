"""A driver's job is requeued when its batch shell was killed, by one of the jobs left behind; not when it was told to
end, or ended by itself."""

import dataclasses
import os
import signal
from pathlib import Path

import psutil
import pytest
from one_host_slurm import SlurmCluster

from ctrl_hpc.cluster.recall import recall
from ctrl_hpc.cluster.registry import Registry, Service

pytestmark = pytest.mark.slow


def driver_of(run_dir: Path, job: int, session: str) -> Service:
    """The entry of a driver that was a job and is gone."""
    with Registry(run_dir).register("driver", "", id="driver", job_id=str(job), session=session):
        (entry,) = Registry(run_dir).entries()
    return dataclasses.replace(entry, pid=2**22 - 1)


def batch_shell(job: int) -> psutil.Process:
    for process in psutil.process_iter(["name", "environ"]):
        environment = process.info["environ"] or {}
        if environment.get("SLURM_JOB_ID") == str(job) and process.info["name"] == "slurm_script":
            return process
    raise AssertionError(f"job {job} has no batch shell")


def start(cluster: SlurmCluster, script: str, output: Path) -> int:
    job = cluster.submit(script, "--requeue", output=output)
    cluster.wait_for("it runs", lambda: "one" in (output.read_text() if output.exists() else ""))
    return job


def test_a_killed_shell_is_requeued_once(
    slurm_cluster: SlurmCluster, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")  # as in a job of the run
    out = run_dir / "out"
    job = start(slurm_cluster, 'echo one; [ -n "$SLURM_RESTART_COUNT" ] && echo again || sleep 600', out)
    driver = driver_of(run_dir, job, "first")
    os.kill(batch_shell(job).pid, signal.SIGKILL)
    assert recall(run_dir, driver, max_requeues=10)
    assert not recall(run_dir, driver, max_requeues=10)  # the others leave it to the first
    slurm_cluster.wait_for("it runs again", lambda: "again" in out.read_text())
    assert not recall(run_dir, dataclasses.replace(driver, session="second"), max_requeues=1)


@pytest.mark.parametrize("ends", ["scancel", "by itself"])
def test_a_driver_that_was_to_end_is_not_requeued(
    ends: str, slurm_cluster: SlurmCluster, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    go = run_dir / "go"
    job = start(slurm_cluster, f"echo one; while [ ! -e {go} ]; do sleep 0.1; done; exit 1", run_dir / "out")
    if ends == "scancel":
        slurm_cluster.run("scancel", str(job))
    else:
        go.touch()
    assert not recall(run_dir, driver_of(run_dir, job, ends), max_requeues=10)
    slurm_cluster.wait_for("it has ended", lambda: slurm_cluster.call("squeue", "-h", "-j", str(job)).stdout == "")
    assert [row[0].split()[0] for row in slurm_cluster.accounted(job, "State")] in (["CANCELLED"], ["FAILED"])


def test_a_driver_that_is_no_job_is_left_alone(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    driver = driver_of(run_dir, 77, "login")
    assert not recall(run_dir, dataclasses.replace(driver, job_id="4711", pid=4711), max_requeues=10)
    monkeypatch.delenv("SLURM_JOB_ID")
    assert not recall(run_dir, driver, max_requeues=10)
