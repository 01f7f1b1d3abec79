"""Ends a job whose processes together hold too much memory.

Where a cgroup bounds them, the kernel has then killed one of them already, and the rest are ended here. Elsewhere what
they hold is sampled from /proc: between two samples they can grow by what their address-space limits allow.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PERIOD_S = 0.05
_PROC = Path("/proc")
_KIB = 1024


@dataclass(slots=True, eq=False)
class Watch:
    """A job being watched: whether it holds too much, and what to do then."""

    too_much: Callable[[], bool]
    end: Callable[[], None]
    exceeded: bool = False


class Watchdog:
    """A thread that looks at all watched jobs every :data:`PERIOD_S`."""

    def __init__(self) -> None:
        self._watches: set[Watch] = set()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stop = False
        self._thread = threading.Thread(target=self._look, name="sandbox-memory", daemon=True)
        self._thread.start()

    def add(self, watch: Watch) -> None:
        """Begin to watch."""
        with self._lock:
            self._watches.add(watch)
            self._wake.set()

    def remove(self, watch: Watch) -> None:
        """End a watch."""
        with self._lock:
            self._watches.discard(watch)
            if not self._watches:
                self._wake.clear()

    def close(self) -> None:
        """End the thread."""
        with self._lock:
            self._stop = True
            self._wake.set()
        self._thread.join()

    def _look(self) -> None:
        pause = threading.Event()
        while self._wake.wait() and not self._stop:
            with self._lock:
                watches = list(self._watches)
            for watch in watches:
                if not watch.exceeded and watch.too_much():
                    self._end(watch)
            pause.wait(PERIOD_S)

    def _end(self, watch: Watch) -> None:
        with self._lock:
            if watch in self._watches:  # else what was seen may be the next job of the same jail
                watch.exceeded = True
                watch.end()


def descendants(pid: int) -> list[int]:
    """The process and all below it, as far as they still exist."""
    out, todo = [], [pid]
    while todo:
        current = todo.pop()
        out.append(current)
        for children in (_PROC / str(current) / "task").glob("*/children"):
            try:
                todo.extend(map(int, children.read_text().split()))
            except (OSError, ValueError):  # the process ended meanwhile
                continue
    return out


def hold_more(runner: int, limit_bytes: int) -> bool:
    """Whether the processes of the jail of that runner (a pid on the host) together hold more than so many bytes.

    Pages that they share are told apart only when the plain sum is above the limit.
    """
    pids = descendants(runner)
    total = sum(_field(pid, "status", ("RssAnon:", "RssShmem:")) for pid in pids)
    if total > limit_bytes and len(pids) > 1:
        shares = [_field(pid, "smaps_rollup", ("Pss:",)) for pid in pids]
        if all(shares):
            total = sum(shares)
    return total > limit_bytes


def _field(pid: int, file: str, names: tuple[str, ...]) -> int:
    """The sum of some lines of a /proc file, in bytes; 0 when the process is gone or may not be read."""
    try:
        text = (_PROC / str(pid) / file).read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * _KIB for line in text.splitlines() if line.startswith(names))
