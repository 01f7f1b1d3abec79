"""Verdicts of identical executions, kept on disk for all jobs of a run.

One file a verdict, written beside and renamed into place, so that any number of processes on any number of hosts can
share the folder (also over NFS) without locks. Bounded: the oldest files of a crowded shard go first.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

from ctrl_hpc import jsonl
from ctrl_hpc.records import Execution, Verdict
from ctrl_hpc.sandbox import judge, rootfs

_SHARDS = 256
_MAX_ENTRY_BYTES = 1 << 20
_JUDGE = hashlib.sha256(Path(judge.__file__).read_bytes()).hexdigest()[:16]
"""Verdicts of other comparisons than these do not count."""


class VerdictCache:
    """A folder of verdicts of at most about ``max_mb``."""

    def __init__(self, folder: Path, max_mb: int = 1024, judges: str = "", jail: str = "") -> None:
        """What else verdicts depend on: ``judges``, a hash of the special ones, and ``jail``, one of its contents."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make the verdict cache in {folder}: {error.strerror}") from None
        self.folder = folder
        self._shard_bytes = max_mb * (1 << 20) // _SHARDS
        self._environment = f"{sys.version} {jail or rootfs.contents().identity()} {_JUDGE} {judges}"

    def key(self, execution: Execution) -> str:
        """The hash of all that a verdict depends on: the execution, the jail's contents, the judge."""
        text = json.dumps([self._environment, jsonl.encode(execution)], separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def get(self, key: str) -> Verdict | None:
        """The verdict kept under a key. A file that is no verdict (a torn disk) is removed and counts as absent."""
        path = self._path(key)
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        try:
            return jsonl.decode(Verdict, json.loads(text))
        except ValueError:
            path.unlink(missing_ok=True)
            return None

    def put(self, key: str, execution: Execution, verdict: Verdict) -> bool:
        """Keep a verdict; whether it was kept. Sandbox faults, wall-clock kills and huge outputs are not."""
        if not _lasting(execution, verdict):
            return False
        line = jsonl.line(verdict)
        if len(line) > _MAX_ENTRY_BYTES:
            return False
        path = self._path(key)
        self._make_room(path.parent, len(line))
        jsonl.write_text(path, line)
        return True

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key[2:]}.json"

    def _make_room(self, shard: Path, needed: int) -> None:
        """Remove the oldest verdicts of a shard until ``needed`` bytes fit. Others may do the same meanwhile."""
        entries: list[tuple[float, int, str]] = []
        try:
            with os.scandir(shard) as listing:
                for entry in listing:
                    info = entry.stat()
                    entries.append((info.st_mtime, info.st_size, entry.path))
        except FileNotFoundError:
            return
        excess = sum(size for _, size, _ in entries) + needed - self._shard_bytes
        for _, size, path in sorted(entries):
            if excess <= 0:
                return
            Path(path).unlink(missing_ok=True)
            excess -= size


def _lasting(execution: Execution, verdict: Verdict) -> bool:
    """Whether the same execution would earn the verdict again: a kill by wall-clock time tells of the node's load."""
    if verdict.status == "sandbox_error":
        return False
    return not any(
        test.status == "sandbox_error" or (test.status == "time_limit" and test.cpu_s < execution.limits.cpu_s)
        for test in verdict.tests
    )
