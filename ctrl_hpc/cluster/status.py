"""What a run is doing: its jobs, services, steps and logs, read from the run directory; and ending it."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ctrl_hpc.cluster import processes
from ctrl_hpc.cluster.job_records import end_recorded, recorded
from ctrl_hpc.cluster.registry import Registry, folder_of
from ctrl_hpc.config.stages import STAGES
from ctrl_hpc.run import journal


def jobs(run_dir: str | Path) -> list[dict[str, Any]]:
    """A row for the driver and for each job of the run: role, element, state, host, job id, process id, URL, log.

    ``state`` is ``serving`` (registered and alive), ``starting`` (submitted, not registered), or ``dead``.
    """
    registry = Registry(run_dir)
    alive = {(service.role, service.job_id): service for service in registry.services()}
    rows: list[dict[str, Any]] = []
    for (role, job_id), service in sorted(alive.items()):
        rows.append(
            {
                "role": role,
                "state": "serving" if service.url else "running",
                "host": service.host,
                "job_id": job_id,
                "pid": service.pid,
                "url": service.url,
                "log": service.log,
                "since_beat_s": round(max(0.0, time.time() - service.beat), 1),
            }
        )
    for record in recorded(run_dir):
        if (record.role, record.job_id) in alive:
            continue
        here = record.engine == "local" and record.machine == processes.machine()
        dead = here and not processes.is_running(int(record.job_id), record.started)
        rows.append(
            {
                "role": record.role,
                "state": "dead" if dead else "starting",
                "host": "",
                "job_id": record.job_id,
                "pid": int(record.job_id) if here else None,
                "url": "",
                "log": record.log,
                "since_beat_s": None,
            }
        )
    return rows


def status(run_dir: str | Path) -> dict[str, Any]:
    """``{"run_dir", "running", "jobs", "stages", "errors"}``; raises ValueError when this is no run directory."""
    folder = run_folder(run_dir)
    rows = jobs(folder)
    return {
        "run_dir": str(folder),
        "running": any(row["role"] == "driver" for row in rows),
        "jobs": rows,
        "stages": {stage: _stage(folder, stage) for stage in _stages(folder)},
        "errors": [] if _is_over(folder) else _last_errors(folder),
    }


def targets(run_dir: str | Path) -> list[dict[str, Any]]:
    """The services that answer, as Prometheus' ``file_sd_configs`` reads them: ``[{"targets", "labels"}]``."""
    folder = run_folder(run_dir)
    return [
        {
            "targets": [urlsplit(service.url).netloc],
            "labels": {
                "run": folder.resolve().name,
                "role": service.role,
                "element": service.id.partition("-")[0],
                "node": service.host,
            },
        }
        for service in sorted(Registry(folder).services(), key=lambda service: (service.role, service.id))
        if service.url
    ]


def logs(run_dir: str | Path, role: str | None = None) -> list[Path]:
    """The logs of a run, or of one role, oldest first; ``sft`` and ``rl`` are the trainer's.

    Raises ValueError for a role without logs, naming those with.
    """
    role = "trainer" if role in ("sft", "rl") else role
    folder = run_folder(run_dir) / "logs"
    files = sorted(folder.glob("*.log")) + sorted(folder.glob("*/*.out"))
    names = {file: file.stem if file.parent == folder else file.parent.name for file in files}
    if role is not None and role not in names.values():
        raise ValueError(f"{role}: no logs; there are: {', '.join(sorted(set(names.values()))) or 'none'}")
    chosen = [file for file in files if role is None or names[file] == role]
    return sorted(chosen, key=lambda file: file.stat().st_mtime)


def stop(run_dir: str | Path, *, grace_s: float = 30.0) -> list[str]:
    """End a run from outside: its driver, then whatever is left; returns a line for each thing that was ended."""
    folder = run_folder(run_dir)
    said = []
    for service in Registry(folder).services():
        if service.role != "driver":
            continue
        if service.machine != processes.machine():
            said.append(f"the driver runs on {service.host}: its services were cancelled, it will end by itself")
            continue
        os.kill(service.pid, signal.SIGINT)
        deadline = time.monotonic() + grace_s
        while processes.is_running(service.pid, service.started) and time.monotonic() < deadline:
            time.sleep(0.1)
        if processes.is_running(service.pid, service.started):
            os.kill(service.pid, signal.SIGKILL)
        said.append(f"driver {service.pid} ended")
    left = end_recorded(folder)
    if left:
        said.append(f"{left} jobs ended")
    Registry(folder).remove(lambda _: False)
    return said


def run_folder(run_dir: str | Path) -> Path:
    """The folder of a run; raises ValueError when it is none. ``~`` is the home folder, in quotes too."""
    folder = Path(run_dir).expanduser()
    if not (folder / "config.yaml").is_file() and not folder_of(folder).is_dir():
        raise ValueError(f"{folder}: not a run directory (it holds no config.yaml)")
    return folder


def _stages(folder: Path) -> list[str]:
    return [name for name in ("models", *STAGES) if (folder / name).is_dir()]


def _stage(folder: Path, stage: str) -> dict[str, Any]:
    done = folder / stage / "done.json"
    if done.is_file():
        return {"state": "done", **json.loads(done.read_text(encoding="utf-8"))}
    return {"state": "started", **(journal.progress(folder, stage) if stage in journal.STAGES else {})}


def _is_over(folder: Path) -> bool:
    """Whether every stage that has begun is done: errors of attempts before are of no interest any more."""
    stages = [name for name in _stages(folder) if name in STAGES]
    return bool(stages) and all((folder / name / "done.json").is_file() for name in stages)


def _last_errors(folder: Path, count: int = 5) -> list[str]:
    """The last lines of logs that look like an error, newest first."""
    out = []
    for file in reversed(logs(folder)):
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()[-200:]
        # what Slurm says of a service that its driver ended is no error
        ended = any("CANCELLED AT" in line for line in lines[-3:])
        found = [line.strip() for line in lines if ("Error" in line or "error:" in line) and "CANCELLED AT" not in line]
        found = [] if ended and all("error: *** " in line for line in found) else found
        if found:
            out.append(f"{file.parent.name}/{file.name}: {found[-1][:300]}")
        if len(out) == count:
            break
    return out
