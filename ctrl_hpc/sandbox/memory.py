"""Bounds on a jail's memory: a cgroup where there is one, and a watchdog that reads /proc."""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger(__name__)
PREFIX = "ctrl-hpc-"
_numbers = itertools.count()
_REMOVE_ATTEMPTS = 50


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """Where memory cgroups are made: this process's own folder, and the version's file names."""

    folder: Path
    version: int

    @property
    def limit_file(self) -> str:
        """The file that takes the limit, in bytes."""
        return "memory.limit_in_bytes" if self.version == 1 else "memory.max"

    @property
    def events_file(self) -> str:
        """The file that counts kills."""
        return "memory.oom_control" if self.version == 1 else "memory.events"

    @property
    def refusals_file(self) -> str:
        """The file that counts how often the limit was reached."""
        return "memory.failcnt" if self.version == 1 else "memory.events"

    @property
    def swap_file(self) -> str:
        """The file that bounds swap: memory and swap together in version 1, swap alone in version 2."""
        return "memory.memsw.limit_in_bytes" if self.version == 1 else "memory.swap.max"


def find(proc: Path = Path("/proc/self")) -> Hierarchy | None:
    """This process's place in the hierarchy that controls memory; None where no hierarchy does."""
    places: dict[str, str] = {}
    for line in (proc / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            places[controller] = path
    found: dict[int, Path] = {}
    for line in (proc / "mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        root, mount = left.split()[3:5]
        kind, _, options = right.split(" ", 2)
        if kind == "cgroup" and "memory" in options.split(",") and "memory" in places:
            found[1] = _place(mount, root, places["memory"])
        elif kind == "cgroup2" and "" in places:
            folder = _place(mount, root, places[""])
            if "memory" in _words(folder / "cgroup.controllers"):
                found[2] = folder
    for version, folder in sorted(found.items()):
        return Hierarchy(folder, version)
    return None


def _place(mount: str, root: str, path: str) -> Path:
    """A cgroup's folder below a mount that may show only the part of the hierarchy below ``root``."""
    relative = os.path.relpath(path, root) if path.startswith(root.rstrip("/") + "/") or path == root else path[1:]
    return Path(mount) / relative


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


class MemoryGroup:
    """One cgroup; jails' processes are put into it before they run anything untrusted."""

    def __init__(self, hierarchy: Hierarchy) -> None:
        """Make it. Raises OSError where that is not allowed."""
        if hierarchy.version == 2:
            _delegate(hierarchy.folder)
        self._hierarchy = hierarchy
        self._folder = hierarchy.folder / f"{PREFIX}{os.getpid()}-{next(_numbers)}"
        self._folder.mkdir()
        self._limit = 0
        self._counts: list[int] = []
        try:
            for name in (hierarchy.events_file, hierarchy.refusals_file):
                self._counts.append(os.open(self._folder / name, os.O_RDONLY))
        except OSError:
            self._close_counts()
            self._folder.rmdir()
            raise

    def add(self, pids: list[int]) -> None:
        """Move processes into the group."""
        for pid in pids:
            (self._folder / "cgroup.procs").write_text(str(pid))

    def members(self) -> list[int]:
        """The processes in the group."""
        return list(map(int, (self._folder / "cgroup.procs").read_text().split()))

    def limit(self, memory_bytes: int) -> None:
        """Bound the group's memory, swap included where swap is accounted."""
        if memory_bytes == self._limit:
            return
        swap = self._folder / self._hierarchy.swap_file
        if self._hierarchy.version == 2:
            _write_if_there(swap, 0)
            (self._folder / self._hierarchy.limit_file).write_text(str(memory_bytes))
        else:
            # Memory alone may never exceed memory and swap together, whichever way the limit moves.
            _write_if_there(swap, -1)
            (self._folder / self._hierarchy.limit_file).write_text(str(memory_bytes))
            _write_if_there(swap, memory_bytes)
        self._limit = memory_bytes

    def kills(self) -> int:
        """How many processes of the group were killed for its limit so far."""
        return _count(os.pread(self._counts[0], 4096, 0), b"oom_kill")

    def refusals(self) -> int:
        """How often the limit was reached so far, whether or not a process was killed for it."""
        text = os.pread(self._counts[1], 4096, 0)
        return int(text) if self._hierarchy.version == 1 else _count(text, b"max")

    def close(self) -> None:
        """Remove the group; its processes must be ending."""
        self._close_counts()
        for _ in range(_REMOVE_ATTEMPTS):
            try:
                self._folder.rmdir()
                return
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                time.sleep(0.02)  # the kernel frees the last process's cgroup a moment after it was reaped
        raise OSError(errno.EBUSY, f"{self._folder} still has processes")

    def _close_counts(self) -> None:
        for fd in self._counts:
            os.close(fd)


def _count(text: bytes, wanted: bytes) -> int:
    """A count of a cgroup's file of "name count" lines; 0 where it has none of that name."""
    words = text.split()
    return int(words[words.index(wanted) + 1]) if wanted in words else 0


def _write_if_there(path: Path, value: int) -> None:
    if path.exists():
        path.write_text(str(value))


def _delegate(folder: Path) -> None:
    """Let children of a version 2 cgroup control memory; its own processes must move to a leaf for that.

    Only this process may be in it: others are not ours to move. Raises OSError where it cannot be done.
    """
    if "memory" in _words(folder / "cgroup.subtree_control"):
        return
    own = str(os.getpid())
    if _words(folder / "cgroup.procs") not in ([], [own]):
        raise OSError(errno.EBUSY, f"{folder} has other processes")
    leaf = folder / f"{PREFIX}executor"
    leaf.mkdir(exist_ok=True)
    (leaf / "cgroup.procs").write_text(own)
    (folder / "cgroup.subtree_control").write_text("+memory")


def sweep(hierarchy: Hierarchy) -> None:
    """Remove groups that executors left behind which were killed."""
    for folder in hierarchy.folder.glob(f"{PREFIX}[0-9]*-*"):
        pid = folder.name[len(PREFIX) :].split("-")[0]
        if not Path(f"/proc/{pid}").exists():
            with contextlib.suppress(OSError):  # another executor may sweep at the same time
                folder.rmdir()


def memory_groups() -> Hierarchy | None:
    """The hierarchy, if groups can be made, limited and removed in it right now; None if not."""
    try:
        hierarchy = find()
        if hierarchy is None:
            return None
        sweep(hierarchy)
        group = MemoryGroup(hierarchy)
        try:
            group.limit(1 << 30)
        finally:
            group.close()
    except OSError:
        return None
    return hierarchy


_PERIOD_S = 0.05
_PROC = Path("/proc")
_KIB = 1024
_BUFFER_BYTES = {"pipe": 64 * _KIB, "socket": 256 * _KIB}
"""What a full pipe and a full Unix socket hold: their sizes cannot be changed in a jail."""
_MAPPING_BYTES, _MOST_MAPPINGS, _MAPS_BYTES = 320, 65530, 256 * _KIB
"""What one mapping takes, how many a process may have (vm.max_map_count), and as much of their list as is read."""


@dataclass(slots=True, eq=False)
class Watch:
    """A job being watched: whether it holds too much, and what to do then."""

    too_much: Callable[[], bool]
    end: Callable[[], None]
    exceeded: bool = False


class Watchdog:
    """A thread that looks at all watched jobs every :data:`_PERIOD_S`."""

    def __init__(self) -> None:
        self._watches: set[Watch] = set()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stop = False
        self._thread = threading.Thread(target=self._look, name="sandbox-memory", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

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
                try:
                    if not watch.exceeded and watch.too_much():
                        self._end(watch)
                except Exception:  # whatever one jail's /proc says, the others are watched on
                    log.warning("a jail's memory cannot be told", exc_info=True)
            pause.wait(_PERIOD_S)

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

    What the kernel holds for them counts too: page tables, mappings, and the buffers of their pipes and sockets as if
    full.
    Pages that they share are told apart only when the plain sum is above the limit.
    """
    pids = descendants(runner)
    kernel = sum(_field(pid, "status", ("VmPTE:",)) + _mappings(pid) for pid in pids) + _buffers(pids)
    total = kernel + sum(_field(pid, "status", ("RssAnon:", "RssShmem:")) for pid in pids)
    if total > limit_bytes and len(pids) > 1:
        shares = [_field(pid, "smaps_rollup", ("Pss:",)) for pid in pids]
        if all(shares):
            total = kernel + sum(shares)
    return total > limit_bytes


def _buffers(pids: list[int]) -> int:
    """The most that the kernel can hold, in bytes, in the pipes and sockets of these processes."""
    kinds: dict[str, int] = {}
    for pid in pids:
        folder = f"{_PROC}/{pid}/fd"
        try:
            names = os.listdir(folder)
        except OSError:  # the process ended meanwhile
            continue
        for name in names:
            with contextlib.suppress(OSError):
                place = os.readlink(f"{folder}/{name}")
                kinds[place] = _BUFFER_BYTES.get(place.partition(":")[0], 0)
    return sum(kinds.values())


def _mappings(pid: int) -> int:
    """What the kernel holds, in bytes, to know the process's mappings; of very many the most that there can be."""
    text = b""
    try:
        with (_PROC / str(pid) / "maps").open("rb", buffering=0) as file:
            while len(text) < _MAPS_BYTES and (chunk := file.read(_MAPS_BYTES)):
                text += chunk
    except OSError:
        return 0
    return (text.count(b"\n") if len(text) < _MAPS_BYTES else _MOST_MAPPINGS) * _MAPPING_BYTES


def _field(pid: int, file: str, names: tuple[str, ...]) -> int:
    """The sum of some lines of a /proc file, in bytes; 0 when the process is gone or may not be read."""
    try:
        text = (_PROC / str(pid) / file).read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * _KIB for line in text.splitlines() if line.startswith(names))
