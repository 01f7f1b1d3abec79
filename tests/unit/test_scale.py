"""The benchmark of growth works on a few problems, and what a step sends names its tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import scale


def test_every_phase_runs_on_what_the_one_before_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "PROGRAMS", 24)
    scale.make(tmp_path, 6 / scale.PROBLEMS)
    found = {phase: run(tmp_path) for phase, run in scale.PHASES.items()}
    assert found["data"]["problems"] == 6 and found["trainer"] == {"drafts": 24, "drawn": 24}
    assert found["start"]["files"] == found["data"]["files"] == 4  # the problems, what was left out, two of tests
    step = found["step"]
    assert step["sent_mb"] < 0.05 * step["whole_sent_mb"] and step["got_mb"] < 0.05 * step["whole_got_mb"]
    assert found["executor"]["files"] == 2
