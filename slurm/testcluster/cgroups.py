"""The cgroups Slurm makes for the jobs of a node: whether this host lets it, who is in them, and their removal."""

from __future__ import annotations

import os
import time
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


def tracking() -> str:
    """How Slurm can track the processes of a job here.

    ``cgroup`` where there is a writable freezer hierarchy (cgroup v1); else ``linuxproc``, by parent process: Slurm's
    cgroup v2 wants systemd, or a whole hierarchy delegated to it.
    """
    freezer = ROOT / "freezer"
    probe = freezer / f"testcluster_probe_{os.getpid()}"
    if not (freezer / "cgroup.procs").exists():
        return "linuxproc"
    try:
        probe.mkdir()
        probe.rmdir()
    except OSError:
        return "linuxproc"
    return "cgroup"


def folders(nodes: list[str]) -> list[Path]:
    """Top cgroups of the nodes, in every hierarchy."""
    return [folder for node in nodes for folder in ROOT.glob(f"*/slurm_{node}")]


def members(nodes: list[str]) -> set[int]:
    """Processes in the nodes' cgroups; frozen ones are thawed, so that signals reach them."""
    found: set[int] = set()
    for top in folders(nodes):
        for parent, _, files in os.walk(top):
            try:
                if "freezer.state" in files:
                    Path(parent, "freezer.state").write_text("THAWED")
                found.update(map(int, Path(parent, "cgroup.procs").read_text().split()))
            except OSError:  # Slurm removed it meanwhile; or the top of the hierarchy, which cannot freeze
                continue
    return found


def remove(nodes: list[str], timeout_s: float = 5.0) -> None:
    """Remove the nodes' empty cgroups, waiting for the last processes to be reaped.

    Raises RuntimeError when one is in use after ``timeout_s``.
    """
    end = time.monotonic() + timeout_s
    while tops := folders(nodes):
        for top in tops:
            for parent, _, _ in os.walk(top, topdown=False):
                try:
                    os.rmdir(parent)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    if time.monotonic() > end:
                        raise RuntimeError(f"{parent}: still in use ({error.strerror})") from None
        time.sleep(0.02)
