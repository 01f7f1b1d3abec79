"""The jobs of a run as written in its directory, for later drivers, ``status`` and ``stop``."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ctrl_hpc import jsonl
from ctrl_hpc.cluster import processes
from ctrl_hpc.cluster.registry import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """A job as written in the run directory."""

    role: str
    element: int
    engine: str
    job_id: str
    machine: str
    started: int | None
    """Local: as :func:`ctrl_hpc.cluster.processes.started` tells it of the controller."""
    log: str
    tasks: int
    gpus: Sequence[int] = ()
    """Local: the GPUs of its machine that it sees, by number."""


def folder_of(run_dir: str | Path) -> Path:
    """Where the jobs of a run are written down."""
    return Path(run_dir) / "services"


def recorded(run_dir: str | Path) -> list[JobRecord]:
    """The jobs the last driver had."""
    files = sorted(folder_of(run_dir).glob("jobs-*.json"))
    return [JobRecord(**record) for file in files for record in json.loads(file.read_text(encoding="utf-8"))]


def end_recorded(run_dir: str | Path) -> int:
    """End what an earlier driver left behind: local process trees of this machine, and Slurm jobs; how many."""
    records = recorded(run_dir)
    here = processes.machine()
    local = [
        int(record.job_id)
        for record in records
        if record.engine == "local"
        and record.machine == here
        and processes.is_running(int(record.job_id), record.started)
    ]
    tasks = [member.pid for member in processes.tree(local) if member.pid not in local]
    for service in Registry(run_dir).entries():
        # a task outlives its controller when that was killed
        if service.role != "driver" and service.machine == here and processes.is_running(service.pid, service.started):
            tasks.append(service.pid)
    if local or tasks:
        processes.end([*local, *tasks], first=tasks)
    slurm = [record.job_id for record in records if record.engine == "slurm"]
    if slurm and shutil.which("scancel"):
        subprocess.run(["scancel", "--quiet", *slurm], capture_output=True, timeout=60, check=False)
    for file in folder_of(run_dir).glob("jobs-*.json"):
        file.unlink(missing_ok=True)
    return len(local) + len(slurm)


def write(file: Path, records: Sequence[JobRecord]) -> None:
    """Replace a driver's records."""
    jsonl.write_text(file, json.dumps([asdict(record) for record in records], indent=1))
