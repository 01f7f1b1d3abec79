"""What the doctor finds, on machines with and without things."""

import os
import subprocess
from pathlib import Path

import pytest

from ctrl_hpc import cli
from ctrl_hpc.cluster import doctor


def test_every_check_has_a_finding_and_a_fix_unless_ok(tmp_path: Path) -> None:
    found = doctor.checks(tmp_path / "runs" / "not-there-yet")
    executor = [check for check in found if check.name.startswith("executor: ")]
    assert [check.name for check in found] == [*doctor.CHECKS, *(check.name for check in executor), "run directory"]
    assert [check.name for check in executor][-1] == "executor: isolation"
    for check in found:
        assert check.found and "\n" not in check.found
        assert (check.fix == "") == (check.state == "ok"), check
    by_name = {check.name: check for check in found}
    assert by_name["python"].state == by_name["packages"].state == by_name["ports"].state == "ok"
    assert {check.state for check in executor} <= {"ok", "warning"}, executor
    assert list(tmp_path.iterdir()) == []


def test_missing_slurm_commands_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None if name == "sacct" else f"/usr/bin/{name}")
    check = doctor.CHECKS["slurm"]()
    assert (check.state, check.found) == ("absent", "not here: sacct")


def test_slurm_without_a_cluster_and_no_gpu_are_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    words = "sinfo: fatal: Could not establish a configuration source"
    answer = subprocess.CompletedProcess(["sinfo"], 1, "", words)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *_, **__: answer)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert [doctor.CHECKS[name]().state for name in ("slurm", "gpu")] == ["absent", "absent"]


def test_where_programs_cannot_be_isolated_the_doctor_says_what_to_ask_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An nsjail that may not make namespaces: exit code 1, its words and the remedy."""
    (tmp_path / "nsjail").write_text(
        '#!/bin/sh\n[ "$1" = --help ] || { echo "[E] clone() failed: Operation not permitted" >&2; exit 255; }\n'
    )
    (tmp_path / "nsjail").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("COLUMNS", "1000")
    assert cli.main(["doctor", str(tmp_path)]) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "executor: isolation" in line)
    assert "missing" in line and "clone() failed: Operation not permitted" in line and "ask the administrator" in line


def test_a_silent_controller_is_told_from_missing_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "slurm_load_partitions: Unable to contact slurm controller")

    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(doctor.subprocess, "run", answer)
    check = doctor.CHECKS["slurm"]()
    assert check.state == "missing" and "Unable to contact slurm controller" in check.found
