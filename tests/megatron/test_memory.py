"""The plan's estimate of memory is what a trainer really takes, measured on a critic of 200 million parameters."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ctrl_hpc import cli


@pytest.mark.slow
@pytest.mark.alone  # takes gigabytes
def test_the_estimate_is_within_a_tenth_of_what_a_critic_of_200_million_parameters_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "bench.json"
    assert cli.main(["bench", "trainer", "--tokens", "512", "--steps", "0", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["parameters"] == pytest.approx(2e8, rel=0.15)
    assert found["planned_bytes"] == sum(found["planned"].values())
    assert found["planned_bytes"] == pytest.approx(found["measured_bytes"], rel=0.1)
    assert "planned / measured" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.alone  # takes gigabytes
def test_an_unknown_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "trainer", "--model", "GPT-7"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("ctrl-hpc: GPT-7: neither a Hugging Face model folder") and error.count("\n") == 1
