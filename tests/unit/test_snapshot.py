"""The copy of the code in a run directory: what it holds, who imports it, when it is another, when it is removed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ctrl_hpc import cli
from ctrl_hpc.config import ROOT, dump, load
from ctrl_hpc.run import directory, snapshot

TINY = str(ROOT / "configs" / "tiny_ci.yaml")
WHERE = """
import importlib.util, json, os, subprocess, sys
import ctrl_hpc.flow.prompts
if sys.argv[1:] == ["parent"]:
    subprocess.run([sys.executable, "-c", "import where"], check=True, cwd=os.environ["ELSEWHERE"])
kernels = importlib.util.find_spec("ctrl_kernels").origin
print(json.dumps([ctrl_hpc.__file__, kernels, str(ctrl_hpc.flow.prompts.packaged()), sys.argv[1:]]))
"""


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two packages of a file each, in place of ours."""
    folder = tmp_path / "checkout"
    files = ("ctrl_hpc/run/copied_main.py", "ctrl_kernels/__init__.py")
    for name in files:
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(f"# {name}\n")
    monkeypatch.setattr(snapshot, "_sources", lambda: {name: folder / name for name in files})
    return folder


def edit(checkout: Path, text: str) -> None:
    (checkout / "ctrl_kernels" / "__init__.py").write_text(text)


def test_a_copy_comes_before_the_working_directory_and_pythonpath(tmp_path: Path) -> None:
    copy = snapshot.take(tmp_path / "run", "new")
    assert copy is not None and copy.parent == tmp_path / "run" / "code"
    broken = tmp_path / "edited"
    for name in snapshot.PACKAGES:
        (broken / name).mkdir(parents=True)
        (broken / name / "__init__.py").write_text("this is no Python\n")
    (broken / "where.py").write_text(WHERE)
    done = subprocess.run(
        [sys.executable, "-u", str(copy), "-u", "-m", "where", "parent"],
        env={**os.environ, "PYTHONPATH": str(broken), "ELSEWHERE": str(tmp_path)},
        **{"cwd": broken, "capture_output": True, "text": True, "check": False},
    )
    assert done.returncode == 0, done.stderr
    ours = [f"{copy}/ctrl_hpc/__init__.py", f"{copy}/ctrl_kernels/__init__.py", f"{copy}/ctrl_hpc/flow/templates"]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[*ours, []], [*ours, ["parent"]]]
    usage = subprocess.run([sys.executable, str(copy), "x.py"], capture_output=True, text=True, check=False)
    assert usage.returncode == 1 and "-m MODULE" in usage.stderr


def test_a_copy_holds_every_tracked_file_of_the_packages_and_its_hash_is_theirs(tmp_path: Path) -> None:
    copy = snapshot.take(tmp_path, "new")
    assert copy is not None
    inside = {str(file.relative_to(copy)) for file in copy.rglob("*") if file.suffix != ".pyc" and file.is_file()}
    tracked = subprocess.run(
        ["git", "ls-files", "ctrl_hpc", "kernels/ctrl_kernels"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert {name.removeprefix("kernels/") for name in tracked} <= inside
    assert {"__main__.py", "origin.json", "configs/models.json"} <= inside
    assert snapshot.identity().code == copy.name
    assert snapshot.take(tmp_path, "new") == copy and [entry.name for entry in copy.parent.iterdir()] == [copy.name]


def test_changed_code_is_told_and_copies_are_kept_as_long_as_they_are_used(tmp_path: Path, sources: Path) -> None:
    run = tmp_path / "run"
    assert snapshot.begin(run, "new") is None
    first = snapshot.latest(run)
    assert first is not None and snapshot.begin(run, "new") is None
    directory.mark_done(run, "sample", 1.0)
    assert json.loads((run / "sample" / "done.json").read_text())["code"] == first.name

    edit(sources, "second = 2\n")
    said = snapshot.begin(run, "new")
    second = snapshot.latest(run)
    assert second is not None and said is not None and "\n" not in said
    assert said.startswith(f"code: {second.name}") and f"{first.name}" in said
    assert said.endswith("at the last start; made by other code: sample")
    assert first.is_dir() and (second / "ctrl_kernels" / "__init__.py").read_text() == "second = 2\n"

    edit(sources, "third = 3\n")
    assert snapshot.begin(run, "keep") is None  # the code of the last start, whatever became of the checkout
    assert snapshot.latest(run) == second
    snapshot.begin(run, "new")
    third = snapshot.latest(run)
    assert third is not None and {entry.name for entry in third.parent.iterdir() if entry.is_dir()} == {
        first.name,  # made a stage
        third.name,
    }
    assert snapshot.begin(run, "none") is None and snapshot.latest(run) is None
    starts = [json.loads(line) for line in (run / "code" / "starts.jsonl").read_text().splitlines()]
    copies = [(start["code"], start["copied"]) for start in starts]
    assert copies == [(first.name, True), (second.name, True), (third.name, True), (third.name, False)]


def test_a_copy_that_was_cut_short_is_no_copy(tmp_path: Path, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(snapshot.shutil, "copyfile", full)
        snapshot.take(tmp_path / "run", "new")
    assert snapshot.latest(tmp_path / "run") is None
    copy = snapshot.take(tmp_path / "run", "new")
    assert copy is not None and (copy / "__main__.py").is_file()


def test_a_requeued_driver_has_the_code_of_its_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []

    def execv(program: str, words: list[str]) -> None:
        calls.append(words)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", execv)
    run = tmp_path / "run"
    keep = [f"run_dir={run}", "cluster=slurm", "launch.snapshot=keep"]
    snapshot.continue_kept(load(TINY, keep), "sample", keep)  # its first start
    assert not calls
    snapshot.begin(run, "new")
    copy = snapshot.latest(run)
    monkeypatch.setattr(sys, "argv", ["ctrl-hpc", "sample", TINY, *keep])
    with pytest.raises(SystemExit):
        cli.main()
    expected = ["sample", f"{run}/config.yaml", keep[0], keep[2]]
    assert calls == [[sys.executable, str(copy), "-m", "ctrl_hpc.cli", *expected]]
    assert directory.check(load(TINY, keep[:2])) == run  # a run that has not begun


LATE = """
import sys
from pathlib import Path
import ctrl_hpc.run.snapshot as snapshot
copy = snapshot.take(sys.argv[1], "new")
snapshot.import_from(copy)
import ctrl_hpc.flow.prompts, ctrl_kernels, ctrl_hpc.run.disk
for module in (ctrl_hpc.flow.prompts, ctrl_kernels, ctrl_hpc.run.disk):
    assert Path(module.__file__).is_relative_to(copy), module
assert snapshot.take(sys.argv[1], "new") == copy
"""


def test_what_is_imported_later_comes_from_the_copy(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LATE, str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_whole_configuration_needs_no_profile(tmp_path: Path) -> None:
    profile = tmp_path / "site.yaml"
    profile.write_text("launch: {engine: slurm, account: physics}\n")
    config = load(TINY, [f"cluster={profile}", f"run_dir={tmp_path / 'run'}"])
    (tmp_path / "config.yaml").write_text(dump(config))
    profile.unlink()
    assert load(tmp_path / "config.yaml") == config
    with pytest.raises(ValueError, match="is not a profile"):
        load(tmp_path / "config.yaml", [f"cluster={profile}"])
