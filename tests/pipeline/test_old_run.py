"""A run directory made by commit 8c4b07b (``configs/tiny_faults.yaml``, small) is reported, continued and synced.

``tests/data/run_of_8c4b07b.tar.xz`` is that directory without weights, checkpoints, pictures and copies of the code;
it was made in /srv/ctrl-hpc, which is not there any more.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from ctrl_hpc import cli
from ctrl_hpc.config import ROOT
from ctrl_hpc.run import directory

ARCHIVE = ROOT / "tests" / "data" / "run_of_8c4b07b.tar.xz"
STAGES = ("sample", "synthesize", "sft", "rl", "eval", "report")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "old"


def again(old: Path, *overrides: str) -> list[str]:
    """The command that made it, in another place."""
    same = ["name=old", "data.n_train=12", "data.n_eval=6", "rl.steps=4", "executor.limits.processes=16"]
    return ["run", str(ROOT / "configs" / "tiny_faults.yaml"), f"run_dir={old}", *same, *overrides]


def among(before: object, after: object) -> bool:
    """Whether all that was told is told again, to the bit; there may be more."""
    if isinstance(before, dict) and isinstance(after, dict):
        return all(key in after and among(value, after[key]) for key, value in before.items())
    return before == after


def numbers(old: Path) -> dict[str, object]:
    results = json.loads((old / "report" / "results.json").read_text(encoding="utf-8"))
    return {key: results[key] for key in ("datasets", "learning_curve")}


def test_its_stages_are_done(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(again(old)) == 0
    said = capsys.readouterr().err
    assert [f"{stage}: done before, skipped" for stage in STAGES] == [line for line in said.splitlines() if line]


def test_its_report_is_made_anew_with_the_same_numbers(old: Path) -> None:
    before = numbers(old)
    assert cli.main(["report", str(old)]) == 0
    assert among(before, numbers(old))
    assert (old / "report" / "index.html").is_file()


def test_a_stage_that_is_redone_continues_it(old: Path) -> None:
    before = numbers(old)
    (old / "report" / "done.json").unlink()
    assert cli.main(again(old)) == 0
    assert directory.is_done(old, "report") and among(before, numbers(old))


def test_its_status_and_logs_are_read(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", str(old)]) == 0
    said = capsys.readouterr().out
    assert all(stage in said for stage in STAGES) and said.count("done") == len(STAGES)


def test_another_configuration_is_refused(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(again(old, "sample.temperature=0.5")) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "sample.temperature" in line]
    assert "1.0" in line and "0.5" in line
