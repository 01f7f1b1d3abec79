"""Finding and using a memory cgroup, of either version, on trees of plain files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ctrl_hpc.sandbox import memory
from ctrl_hpc.sandbox.memory import Hierarchy, MemoryGroup

MOUNTS_1 = """\
22 1 0:20 / / rw - ext4 /dev/root rw
35 31 0:32 / {mount} rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /unified rw,relatime - cgroup2 cgroup2 rw
"""
MOUNTS_2 = "41 31 0:38 {root} {mount} rw,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def proc(folder: Path, cgroups: str, mounts: str) -> Path:
    folder.mkdir()
    (folder / "cgroup").write_text(cgroups)
    (folder / "mountinfo").write_text(mounts)
    return folder


def test_version_1_is_found(tmp_path: Path) -> None:
    self = proc(tmp_path / "proc", "4:memory:/slurm/job_7\n0::/\n", MOUNTS_1.format(mount=tmp_path))
    assert memory.find(self) == Hierarchy(tmp_path / "slurm/job_7", 1)


@pytest.mark.parametrize(
    ("root", "place"), [("/", "user.slice/job"), ("/user.slice", "job"), ("/elsewhere", "user.slice/job")]
)
def test_version_2_is_found_below_its_mount(tmp_path: Path, root: str, place: str) -> None:
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "cgroup.controllers").write_text("cpu memory pids\n")
    self = proc(tmp_path / "proc", "0::/user.slice/job\n", MOUNTS_2.format(mount=tmp_path, root=root))
    assert memory.find(self) == Hierarchy(tmp_path / place, 2)


def test_none_is_found_where_none_controls_memory(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu pids\n")
    self = proc(tmp_path / "proc", "0::/\n", MOUNTS_2.format(mount=tmp_path, root="/"))
    assert memory.find(self) is None


@pytest.fixture
def kernel_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders made as cgroups get files, and are removed with them, as by the kernel."""
    plain_mkdir, plain_rmdir = Path.mkdir, Path.rmdir

    def mkdir(self: Path, *args: object, **kwargs: object) -> None:
        plain_mkdir(self, *args, **kwargs)  # type: ignore[arg-type]
        if self.name.startswith(memory.PREFIX):
            for name in ("memory.max", "memory.swap.max", "memory.limit_in_bytes", "cgroup.procs"):
                (self / name).touch()
            (self / "memory.events").write_text("low 0\noom 2\noom_kill 0\n")
            (self / "memory.failcnt").write_text("0\n")
            (self / "memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 0\n")

    def rmdir(self: Path) -> None:
        for path in self.iterdir():
            path.unlink()
        plain_rmdir(self)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    monkeypatch.setattr(Path, "rmdir", rmdir)


@pytest.mark.parametrize("version", [1, 2])
def test_a_group_limits_counts_and_is_removed(tmp_path: Path, version: int, kernel_files: None) -> None:
    (tmp_path / "cgroup.subtree_control").write_text("memory")
    group = MemoryGroup(Hierarchy(tmp_path, version))
    (folder,) = tmp_path.glob(f"{memory.PREFIX}*")
    assert folder.name.startswith(f"{memory.PREFIX}{os.getpid()}-")
    group.add([123])
    group.limit(5000)
    assert (folder / "cgroup.procs").read_text() == "123"
    if version == 2:
        assert ((folder / "memory.max").read_text(), (folder / "memory.swap.max").read_text()) == ("5000", "0")
    else:
        assert (folder / "memory.limit_in_bytes").read_text() == "5000"
    assert group.kills() == group.refusals() == 0
    events = folder / ("memory.events" if version == 2 else "memory.oom_control")
    events.write_text("max 5\noom 9\noom_kill 3\n")
    (folder / "memory.failcnt").write_text("5\n")
    assert (group.kills(), group.refusals()) == (3, 5)
    group.close()
    assert not folder.exists()


def test_version_2_delegates_by_moving_this_process_to_a_leaf(tmp_path: Path, kernel_files: None) -> None:
    (tmp_path / "cgroup.subtree_control").touch()
    (tmp_path / "cgroup.procs").write_text(f"{os.getpid()}\n")
    group = MemoryGroup(Hierarchy(tmp_path, 2))
    assert (tmp_path / f"{memory.PREFIX}executor/cgroup.procs").read_text() == str(os.getpid())
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+memory"
    group.close()


def test_version_2_with_others_in_the_cgroup_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "cgroup.subtree_control").touch()
    (tmp_path / "cgroup.procs").write_text(f"{os.getpid()}\n1\n")
    with pytest.raises(OSError, match="has other processes"):
        MemoryGroup(Hierarchy(tmp_path, 2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cgroup.procs", "cgroup.subtree_control"]


def test_groups_of_executors_that_were_killed_are_swept(tmp_path: Path) -> None:
    names = [f"{memory.PREFIX}{pid}-0" for pid in (os.getpid(), 2**22 + 1)] + ["other", f"{memory.PREFIX}executor"]
    for name in names:
        (tmp_path / name).mkdir()
    memory.sweep(Hierarchy(tmp_path, 1))
    assert {path.name for path in tmp_path.iterdir()} == {names[0], names[2], names[3]}
