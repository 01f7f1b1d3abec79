"""Tests by the hash of their content, which lie once on the disk whatever names them: problems, records and requests.

The tests of a problem are one entry, compressed, of a :class:`~ctrl_hpc.store.segments.Segments` store, written while
the data stream in. What is read last stays in memory.
"""

from __future__ import annotations

import hashlib
import threading
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Self

from ctrl_hpc import jsonl
from ctrl_hpc.records import Problem, StoredTests, TestCase
from ctrl_hpc.store.segments import KEY_BYTES, Segments

_MEMORY_BYTES = 64 << 20
"""JSON of tests that stays in memory, where it is decoded as well."""


class TestStore:
    """Tests by hash, in folders that any number of processes share. Safe to use from several threads.

    They are looked for in the folders in order; what a later one has is copied to the first, which may be on the node's
    own disk. Without a folder they are kept in memory.
    """

    __test__ = False  # not a pytest class

    def __init__(self, *folders: Path, max_bytes: int | None = None, memory_bytes: int = _MEMORY_BYTES) -> None:
        """``max_bytes``: about how much the first folder may take before its oldest tests go; None: any amount."""
        bounds = [max_bytes, *(None for _ in folders)]
        self._stores = [Segments(folder, max_bytes=bound) for folder, bound in zip(folders, bounds, strict=False)]
        self._memory: OrderedDict[str, tuple[int, tuple[TestCase, ...] | bytes]] = OrderedDict()
        self._memory_bytes, self._held = memory_bytes, 0
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; what was put is on the disk then."""
        for store in self._stores:
            store.close()

    def sync(self) -> None:
        """What was put is on the disk when this returns."""
        for store in self._stores:
            store.sync()

    def keep(self, problem: Problem, names: Sequence[str]) -> Problem:
        """The problem with its tests in the store; ``names``: what the tests call. Kept ones stay as they are."""
        if isinstance(problem.tests, StoredTests) and problem.tests.store is self:
            return problem
        if isinstance(problem.tests, StoredTests) and isinstance(problem.tests.store, TestStore):
            sha256, names = problem.tests.sha256, problem.tests.names
            self._copy(sha256, problem.tests.store)
        else:
            sha256 = self.add(jsonl.content(tuple(problem.tests), tuple[TestCase, ...]))
        return replace(problem, tests=StoredTests(sha256, len(problem.tests), sorted(names), self))

    def bind(self, problem: Problem) -> Problem:
        """The problem whose tests, where it only names them, are read here."""
        tests = problem.tests
        if not isinstance(tests, StoredTests):
            return problem
        return replace(problem, tests=StoredTests(tests.sha256, tests.total, tests.names, self))

    def add(self, content: bytes) -> str:
        """Keep the JSON of tests; its hash."""
        sha256 = hashlib.sha256(content).hexdigest()
        if not self._stores:
            self._remember(sha256, len(content), content)
        elif _key(sha256) not in self._stores[0]:
            self._stores[0].put(_key(sha256), zlib.compress(content, 1))
        return sha256

    def _copy(self, sha256: str, source: TestStore) -> None:
        """From another store, as they lie there."""
        value = next(filter(None, (store.get(_key(sha256)) for store in source._stores)), None)
        if value is None or not self._stores:
            content = source.content(sha256)
            if content is None:
                raise ValueError(f"the tests {sha256[:12]} are not in {source.places()}")
            self.add(content)
        elif _key(sha256) not in self._stores[0]:
            self._stores[0].put(_key(sha256), value)

    def places(self) -> str:
        """Where the tests lie, for people."""
        return ", ".join(str(store.folder) for store in self._stores) or "memory"

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._memory or any(_key(sha256) in store for store in self._stores)

    def content(self, sha256: str) -> bytes | None:
        """The JSON of tests; None where they are not here."""
        for number, store in enumerate(self._stores):
            value = store.get(_key(sha256))
            if value is None:
                continue
            content = zlib.decompress(value)
            if hashlib.sha256(content).hexdigest() == sha256:
                if number:
                    with suppress(OSError):  # the node's own disk is full
                        self._stores[0].put(_key(sha256), value)
                return content
        with self._lock:
            held = self._memory.get(sha256, (0, b""))[1]
        if not self._stores and isinstance(held, tuple):
            return jsonl.content(held, tuple[TestCase, ...])
        return held if isinstance(held, bytes) and held else None

    def load(self, sha256: str) -> tuple[TestCase, ...]:
        """The tests; raises ValueError where they are not here."""
        with self._lock:
            held = self._memory.get(sha256, (0, b""))[1]
            if isinstance(held, tuple):
                self._memory.move_to_end(sha256)
                return held
        content = self.content(sha256)
        if content is None:
            raise ValueError(f"the tests {sha256[:12]} are not in {self.places()}")
        tests: tuple[TestCase, ...] = jsonl.parse(tuple[TestCase, ...], content)
        self._remember(sha256, len(content), tests)
        return tests

    def _remember(self, sha256: str, size: int, value: tuple[TestCase, ...] | bytes) -> None:
        with self._lock:
            self._held += size - self._memory.pop(sha256, (0, b""))[0]
            self._memory[sha256] = (size, value)
            while self._held > self._memory_bytes and len(self._memory) > 1:
                self._held -= self._memory.popitem(last=False)[1][0]


def folder_of(run_dir: str | Path) -> Path:
    """Where the tests of a run lie."""
    return Path(run_dir) / "tests"


def _key(sha256: str) -> bytes:
    return bytes.fromhex(sha256)[:KEY_BYTES]
