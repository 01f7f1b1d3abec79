"""Who serves a run, and where: a file a service in the run directory, whose time is its heartbeat.

The run directory lies on a file system that all nodes share. A reader takes a service for dead when its file's time has
not changed for ``dead_after_s`` (by the reader's own clock, so that clocks may differ), or, on the same machine, at
once when its process is gone. A heartbeat needs no space, so that a full disk stops none; while a disk does not
answer, nobody is silent.

Who asks the services reads one file, in which the driver says who is alive, whatever their number; the services' own
files only where no driver keeps that one up.

A process whose entry another process has taken over leaves at once: Slurm starts a job again when its node is lost,
and what was taken for lost may still run.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from ctrl_hpc import jsonl
from ctrl_hpc.cluster import processes
from ctrl_hpc.service import access

_SUPERSEDED = 76
"""Exit code of a process whose entry another one has taken over."""
_CACHE_S = 0.2
_MOST_CHARACTERS = 1 << 16
_INDEX = "alive.json"
_INDEX_S = 6.0
"""The driver's list of the living is believed for so long after it was renewed, which is done about once a second."""
_MOST_INDEX_CHARACTERS = 1 << 26
_LOOK_S = 2.0
"""What a look takes at most; a longer one waited for the disk, as the heartbeats did, and is no silence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One registered process of a run."""

    role: str
    id: str
    url: str
    machine: str
    host: str
    pid: int
    started: int | None
    """As :func:`ctrl_hpc.cluster.processes.started` tells it."""
    job_id: str
    log: str
    session: str
    """The driver that started it."""
    beat: float = 0.0
    """Unix time of the last heartbeat: the time of its file."""


def folder_of(run_dir: str | Path) -> Path:
    """Where the services of a run register."""
    return Path(run_dir) / "services"


class Registration:
    """A service's entry, kept fresh by a thread until ``close``; a context manager.

    The heart beats as long as ``healthy`` says so, and stops this process when another one has taken the entry over.
    """

    def __init__(
        self, file: Path, service: Service, heartbeat_s: float, healthy: Callable[[], bool] | None = None
    ) -> None:
        self._file, self._service, self._heartbeat_s = file, service, heartbeat_s
        self._healthy = healthy
        self._closed = threading.Event()
        _write(file, service)
        self._thread = threading.Thread(target=self._beat, name=f"heartbeat-{service.role}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Withdraw the entry."""
        self._closed.set()
        self._thread.join()
        if not self._superseded():
            self._file.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _beat(self) -> None:
        while not self._closed.wait(self._heartbeat_s):
            if self._superseded():
                print(f"{self._service.role} {self._service.id}: started again elsewhere, leaving", flush=True)
                os._exit(_SUPERSEDED)
            if self._healthy is not None and not self._healthy():
                continue
            with contextlib.suppress(OSError):  # an absent disk: the next heartbeat tries again
                try:
                    os.utime(self._file)
                except FileNotFoundError:  # removed by one that took this service for lost
                    _write(self._file, self._service)

    def _superseded(self) -> bool:
        entry = read_entry(self._file)
        own = self._service
        return entry is not None and (entry.machine, entry.pid, entry.started) != (own.machine, own.pid, own.started)


class _Silences:
    """How long services have been silent, by this process's clock; what the disk takes to answer is no silence."""

    def __init__(self) -> None:
        self._heard: dict[Path, tuple[float, float]] = {}

    def of(self, file: Path, beat: float, age_s: float) -> float:
        """Seconds since an entry's heartbeat changed; ``age_s``: what is taken for it at first sight."""
        now = time.monotonic()
        last, since = self._heard.get(file, (beat, now - age_s))
        if last != beat:
            since = now
        self._heard[file] = (beat, since)
        return now - since

    def excuse(self, waited_s: float) -> None:
        """A look took so long."""
        if waited_s > _LOOK_S:
            self._heard = {file: (beat, since + waited_s) for file, (beat, since) in self._heard.items()}


class Registry:
    """Reads and writes the services of one run."""

    def __init__(self, run_dir: str | Path, *, heartbeat_s: float = 5.0, dead_after_s: float = 30.0) -> None:
        self.folder = folder_of(run_dir)
        self._heartbeat_s, self._dead_after_s = heartbeat_s, dead_after_s
        self._silences = _Silences()
        self._entries: dict[Path, Service] = {}
        self._cache: dict[str, tuple[float, list[Service]]] = {}
        self._index: tuple[float, list[Service]] = (0.0, [])
        """Time and content of the list of the living, as it was read last."""
        self._written = ""
        self._lock = threading.Lock()

    def register(
        self,
        role: str,
        url: str,
        *,
        id: str,
        host: str = "",
        job_id: str = "",
        log: str = "",
        session: str = "",
        healthy: Callable[[], bool] | None = None,
    ) -> Registration:
        """Announce this process under a role; ids are unique within it. The heart beats while it is ``healthy``."""
        pid = os.getpid()
        service = Service(
            role=role,
            id=id,
            url=url,
            machine=processes.machine(),
            host=host or processes.machine().partition("/")[0],
            pid=pid,
            started=processes.started(pid),
            job_id=job_id or str(pid),
            log=log,
            session=session,
        )
        return Registration(self.folder / role / f"{id}.json", service, self._heartbeat_s, healthy)

    def endpoints(self, role: str) -> list[str]:
        """URLs of the living services of a role, in a stable order: by the driver's list, where it is kept up."""
        with self._lock:
            listed = self._listed()
        found = self.services(role) if listed is None else [service for service in listed if service.role == role]
        return [service.url for service in found if service.url]

    def write_list(self, living: Sequence[Service]) -> None:
        """Tell all who ask ``endpoints`` who is alive; to be renewed all the time. One process of a run does it."""
        text = json.dumps([{name: value for name, value in asdict(item).items() if name != "beat"} for item in living])
        file = self.folder / _INDEX
        if text == self._written:
            with contextlib.suppress(FileNotFoundError):
                os.utime(file)
                return
        jsonl.write_text(file, text)
        self._written = text

    def remove_list(self) -> None:
        """Nobody keeps the list up from now on."""
        (self.folder / _INDEX).unlink(missing_ok=True)

    def _listed(self) -> list[Service] | None:
        """The services that the driver says are alive; None where no driver says so now."""
        file, began = self.folder / _INDEX, time.monotonic()
        found = _read_json(file, _MOST_INDEX_CHARACTERS, self._index[0])
        self._silences.excuse(time.monotonic() - began)
        if found is None:
            return None
        data, beat = found
        if beat != self._index[0]:
            if not isinstance(data, list):
                return None
            self._index = (beat, [service for item in data if (service := _service(item, beat)) is not None])
        if self._silences.of(file, beat, abs(time.time() - beat)) > _INDEX_S:
            return None
        return [service for service in self._index[1] if not _is_gone(service)]

    def services(self, role: str = "*") -> list[Service]:
        """Every service that is alive, of one role or of all."""
        with self._lock:
            when, cached = self._cache.get(role, (-1.0, []))
            if time.monotonic() - when < _CACHE_S:
                return cached
            alive = [service for file, service in self._read(role) if self._is_alive(file, service)]
            self._cache[role] = (time.monotonic(), alive)
            return alive

    def census(self, role: str = "*") -> tuple[list[Service], list[Service]]:
        """The living and the silent, by one reading: none that registers meanwhile is among the silent."""
        with self._lock:
            read = self._read(role)
            alive = {file for file, service in read if self._is_alive(file, service)}
        living = [service for file, service in read if file in alive]
        return living, [service for file, service in read if file not in alive]

    def entries(self) -> list[Service]:
        """Every entry there is, dead ones too."""
        return [service for _, service in self._read()]

    def remove(self, keep: Callable[[Service], bool]) -> None:
        """Remove the entries that are not to be kept."""
        for file, service in self._read():
            if not keep(service):
                file.unlink(missing_ok=True)
        self._cache.clear()

    def _read(self, role: str = "*") -> list[tuple[Path, Service]]:
        began, out = time.monotonic(), {}
        for file in sorted(self.folder.glob(f"{role}/*.json")):
            service = read_entry(file, self._entries.get(file))
            if service is not None:
                out[file] = service
        self._silences.excuse(time.monotonic() - began)
        self._entries |= out
        return list(out.items())

    def _is_alive(self, file: Path, service: Service) -> bool:
        if _is_gone(service):
            return False
        # first sight: trust the clocks once, but only for how old the beat is
        age_s = max(0.0, time.time() - service.beat)
        return self._silences.of(file, service.beat, age_s) < self._dead_after_s


class DriverWatch:
    """A job's view of the driver that started it."""

    def __init__(self, run_dir: str | Path, session: str, dead_after_s: float) -> None:
        self._file = folder_of(run_dir) / "driver" / "driver.json"
        self._session, self._dead_after_s = session, dead_after_s
        self._silences, self._beat = _Silences(), 0.0
        self._silences.of(self._file, self._beat, 0.0)
        self._looked = time.monotonic()

    def alive(self) -> bool:
        """False once the driver is gone, silent for too long, or another driver has taken the run over."""
        driver = read_entry(self._file)
        now = time.monotonic()
        self._silences.excuse(now - self._looked)
        self._looked = now
        if driver is not None:
            if driver.session != self._session:
                return False
            if _is_gone(driver):
                return False
            self._beat = driver.beat
        return self._silences.of(self._file, self._beat, 0.0) < self._dead_after_s


def new_session() -> str:
    """A name for a driver's start."""
    return uuid.uuid4().hex[:12]


def read_entry(file: Path, known: Service | None = None) -> Service | None:
    """An entry, ``known`` where its time is the same; None when it is gone, is no entry (as while it is replaced on a
    file system without atomic renames), or another user wrote it."""
    found = _read_json(file, _MOST_CHARACTERS, None if known is None else known.beat)
    if found is None or (known is not None and found[1] == known.beat):
        return None if found is None else known
    return _service(*found)


def _read_json(file: Path, most: int, known: float | None) -> tuple[Any, float] | None:
    """What a file holds, None where its time is ``known`` already, and its time; None when it cannot be believed."""
    try:
        # opened, and so asked anew of a file system that caches times
        with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), encoding="utf-8") as text:
            info = os.fstat(text.fileno())
            beat = info.st_mtime_ns / 1e9
            if known == beat:
                return None, beat
            if not (stat.S_ISREG(info.st_mode) and access.is_ours(info)):
                return None
            return json.loads(text.read(most)), beat
    except (OSError, ValueError, RecursionError):
        return None


def _is_gone(service: Service) -> bool:
    """Whether a service's process has ended, as far as this machine knows."""
    return service.machine == processes.machine() and not processes.is_running(service.pid, service.started)


def _service(data: Any, beat: float) -> Service | None:
    if not isinstance(data, dict):
        return None
    values: dict[str, Any] = {field.name: data.get(field.name) for field in fields(Service)} | {"beat": beat}
    numbers = type(values["pid"]) is int and type(values["started"]) in (int, type(None))
    texts = all(type(values[field.name]) is str for field in fields(Service) if field.type == "str")
    return Service(**values) if numbers and texts else None


def _write(file: Path, service: Service) -> None:
    jsonl.write_text(file, json.dumps(asdict(service)))
