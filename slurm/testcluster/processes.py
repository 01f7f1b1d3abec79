"""Finding and ending the processes of a test cluster: its daemons, the steps of jobs, and what jobs left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import cgroups
from settings import Settings

MARK = "CTRL_HPC_TESTCLUSTER"
"""Environment variable of the daemons; its value is the cluster's folder."""


def daemons(settings: Settings) -> dict[str, int]:
    """Running daemons by name: munged, mariadbd, slurmdbd, slurmctld, and every node's slurmd by the node's name."""
    found = {}
    for file in (settings.folder / "run").glob("*.daemon"):
        pid = int(file.read_text() or 0)
        if pid and _environment(pid).get(MARK) == settings.base:
            found[file.stem] = pid
    return found


def of_cluster(settings: Settings) -> set[int]:
    """Every process that belongs to the cluster."""
    return set(daemons(settings).values()) | of_nodes(settings, settings.node_names) | _marked(settings)


def of_nodes(settings: Settings, nodes: list[str]) -> set[int]:
    """Processes that a loss of the nodes would end: slurmd, job steps, their tasks and what those started."""
    running = daemons(settings)
    found = {running[node] for node in nodes if node in running} | cgroups.members(nodes)
    logs = {f"{settings.base}/log/{node}.log" for node in nodes}
    parents: dict[int, int] = {}
    for pid in _pids():
        parents[pid] = _parent(pid)
        if _environment(pid).get("SLURMD_NODENAME") in nodes or (_is_stepd(pid) and _holds(pid, logs)):
            found.add(pid)
    return (found | _descendants(found, parents)) - {0, 1, os.getpid()}


def end(find: Callable[[], Iterable[int]], grace_s: float = 2.0, timeout_s: float = 15.0) -> None:
    """SIGTERM to all that ``find`` returns, after ``grace_s`` SIGKILL, until it returns none.

    Raises RuntimeError when processes survive ``timeout_s``.
    """
    start, told = time.monotonic(), set[int]()
    while left := {pid for pid in find() if not _is_zombie(pid)}:
        passed = time.monotonic() - start
        if passed > timeout_s:
            raise RuntimeError(f"processes do not end: {', '.join(map(str, sorted(left)))}")
        for pid in left if passed > grace_s else left - told:
            _kill(pid, signal.SIGKILL if passed > grace_s else signal.SIGTERM)
        told |= left
        time.sleep(0.05)


def kill(pids: Iterable[int]) -> None:
    """SIGKILL, where there still is a process."""
    for pid in pids:
        _kill(pid, signal.SIGKILL)


def is_command(pid: int, *words: str) -> bool:
    """Whether the process, if there is one, has the words in its command line."""
    arguments = _read(f"/proc/{pid}/cmdline").decode(errors="replace").split("\0")
    return pid != os.getpid() and all(any(word in argument for argument in arguments) for word in words)


def _kill(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _read(path: str) -> bytes:
    """Content of a file in /proc; empty when the process is gone, or not ours to look at."""
    try:
        return Path(path).read_bytes()
    except OSError:
        return b""


def _environment(pid: int) -> dict[str, str]:
    """The environment the process was started with."""
    pairs = _read(f"/proc/{pid}/environ").decode(errors="replace").split("\0")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs)}


def _marked(settings: Settings) -> set[int]:
    return {pid for pid in _pids() if _environment(pid).get(MARK) == settings.base} - {os.getpid()}


def _parent(pid: int) -> int:
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return int(fields[1]) if fields else 0


def _is_zombie(pid: int) -> bool:
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return not fields or fields[0] in (b"Z", b"X")


def _is_stepd(pid: int) -> bool:
    """slurmstepd overwrites its environment with its title, so it is known by its program and its log."""
    return os.path.basename(_link(f"/proc/{pid}/exe").removesuffix(" (deleted)")) == "slurmstepd"


def _holds(pid: int, files: set[str]) -> bool:
    try:
        numbers = os.listdir(f"/proc/{pid}/fd")
    except OSError:
        return False
    return any(_link(f"/proc/{pid}/fd/{number}") in files for number in numbers)


def _link(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:  # gone, a kernel thread, or a process that is not ours to look at
        return ""


def _descendants(ancestors: set[int], parents: dict[int, int]) -> set[int]:
    found: set[int] = set()
    fresh = set(ancestors)
    while fresh:
        fresh = {pid for pid, parent in parents.items() if parent in fresh} - found - ancestors
        found |= fresh
    return found
