"""A driver that was killed together with its batch shell: its job is requeued by one of the jobs it has left behind.

Slurm requeues a job whose node is lost, and ``slurm/run.sbatch`` starts a killed driver again; nobody but the run's own
jobs sees that the batch shell itself was killed.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

from ctrl_hpc.cluster.registry import Service, folder_of

PATIENCE_S = 20.0
"""Slurm tells the end of a job within this time; a job that still runs then starts its driver again by itself."""
POLL_S = 0.5
KILLED = "9"
"""SIGKILL, as in ``ExitCode=0:9``: a job that was cancelled, or ended by itself, is not requeued."""


def recall(run_dir: str | Path, driver: Service, max_requeues: int) -> bool:
    """Requeue the Slurm job of a driver that is gone, if it was killed; whether this process did.

    One process of a run does it, whichever asks first; at most ``max_requeues`` starts of the job are answered so.
    """
    if "SLURM_JOB_ID" not in os.environ or driver.job_id in ("", str(driver.pid)):
        return False  # not on Slurm, or a driver that is no job
    try:
        os.close(os.open(folder_of(run_dir) / f"recalled-{driver.session}", os.O_CREAT | os.O_EXCL, 0o644))
    except OSError:  # another one does, or the disk is full: then the disk is the first thing to mend
        return False
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        facts = _facts(driver.job_id)
        if facts.get("JobState") in ("FAILED", "OUT_OF_MEMORY"):
            killed = facts["JobState"] == "OUT_OF_MEMORY" or facts.get("ExitCode", "").endswith(f":{KILLED}")
            if not killed or int(facts.get("Restarts", "0")) >= max_requeues:
                return False
            print(f"the driver's job {driver.job_id} was killed: requeueing it", flush=True)
            return subprocess.run(["scontrol", "requeue", driver.job_id], timeout=60, check=False).returncode == 0
        if facts.get("JobState") not in ("RUNNING", "COMPLETING"):
            return False
        time.sleep(POLL_S)
    return False


def _facts(job_id: str) -> dict[str, str]:
    """What Slurm knows of a job, by the names of ``scontrol show job``."""
    command = ["scontrol", "show", "job", job_id, "--oneliner"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return dict(re.findall(r"\b(JobState|ExitCode|Restarts)=(\S+)", answer.stdout))
