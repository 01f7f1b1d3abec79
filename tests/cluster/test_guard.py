"""A job that was killed together with its batch shell is requeued by its guard; one that was told to end, or ended by
itself, is not, and leaves no guard."""

import os
import signal
from pathlib import Path

import psutil
import pytest
from one_host_slurm import SlurmCluster

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
RUN = ROOT / "slurm" / "run.sbatch"


@pytest.fixture
def program(run_dir: Path) -> Path:
    """A driver that starts, waits to be told to go, and leaves as it is told; a second start ends well."""
    file = run_dir / "bin" / "ctrl-hpc"
    file.parent.mkdir()
    file.write_text(
        f'#!/bin/bash\necho driver $$ of start ${{SLURM_RESTART_COUNT:-0}}\n[ -n "$SLURM_RESTART_COUNT" ] && exit 0\n'
        f"while [ ! -e {run_dir}/go ]; do sleep 0.1; done\nexit 1\n"
    )
    file.chmod(0o755)
    return file


def start(cluster: SlurmCluster, program: Path) -> int:
    """A driver's job, when it runs and its guard waits."""
    out = program.parents[1] / "out"
    path = f"PATH={program.parent}:{os.environ['PATH']}"
    job = int(cluster.run("env", path, "sbatch", "--parsable", f"--chdir={ROOT}", f"--output={out}", str(RUN), "X"))
    cluster.wait_for("it runs", lambda: out.exists() and "of start 0" in out.read_text())
    (guard,) = queued(cluster)[1:]
    assert guard == f"ctrl-hpc-guard-{job} PENDING"
    return job


def queued(cluster: SlurmCluster) -> list[str]:
    return cluster.run("squeue", "-h", "-o", "%j %T", "--sort=i").splitlines()


def batch_shell(job: int) -> psutil.Process:
    for process in psutil.process_iter(["cmdline", "environ"]):
        of_job = (process.info["environ"] or {}).get("SLURM_JOB_ID") == str(job)
        if of_job and "slurm_script" in " ".join(process.info["cmdline"] or []):
            return process
    raise AssertionError(f"job {job} has no batch shell")


def test_a_killed_job_runs_again(slurm_cluster: SlurmCluster, program: Path) -> None:
    job = start(slurm_cluster, program)
    os.kill(batch_shell(job).pid, signal.SIGKILL)
    out = program.parents[1] / "out"
    slurm_cluster.wait_for("it runs again", lambda: "of start 1" in out.read_text())
    slurm_cluster.wait_for("nothing is left", lambda: queued(slurm_cluster) == [])
    slurm_cluster.wait_for("it ended well", lambda: slurm_cluster.accounted(job, "State")[-1] == ["COMPLETED"])


@pytest.mark.parametrize("ends", ["scancel", "by itself"])
def test_a_job_that_was_to_end_does_not(ends: str, slurm_cluster: SlurmCluster, program: Path) -> None:
    job = start(slurm_cluster, program)
    if ends == "scancel":
        slurm_cluster.run("scancel", str(job))
    else:
        (program.parents[1] / "go").touch()
    slurm_cluster.wait_for("nothing is left", lambda: queued(slurm_cluster) == [])
    assert [row[0].split()[0] for row in slurm_cluster.accounted(job, "State")] in (["CANCELLED"], ["FAILED"])
    assert "guard" not in (program.parents[1] / "out").read_text()
