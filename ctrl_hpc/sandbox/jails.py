"""The jails of one worker: one a role, started when it is needed, replaced when a program left it dirty."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path

from ctrl_hpc.records import Limits, TestResult, TestStatus
from ctrl_hpc.sandbox.jail import Ended, Jail, JailFault, Kind
from ctrl_hpc.sandbox.job_files import JobFiles
from ctrl_hpc.sandbox.memory import Hierarchy, MemoryGroup, Watchdog
from ctrl_hpc.sandbox.nsjail import Purpose

ATTEMPTS = 2
"""A job whose jail broke is run once more in a new one; a second fault is reported as ``sandbox_error``."""
FAULTS = (JailFault, OSError, MemoryError)
"""What a broken jail, or a node that has no more to give, raises."""


class Role(Enum):
    """What a worker's jails are for."""

    PROGRAM = "programs in Python"
    TEST = "tests that call them"
    NATIVE = "binaries"
    COMPILER = "compilers"
    CHECKER = "checkers of outputs"


_PURPOSES = {
    Role.PROGRAM: Purpose.PYTHON,
    Role.TEST: Purpose.PYTHON,
    Role.NATIVE: Purpose.NATIVE,
    Role.COMPILER: Purpose.COMPILER,
    Role.CHECKER: Purpose.NATIVE,
}
_LIBRARY = (
    "bisect", "collections", "copy", "datetime", "fractions", "functools", "heapq", "itertools", "json", "math",
    "operator", "random", "re", "statistics", "string", "typing",
)  # fmt: skip
"""What many programs import."""
_HARNESS = {Role.PROGRAM: "solution", Role.TEST: "checker"}
"""What calls a program's functions, and what runs a test that does, see ``inside/``."""


class Jails:
    """A worker's jails by role, kept warm between programs unless ``fresh``."""

    def __init__(self, root: Path, watchdog: Watchdog, hierarchy: Hierarchy | None, fresh: bool) -> None:
        """``hierarchy``: where this worker makes its cgroup, None where none can be made."""
        self._root, self._watchdog, self.fresh = root, watchdog, fresh
        self._group = MemoryGroup(hierarchy) if hierarchy is not None else None
        self._named: tuple[str, ...] = () if fresh else _LIBRARY
        self._called = not fresh
        self._jails: dict[Role, Jail] = {}

    def expect(self, text: bytes, *, called: bool = False) -> None:
        """What runs next, and whether tests call it: what it names a fresh jail imports once, not in every test."""
        if self.fresh:
            words = {word.decode("ascii") for word in re.findall(rb"[a-z]+", text)}
            self._named, self._called = tuple(name for name in _LIBRARY if name in words), called

    def get(self, role: Role = Role.PROGRAM) -> Jail:
        """The jail for programs, or for another role; started when it is not there. Raises JailFault."""
        if role not in self._jails:
            preload: tuple[str, ...] = ()
            if role in _HARNESS:
                preload = (*self._named, _HARNESS[role]) if self._called else self._named
            group = self._group if role in (Role.PROGRAM, Role.NATIVE) else None
            self._jails[role] = Jail(self._root, self._watchdog, group, preload=preload, purpose=_PURPOSES[role])
        return self._jails[role]

    def run(
        self, kind: Kind, files: JobFiles, limits: Limits, role: Role = Role.PROGRAM, *, keep: bool = False
    ) -> Ended:
        """Run one job; ``keep`` leaves the jail's files for the next one. Raises JailFault."""
        ended = self.get(role).run(kind, files.given, limits, keep)
        if not keep:
            self.replace_if_dirty(ended, role)
        return ended

    def replace_if_dirty(self, ended: Ended, role: Role = Role.PROGRAM) -> None:
        """End the jail in which something is left."""
        if ended.dirty:
            self._jails.pop(role).close()

    def lost(self, error: Exception) -> TestResult:
        """What a job earns whose jail broke: the program's own failure where the jail's end shows it to be."""
        self.end()
        status: TestStatus = error.cause if isinstance(error, JailFault) else "sandbox_error"
        return TestResult(status=status, stderr=(str(error) or type(error).__name__).encode("utf-8", "replace"))

    def end(self) -> None:
        """End all of them; those that are needed again are started again."""
        while self._jails:
            self._jails.popitem()[1].close()

    def end_if_fresh(self) -> None:
        """End all of them where no other program may have them."""
        if self.fresh:
            self.end()

    def close(self) -> None:
        """End the jails and remove the cgroup."""
        self.end()
        if self._group is not None:
            self._group.close()
            self._group = None
