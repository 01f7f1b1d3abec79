"""Verdicts of identical executions, kept on disk for all jobs of a run.

They lie in a :class:`~ctrl_hpc.store.segments.Segments` store, which any number of processes on any number of hosts can
share (also over NFS) without locks: a writer has files of its own. Bounded: the oldest files go first.
"""

from __future__ import annotations

import hashlib
import json
import sys
import zlib
from dataclasses import replace
from pathlib import Path

from ctrl_hpc import jsonl
from ctrl_hpc.records import Execution, StoredTests, TestCase, Verdict
from ctrl_hpc.sandbox import judge, languages, rootfs
from ctrl_hpc.store.segments import KEY_BYTES, SEGMENTS, Segments

_WORTH_COMPRESSING = 512
"""Bytes."""
_JUDGE = hashlib.sha256(Path(judge.__file__).read_bytes()).hexdigest()[:16]
"""Verdicts of other comparisons than these do not count."""


class VerdictCache:
    """A folder of verdicts of at most about ``max_mb``. Close it, so that what it wrote is on the disk."""

    def __init__(self, folder: Path, max_mb: int = 1024, judges: str = "", jail: str = "") -> None:
        """What else verdicts depend on: ``judges``, a hash of the special ones, and ``jail``, one of its contents."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"cannot make the verdict cache in {folder}: {error.strerror}") from None
        self._segments = Segments(folder, max_bytes=max_mb << 20)
        self._longest = (max_mb << 20) // SEGMENTS
        self._environment = f"{sys.version} {jail or rootfs.contents().identity()} {_JUDGE} {judges}"

    def close(self) -> None:
        """Close the files."""
        self._segments.close()

    def key(self, execution: Execution) -> str:
        """The hash of all that a verdict depends on: the execution, the jail's contents, the judge."""
        used = {execution.language, languages.CHECKERS if execution.checker is not None else None}
        compilers = [languages.toolchain(name) for name in languages.LANGUAGES if name in used]
        environment = [self._environment, *compilers]
        tests = execution.tests
        if isinstance(tests, StoredTests):
            sha256 = tests.sha256
        else:
            sha256 = hashlib.sha256(jsonl.content(tuple(tests), tuple[TestCase, ...])).hexdigest()
        rest = jsonl.content(replace(execution, tests=()))
        return hashlib.sha256(f"{' '.join(environment)} {sha256} ".encode() + rest).hexdigest()

    def get(self, key: str) -> Verdict | None:
        """The verdict kept under a key. One that cannot be read (a torn disk) counts as absent."""
        value = self._segments.get(_cut(key))
        if value is None:
            return None
        try:
            text = value if value[:1] == b"{" else zlib.decompress(value)
            return jsonl.decode(Verdict, json.loads(text))
        except (ValueError, zlib.error):
            return None

    def put(self, key: str, verdict: Verdict) -> bool:
        """Keep a verdict that is :func:`lasting`; whether it was kept: huge outputs are not."""
        value = jsonl.line(verdict).encode()
        if len(value) > _WORTH_COMPRESSING:
            value = zlib.compress(value, 1)
        if len(value) > self._longest:
            return False
        self._segments.put(_cut(key), value)
        return True


def _cut(key: str) -> bytes:
    return bytes.fromhex(key)[:KEY_BYTES]


def lasting(execution: Execution, verdict: Verdict) -> bool:
    """Whether an execution earns the same whole verdict again: a kill by wall-clock time tells of the node's load."""
    if verdict.status == "sandbox_error":
        return False
    return not any(
        test.status == "sandbox_error"
        or (test.status == "time_limit" and test.cpu_s < execution.limits.cpu_s)
        or (test.status == "compile_error" and test.exit_code is None)
        for test in verdict.tests
    )
