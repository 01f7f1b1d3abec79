"""What Slurm says of a driver's jobs: squeue for those in the queue, sacct for why others ended, each asked seldom."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence

WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "CONFIGURING")
"""States of a job that does not run yet, or not yet again."""
SQUEUE_EVERY_S = 2.0
SACCT_EVERY_S = 10.0
_LEAVE_S = 6.0
"""Longest wait for jobs that leave by themselves."""
_CANCEL_WAIT_S = 30.0
"""Longest wait for cancelled jobs to be gone."""
DEFAULT_MAX_ARRAY = 1001
"""Slurm's own MaxArraySize, where scontrol does not tell."""
_IDS_A_CALL = 500
_NO_REASON = ("RUNNING", "PENDING", "COMPLETING", "COMPLETED", "REQUEUED")
_TIMEOUT_S = 60


class SlurmQueue:
    """One listing for all jobs, at most one squeue in ``SQUEUE_EVERY_S`` and one sacct in ``SACCT_EVERY_S``.

    Any number of threads may ask.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._listed: tuple[float, dict[str, str]] = (-1.0, {})
        self._missed: dict[str, int] = {}
        self._watched: set[str] = set()
        self._accounted: tuple[float, dict[str, str]] = (-1.0, {})
        self._max_array: int | None = None

    def state(self, job_id: str) -> str | None:
        """The state of a job, or array element, in the queue; None when it is not listed."""
        with self._lock:
            self._watched.add(job_id)
            return self._squeue().get(job_id)

    def missed(self, job_id: str) -> int:
        """How many listings in a row a job was not in."""
        return self._missed.get(job_id, 0)

    def _squeue(self, fresh: bool = False) -> dict[str, str]:
        with self._lock:
            when, states = self._listed
            if not fresh and time.monotonic() - when < SQUEUE_EVERY_S:
                return states
            answer = _run("squeue", "--me", "--noheader", "--array", "--format=%i|%T")
            if answer is not None:
                states = dict(line.split("|", 1) for line in answer.split())
                for job_id in self._watched:
                    self._missed[job_id] = 0 if job_id in states else self._missed.get(job_id, 0) + 1
            self._listed = (time.monotonic(), states)
            return states

    def reason(self, job_id: str) -> str:
        """``"NODE_FAIL: "``, ``"PREEMPTED: "`` ...: why a job has ended, for messages; empty while it runs, or unknown.

        All jobs ever asked for are asked for together. scontrol answers where there is no sacct.
        """
        with self._lock:
            self._watched.add(job_id)
            when, states = self._accounted
            if time.monotonic() - when > SACCT_EVERY_S:
                states = self._account(sorted({name.partition("_")[0] for name in self._watched}))
                self._accounted = (time.monotonic(), states)
        state = states.get(job_id, "")
        return "" if not state or state in _NO_REASON else f"{state}: "

    def _account(self, ids: Sequence[str]) -> dict[str, str]:
        answer = _run("sacct", "-X", "--noheader", "--parsable2", "--format=JobID,State", f"--jobs={','.join(ids)}")
        if answer is not None:
            rows = (line.split("|", 1) for line in answer.splitlines() if "|" in line)
            return {number: state.split()[0] for number, state in rows if state}
        out: dict[str, str] = {}
        for number in ids:
            for line in (_run("scontrol", "show", "job", number, "--oneliner") or "").splitlines():
                found = dict(re.findall(r"\b(JobId|ArrayJobId|ArrayTaskId|JobState)=(\S+)", line))
                array = f"{found['ArrayJobId']}_{found['ArrayTaskId']}" if "ArrayTaskId" in found else ""
                out[array or found.get("JobId", number)] = found.get("JobState", "")
        return out

    def largest_array(self) -> int:
        """How many elements an array may have: MaxArraySize, one more than the largest index."""
        if self._max_array is None:
            found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _run("scontrol", "show", "config") or "", re.MULTILINE)
            self._max_array = max(1, int(found.group(1))) if found else DEFAULT_MAX_ARRAY
        return self._max_array

    def await_end(self, job_ids: Sequence[str]) -> None:
        """Wait, for a while, until none of these jobs runs; those that wait for a node are not waited for."""
        deadline = time.monotonic() + _LEAVE_S
        while time.monotonic() < deadline:
            states = self._squeue(fresh=True)
            if all(states.get(job_id, "") in ("", *WAITING, "COMPLETING") for job_id in job_ids):
                return
            time.sleep(0.5)

    def cancel(self, job_ids: Sequence[str], wait: bool) -> int:
        """scancel; with ``wait`` until the allocations are given back, or a while. How many are still listed."""
        with self._lock:
            self._watched -= set(job_ids)
        for start in range(0, len(job_ids), _IDS_A_CALL):
            _run("scancel", "--quiet", *job_ids[start : start + _IDS_A_CALL])
        if not wait:
            return 0
        deadline = time.monotonic() + _CANCEL_WAIT_S
        while (left := len(set(job_ids) & set(self._squeue(fresh=True)))) and time.monotonic() < deadline:
            time.sleep(0.5)
        return left


def _run(*command: str) -> str | None:
    """What a command prints; None when it fails, is not there, or takes too long."""
    if shutil.which(command[0]) is None:
        return None
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return None
    return answer.stdout if answer.returncode == 0 else None
