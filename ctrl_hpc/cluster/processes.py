"""Processes on this machine: who is who across restarts, and ending a whole tree of them."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import time
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import psutil

INTERRUPTED = 75
"""Exit code of a process that was told to stop (EX_TEMPFAIL)."""
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15


@cache
def machine() -> str:
    """Names the host, its boot and its process namespace: process ids mean the same wherever this is equal."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = namespace = ""
    return f"{socket.gethostname()}/{boot}/{namespace}"


def started(pid: int) -> int | None:
    """When a process was started, in clock ticks since the machine was; None when it is gone.

    With the id it tells a process from a later one, however the system's clock is set meanwhile (proc_pid_stat(5)).
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()
    except OSError:
        return None
    return None if state in b"ZX" else int(fields[18])


def is_running(pid: int, start: int | None) -> bool:
    """Whether the process with this id and start time still runs."""
    now = started(pid)
    return now is not None and start in (None, now)


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Have the kernel send this process a signal when its parent ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)


def name_this(name: str) -> None:
    """Have the kernel, and so ``ps``, call this process by a name of at most 15 bytes."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def tree(pids: Iterable[int]) -> list[psutil.Process]:
    """These processes and all of their descendants."""
    out: dict[int, psutil.Process] = {}
    for pid in pids:
        try:
            process = psutil.Process(pid)
            for member in (process, *process.children(recursive=True)):
                out[member.pid] = member
        except psutil.NoSuchProcess:
            continue
    return list(out.values())


def end(pids: Sequence[int], *, first: Sequence[int] = (), grace_s: float = 5.0) -> None:
    """End these processes and their descendants: SIGTERM to ``first`` (all when empty), after the grace SIGKILL."""
    members = tree([*pids, *first])
    for member in members:
        if not first or member.pid in first:
            _send(member, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    waiting = members
    while waiting and time.monotonic() < deadline:
        _, waiting = psutil.wait_procs(waiting, timeout=0.05)
        waiting = [member for member in waiting if _alive(member)]
    for member in {*members, *tree(pids)}:
        if _alive(member):
            _send(member, signal.SIGKILL)
    psutil.wait_procs(members, timeout=grace_s)


def _alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _send(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
