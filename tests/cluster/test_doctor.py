"""What the doctor finds, on machines with and without things."""

import subprocess
from pathlib import Path

import pytest

from ctrl_hpc.cluster import doctor


def test_every_check_has_a_finding_and_a_fix_unless_ok(tmp_path: Path) -> None:
    found = doctor.checks(tmp_path / "runs" / "not-there-yet")
    assert [check.name for check in found] == [*doctor.CHECKS, "run directory"]
    for check in found:
        assert check.found and "\n" not in check.found
        assert (check.fix == "") == (check.state == "ok"), check
    by_name = {check.name: check for check in found}
    assert by_name["python"].state == by_name["packages"].state == by_name["ports"].state == "ok"
    assert by_name["nsjail"].state == "ok", by_name["nsjail"]
    assert list(tmp_path.iterdir()) == []


def test_missing_slurm_commands_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None if name == "sacct" else f"/usr/bin/{name}")
    check = doctor.CHECKS["slurm"]()
    assert (check.state, check.found) == ("warning", "not here: sacct")


def test_a_silent_controller_is_told_from_missing_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "slurm_load_partitions: Unable to contact slurm controller")

    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor.subprocess, "run", answer)
    check = doctor.CHECKS["slurm"]()
    assert check.state == "missing" and "Unable to contact slurm controller" in check.found
