"""A store of bytes by key for any number of processes on any number of hosts, made for a shared file system.

A writer appends to two files of its own, ``NAME.dat`` with the values and ``NAME.idx`` with 32 bytes a key; nobody else
writes to them. Readers read whole index entries only, and check each value's length and checksum. So nothing depends on
locks, on renames, on memory maps or on the order in which writes reach other hosts, which NFS does not promise: what is
not there yet, or torn, is absent. A put costs two appends, and a get one read, however many entries there are.

In memory the index is a sorted array of 32 bytes a key and a small dictionary of what is new.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import struct
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    import numpy as np

KEY_BYTES = 16
"""Length of a key: a cryptographic hash cut to that."""
_ENTRY = struct.Struct("<QQQII")  # key (two halves), offset, length, checksum of key and value
OPEN_FILES = 64
"""Value files that a reader keeps open."""
SEGMENTS = 16
"""A bounded store is given up by its oldest files, of which a writer's is at most this part of the whole."""
_REFRESH_SHARE = 20
"""Looking for what others wrote takes at most one part in so many of the time, where a look is not quick."""
_QUICK_S = 0.005
_RECENT = 4096
type _Place = tuple[int, int, int, int]
"""Segment, offset, length, checksum."""


class Segments:
    """Values by key. Safe to use from several threads; raises OSError where the disk fails."""

    def __init__(self, folder: Path, *, max_bytes: int | None = None) -> None:
        """``max_bytes``: about how much the values may take before the oldest go; None: any amount."""
        self.folder, self._max_bytes = folder, max_bytes
        self._lock = threading.RLock()
        self._names: list[str] = []
        self._numbers: dict[str, int] = {}
        self._read: dict[str, int] = {}
        """Bytes of a segment's index that are known."""
        self._gone: set[int] = set()
        self._high: np.ndarray | None = None
        """First halves of the keys, sorted."""
        self._base: np.ndarray | None = None
        """Their entries ``(low, segment, offset, length, checksum)``."""
        self._recent: dict[bytes, tuple[_Place, ...]] = {}
        """All places of a key, the one that counts first: when its segment goes, another has the value."""
        self._open: OrderedDict[int, int] = OrderedDict()
        self._own: tuple[int, int, int] | None = None
        """Number, and descriptors of values and index, of the segment that this process writes."""
        self._at = self._looked_at = 0
        self._next_look = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; written values are on the disk then."""
        with self._lock:
            self._leave()
            while self._open:
                os.close(self._open.popitem()[1])

    def sync(self) -> None:
        """What was put is on the disk when this returns."""
        with self._lock:
            for descriptor in self._own[1:] if self._own is not None else ():
                os.fsync(descriptor)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):
            self.close()

    def __len__(self) -> int:
        """Entries known, those of one key by several writers each."""
        with self._lock:
            return sum(map(len, self._recent.values())) + (0 if self._base is None else len(self._base))

    def __contains__(self, key: bytes) -> bool:
        with self._lock:
            return self._found(key) is not None

    def get(self, key: bytes) -> bytes | None:
        """The value of a key; None where it is not there, not there yet, or torn."""
        with self._lock:
            for _ in range(len(self._names) + 1):
                place = self._found(key)
                if place is None:
                    return None
                segment, offset, length, checksum = place
                value = self._read_value(segment, offset, length)
                if value is not None:
                    return value if zlib.crc32(key + value) == checksum else None
            return None

    def put(self, key: bytes, value: bytes) -> None:
        """Append a value. The newest value of a key that this process wrote counts."""
        assert len(key) == KEY_BYTES, "a key has 16 bytes"
        with self._lock:
            number, values, index = self._writable()
            offset, checksum = self._at, zlib.crc32(key + value)
            try:
                _append(values, value)
                _append(index, _ENTRY.pack(*_halves(key), offset, len(value), checksum))
            except OSError:
                self._leave()  # what was written in part is never read, and nothing follows it
                raise
            self._at += len(value)
            self._read[self._names[number]] += _ENTRY.size
            others = (place for place in self._recent.get(key, ()) if place[0] != number)
            self._recent[key] = ((number, offset, len(value), checksum), *others)
            self._merge_when_large()

    def _found(self, key: bytes) -> _Place | None:
        place = self._known(key)
        if place is None and time.monotonic() >= self._next_look:
            self.refresh()
            place = self._known(key)
        return place

    def _known(self, key: bytes) -> _Place | None:
        for place in self._recent.get(key, ()):
            if place[0] not in self._gone:
                return place
        if self._high is not None and self._base is not None:
            high, low = map(self._high.dtype.type, _halves(key))
            row = int(self._high.searchsorted(high))
            while row < len(self._high) and self._high[row] == high:
                entry = self._base[row]
                if entry["low"] == low and int(entry["segment"]) not in self._gone:
                    return tuple(int(entry[name]) for name in ("segment", "offset", "length", "checksum"))  # type: ignore[return-value]
                row += 1
        return None

    def refresh(self) -> None:
        """Read what others have added to their indices; a get that finds nothing does, unless it did lately."""
        with self._lock:
            started = time.monotonic()
            self._look()
            taken = time.monotonic() - started
            self._next_look = started + taken * _REFRESH_SHARE if taken > _QUICK_S else 0.0

    def _look(self) -> None:
        sizes: dict[str, int] = {}
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as listing:
            for entry in listing:
                if entry.name.endswith(".idx"):
                    with contextlib.suppress(FileNotFoundError):
                        sizes[entry.name[:-4]] = entry.stat().st_size
        for name in self._numbers.keys() - sizes.keys():  # first: what they held may lie in others now
            self._forget(self._numbers[name])
        for name in sorted(sizes):
            known = self._read.get(name, 0)
            if sizes[name] - known >= _ENTRY.size:
                self._take_in(name, known)

    def _take_in(self, name: str, known: int) -> None:
        try:
            with open(self.folder / f"{name}.idx", "rb") as index:
                index.seek(known)
                data = index.read()
        except FileNotFoundError:
            return
        data = data[: len(data) - len(data) % _ENTRY.size]
        self._read[name] = known + len(data)
        number = self._number(name)
        if len(data) > _RECENT * _ENTRY.size:
            self._merge(data, number)
            return
        for high, low, offset, length, checksum in _ENTRY.iter_unpack(data):
            key = _joined(high, low)
            places = tuple(place for place in self._recent.get(key, ()) if place[0] not in self._gone)
            if all(place[0] != number for place in places):
                self._recent[key] = (*places, (number, offset, length, checksum))
        self._merge_when_large()

    def _number(self, name: str) -> int:
        if name not in self._numbers:
            self._numbers[name] = len(self._names)
            self._names.append(name)
        return self._numbers[name]

    def _forget(self, number: int) -> None:
        self._gone.add(number)
        if number in self._open:
            os.close(self._open.pop(number))
        if self._own is not None and self._own[0] == number:
            self._leave()

    def _merge_when_large(self) -> None:
        if len(self._recent) > _RECENT + (0 if self._base is None else len(self._base) // 8):
            self._merge(b"", 0)

    def _merge(self, data: bytes, number: int) -> None:
        """The sorted arrays anew: with what is recent, and the index entries ``data`` of a segment."""
        import numpy as np

        kinds = [("low", "<u8"), ("offset", "<u8"), ("length", "<u4"), ("checksum", "<u4")]
        added = np.frombuffer(data, dtype=[("high", "<u8"), *kinds])
        recent = [(*_halves(key), *place) for key, places in self._recent.items() for place in places]
        n_recent, n_added = len(recent), len(added)
        n_base = 0 if self._base is None else len(self._base)
        high = np.empty(n_recent + n_added + n_base, dtype="<u8")
        rest = np.empty(len(high), dtype=[*kinds, ("segment", "<u4")])
        if recent:
            columns = np.array(recent, dtype="<u8").T
            high[:n_recent] = columns[0]
            for name, column in zip(("low", "segment", "offset", "length", "checksum"), columns[1:], strict=True):
                rest[name][:n_recent] = column
        high[n_recent : n_recent + n_added] = added["high"]
        for name, _ in kinds:
            rest[name][n_recent : n_recent + n_added] = added[name]
        rest["segment"][n_recent : n_recent + n_added] = number
        if self._high is not None and self._base is not None:
            high[n_recent + n_added :], rest[n_recent + n_added :] = self._high, self._base
        order = np.argsort(high, kind="stable")
        if self._gone:
            order = order[~np.isin(rest["segment"][order], list(self._gone))]
        self._high, self._base = high[order], rest[order]
        self._recent.clear()

    def _read_value(self, segment: int, offset: int, length: int) -> bytes | None:
        """The bytes there; None where the segment has gone, which is remembered."""
        descriptor = self._open.get(segment)
        if descriptor is None:
            try:
                descriptor = os.open(self.folder / f"{self._names[segment]}.dat", os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                self._forget(segment)
                return None
            self._open[segment] = descriptor
            if len(self._open) > OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        else:
            self._open.move_to_end(segment)
        return os.pread(descriptor, length, offset)

    def _writable(self) -> tuple[int, int, int]:
        """The segment to write to; another when it is full."""
        part = None if self._max_bytes is None else self._max_bytes // SEGMENTS
        if part is not None and self._own is not None and self._at - self._looked_at > part // 4:
            self._looked_at = self._at
            self._make_room()  # also tells whether others have removed this one
        if part is not None and self._own is not None and self._at > part:
            self._leave()
        if self._own is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            if part is not None:
                self._make_room()
            host = socket.gethostname().split(".")[0]
            name = f"{time.time_ns():016x}-{host}-{os.getpid()}-{secrets.token_hex(4)}"
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
            values = os.open(self.folder / f"{name}.dat", flags, 0o666)
            index = os.open(self.folder / f"{name}.idx", flags, 0o666)
            number = self._number(name)
            self._read[name] = self._at = self._looked_at = 0
            self._own = (number, values, index)
        return self._own

    def _leave(self) -> None:
        if self._own is not None:
            for descriptor in self._own[1:]:
                with contextlib.suppress(OSError):
                    os.fsync(descriptor)
                os.close(descriptor)
            self._own = None

    def _make_room(self) -> None:
        """Remove the oldest segments until the bound is kept. Others may do the same meanwhile."""
        assert self._max_bytes is not None
        sizes: dict[str, int] = {}
        with os.scandir(self.folder) as listing:
            for entry in listing:
                if entry.name.endswith(".dat"):
                    with contextlib.suppress(FileNotFoundError):
                        sizes[entry.name[:-4]] = entry.stat().st_size
        if self._own is not None and self._names[self._own[0]] not in sizes:
            self._forget(self._own[0])
        excess = sum(sizes.values()) + self._max_bytes // SEGMENTS - self._max_bytes
        own = self._names[self._own[0]] if self._own is not None else ""
        for name in sorted(sizes):
            if excess <= 0:
                return
            if name != own:
                for kind in ("idx", "dat"):
                    (self.folder / f"{name}.{kind}").unlink(missing_ok=True)
                excess -= sizes[name]
                if name in self._numbers:
                    self._forget(self._numbers[name])


SMALL_BYTES, MANY = 16 << 20, 32
"""Segments smaller than this are put together when there are so many of them."""


def merge_small(folder: Path) -> int:
    """Put small segments together in one, in the place of the oldest, where there are many; how many were.

    For a time when nobody writes to the folder: a writer whose files go begins others, but what it appended meanwhile
    is lost. Readers find the copies. Killed in between, it leaves values twice. Raises OSError where the disk fails.
    """
    try:
        sizes = {file.stem: file.stat().st_size for file in folder.glob("*.dat")}
    except FileNotFoundError:
        return 0
    small = sorted(name for name, size in sizes.items() if size < SMALL_BYTES)
    if len(small) < MANY:
        return 0
    target = f"{small[0].partition('-')[0]}-merged-{os.getpid()}-{secrets.token_hex(4)}"
    at, seen = 0, set[bytes]()
    with open(folder / f"{target}.dat", "xb") as values, open(folder / f"{target}.idx", "xb") as index:
        for name in reversed(small):  # of a key that several wrote, the newest value
            for key, value in _whole_entries(folder, name):
                if key not in seen:
                    seen.add(key)
                    values.write(value)
                    index.write(_ENTRY.pack(*_halves(key), at, len(value), zlib.crc32(key + value)))
                    at += len(value)
        for file in (values, index):
            file.flush()
            os.fsync(file.fileno())
    for name in small:
        for kind in ("idx", "dat"):
            (folder / f"{name}.{kind}").unlink(missing_ok=True)
    return len(small)


def _whole_entries(folder: Path, name: str) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a segment, the last first, that are there in full."""
    try:
        index, values = (folder / f"{name}.idx").read_bytes(), (folder / f"{name}.dat").read_bytes()
    except FileNotFoundError:
        return
    entries = list(_ENTRY.iter_unpack(index[: len(index) - len(index) % _ENTRY.size]))
    for high, low, offset, length, checksum in reversed(entries):
        key, value = _joined(high, low), values[offset : offset + length]
        if zlib.crc32(key + value) == checksum:
            yield key, value


def _halves(key: bytes) -> tuple[int, int]:
    return int.from_bytes(key[:8], "big"), int.from_bytes(key[8:], "big")


def _joined(high: int, low: int) -> bytes:
    return high.to_bytes(8, "big") + low.to_bytes(8, "big")


def _append(descriptor: int, data: bytes) -> None:
    if os.write(descriptor, data) != len(data):
        raise OSError(28, "no space left for an entry")
