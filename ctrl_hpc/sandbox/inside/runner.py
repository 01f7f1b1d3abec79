"""Pid 1 of a jail: takes jobs from the executor, forks one child a job, enforces its limits, reports how it ended.

A job is one datagram of integers with file descriptors beside it (source, stdin, stdout, stderr and, for calls, a
request and a reply channel). The runner never reads or writes what those files hold: only the forked child reads the
source, after which it is no longer trusted. So this process's memory, which every child inherits, holds integers only,
and no child can find another program's text, input or output in it.

Only the standard library, and no module of ours from outside this folder. Every fresh jail pays for what is imported
here, hence ``posix`` for ``os`` and the like; modules that its programs will import are named as arguments.
"""

from __future__ import annotations

import _signal as signal
import _socket as socket
import _struct as struct
import _thread
import gc
import mmap
import posix as os
import resource
import select
import sys
import time

import child
import recursion

REQUEST = struct.Struct("<8q")
"""kind, CPU (ns), wall (ns), address space (bytes), file size (bytes), processes, stack (bytes), whether files stay."""
REPLY = struct.Struct("<8q")
"""wait status, reason, CPU (ns), wall (ns), peak RSS (KiB), flags, 0, 0."""
READY, FINISHED, CPU_LIMIT, WALL_LIMIT, CANCELLED, FAULT = range(6)
"""Reasons: how a job ended."""
CANCEL = -1
"""The kind of a message that ends the running job; between jobs it means nothing."""
DIRTY, OUT_OF_MEMORY = 1, 2
"""Flags: something was left in /tmp; the child died of a MemoryError that it had not raised itself."""

MAX_FDS = 8
_CONTROL_FD = 0
_THREAD_STACK_BYTES = 8 << 20
_SHARED_MEMORY = "/dev/shm"
_PACKAGES = "/python/packages"
_CORES = 2
"""What programs are told, whatever the node has: pools of processes are sized by it."""
_MILLION, _BILLION = 10**6, 10**9
_BLANK = bytes(mmap.PAGESIZE)


def _receive(control: socket.socket) -> tuple[tuple[int, ...], list[int]] | None:
    """The next job's integers and descriptors; None when the executor is gone."""
    data, ancillary, _, _ = control.recvmsg(REQUEST.size, socket.CMSG_SPACE(MAX_FDS * 4))
    if len(data) != REQUEST.size:
        return None
    fds: list[int] = []
    for _, _, payload in ancillary:
        fds.extend(struct.unpack(f"{len(payload) // 4}i", payload))
    return REQUEST.unpack(data), fds


def _watch(control: socket.socket, pid: int, cpu_ns: int, wall_ns: int, start: int) -> int:
    """Wait until the child ends or reaches a limit, or the executor cancels or leaves; returns the reason."""
    clock = ~pid << 3 | 2  # the CPU clock of a process, as in clock_getcpuclockid(3)
    pidfd = os.pidfd_open(pid)
    try:
        poller = select.poll()
        poller.register(pidfd, select.POLLIN)
        poller.register(control, select.POLLIN)
        while True:
            now = time.monotonic_ns()
            cpu_left = cpu_ns - time.clock_gettime_ns(clock)
            wall_left = wall_ns - (now - start)
            if wall_left <= 0:
                return WALL_LIMIT
            if cpu_left <= 0:
                return CPU_LIMIT
            events = poller.poll(min(cpu_left, wall_left) / _MILLION + 0.2)
            ready = [fd for fd, _ in events]
            if pidfd in ready:
                return FINISHED
            if ready:
                return CANCELLED
    finally:
        os.close(pidfd)


def _reap(main_pid: int) -> tuple[int, int, int]:
    """Kill and reap everything but this process; returns the main child's status, all CPU (ns), peak RSS (KiB)."""
    status, cpu_s, peak_kb = 0, 0.0, 0
    while True:
        try:  # noqa: SIM105 (contextlib is left out to start faster)
            os.kill(-1, signal.SIGKILL)
        except ProcessLookupError:
            pass
        try:
            pid, wait_status, usage = os.wait4(-1, 0)
        except ChildProcessError:
            return status, int(cpu_s * _BILLION), peak_kb
        cpu_s += usage.ru_utime + usage.ru_stime
        peak_kb = max(peak_kb, usage.ru_maxrss)
        if pid == main_pid:
            status = wait_status


def _clean() -> bool:
    """Remove plain files from where programs may write; whether nothing else was there.

    If not, the executor replaces the jail.
    """
    try:
        return all(map(_clean_folder, (child.SCRATCH, _SHARED_MEMORY)))
    except OSError:  # a program can make any of it fail
        return False


def _clean_folder(folder: str) -> bool:
    for name in os.listdir(folder):
        os.unlink(f"{folder}/{name}")
    os.utime(folder, ns=(0, 0))  # no program leaves the next one a time
    info = os.stat(folder)
    return info.st_mode == 0o41777 and info.st_nlink == 2 and not os.listxattr(folder)


def _run(control: socket.socket, pending: mmap.mmap, note: mmap.mmap, job: tuple[int, ...], fds: list[int]) -> bytes:
    kind, cpu_ns, wall_ns, *limits, keep = job
    pending[0], note[:] = 1, _BLANK
    start = time.monotonic_ns()
    try:
        pid = os.fork()
    except OSError:
        return REPLY.pack(0, FAULT, 0, 0, 0, DIRTY, 0, 0)
    if pid == 0:
        try:
            child.main(kind, fds, pending, note, (cpu_ns, *limits))
        except BaseException:  # noqa: BLE001 (a failure before the program ran: its place is the executor's log)
            sys.__excepthook__(*sys.exc_info())
        finally:
            os._exit(1)
    try:
        reason = _watch(control, pid, cpu_ns, wall_ns, start)
    except (OSError, MemoryError):  # the kernel has no memory left for this jail
        reason, note[0] = FINISHED, 1
    wall = time.monotonic_ns() - start
    status, cpu, peak_kb = _reap(pid)
    if reason == FINISHED and cpu > cpu_ns:
        reason = CPU_LIMIT
    if pending[0] and reason == FINISHED:
        reason = FAULT  # the child ended by itself before the program began
    flags = (0 if keep or _clean() else DIRTY) | (OUT_OF_MEMORY if note[0] else 0)
    return REPLY.pack(status, reason, cpu, wall, peak_kb, flags, 0, 0)


def _check_walls() -> None:
    """End at once unless this is pid 1 of a jail whose walls stand: better no service than one without them."""
    assert os.getpid() == 1 and os.getuid() == os.getgid() == 65534, "not the jail's first process, or not its user"
    for path in ("/proc/1", "/etc/passwd"):
        try:
            os.stat(path)
        except FileNotFoundError:
            continue
        raise AssertionError("the host's files are visible")
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    except PermissionError:
        return
    raise AssertionError("system calls are not filtered")


def main() -> None:
    """Serve jobs until the executor closes its end."""
    _check_walls()
    # Python's own SIGINT handler would make pid 1 killable from inside: without handlers the kernel shields it.
    for number in range(1, signal.NSIG):
        if signal.getsignal(number) not in (signal.SIG_DFL, None):
            signal.signal(number, signal.SIG_DFL)
    sys.set_int_max_str_digits(0)  # numbers of any length, as the benchmarks' graders allow
    os.cpu_count = lambda: _CORES
    recursion.prepare()
    for name in sys.argv[1:]:
        __import__(name)  # once for all programs; random is seeded anew by each fork
    control = socket.socket(fileno=_CONTROL_FD)
    pending, note = mmap.mmap(-1, mmap.PAGESIZE), mmap.mmap(-1, mmap.PAGESIZE)
    os.chdir(child.SCRATCH)
    sys.path[0] = child.SCRATCH  # programs import from their own folder, not from the runner's
    sys.path.append(_PACKAGES)
    os.umask(0o022)
    _thread.stack_size(_THREAD_STACK_BYTES)  # the main thread's limit, which is larger, is the default otherwise
    gc.disable()
    gc.freeze()
    control.send(REPLY.pack(0, READY, 0, 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0, 0, 0))
    while True:
        job = _receive(control)
        if job is None:
            os._exit(0)
        if job[0][0] == CANCEL:
            continue
        reply = _run(control, pending, note, *job)
        for fd in job[1]:
            os.close(fd)
        try:
            control.send(reply)
        except OSError:
            os._exit(0)
