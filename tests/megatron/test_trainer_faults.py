"""Faults of machines end a trainer at once, with one clear line and nothing half written. Every fault here is real."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
from megatron_jobs import spawn

pytestmark = pytest.mark.slow
FAILED = 1 << 8
"""Wait status of a process that ended with exit code 1."""


@pytest.fixture(scope="module")
def statuses(workplace: Path) -> dict[str, Any]:
    """Wait statuses of the ranks of every case; None for a rank that had to be killed."""
    spawn("faults", "main", workplace)
    return json.loads((workplace / "faults.json").read_text())


def last_line(folder: Path, case: str, rank: int = 0) -> str:
    """The last line of a rank's traceback."""
    return (folder / f"{case}-{rank}.log").read_text().rstrip().splitlines()[-1]


def test_a_hung_collective_times_out_and_every_rank_tells_its_stack(workplace: Path, statuses: dict[str, Any]) -> None:
    assert statuses["hang"] == [FAILED, None]
    line = last_line(workplace, "hang")
    assert line.startswith("RuntimeError: rank 0: a collective timed out after trainer.timeout_s=10 s"), line
    waiting, hanging = ((workplace / f"hang-{rank}.log").read_text() for rank in (0, 1))
    assert "Timeout (0:00:09" in waiting and "Timeout (0:00:09" in hanging
    assert "in hang" in hanging and "in hang" not in waiting.split("Traceback")[0]


def test_a_rank_that_dies_ends_the_others(workplace: Path, statuses: dict[str, Any]) -> None:
    assert statuses["dead"] == [FAILED, signal.SIGKILL]
    line = last_line(workplace, "dead")
    assert line.startswith("RuntimeError: rank 0: connection closed by another rank, which died"), line


def test_a_gradient_that_is_not_finite_names_a_parameter_and_keeps_the_last_checkpoint(
    workplace: Path, statuses: dict[str, Any]
) -> None:
    assert statuses["nan"] == [FAILED]
    line = last_line(workplace, "nan")
    wanted = (
        "FloatingPointError: the gradient norm is nan (embedding.word_embeddings.weight first); nothing was updated"
    )
    assert line == wanted
    assert sorted(path.name for path in (workplace / "nan" / "sft" / "checkpoints").iterdir()) == [
        "step-000001",
        "step-000002",
    ]


def test_a_checkpoint_of_another_critic_is_refused(workplace: Path, statuses: dict[str, Any]) -> None:
    assert statuses["unfit"] == [FAILED]
    line = last_line(workplace, "unfit")
    assert line.startswith("ValueError: ") and "step-000002: does not fit this critic and layout" in line


def test_memory_that_is_out_names_the_keys_that_help(workplace: Path, statuses: dict[str, Any]) -> None:
    assert statuses["memory"] == [FAILED]
    line = last_line(workplace, "memory")
    assert line.startswith("RuntimeError: rank 0 is out of memory: lower trainer.micro_batch_tokens (now 1048576)"), (
        line
    )
    assert "set parallel.recompute=full (now none), raise parallel.tensor (now 1)" in line


@pytest.mark.parametrize("case", ["hang", "dead", "nan", "memory"])
def test_no_half_written_file_is_left(workplace: Path, statuses: dict[str, Any], case: str) -> None:
    left = [path.name for kind in ("part", "old") for path in (workplace / case).rglob(f".*.{kind}")]
    assert left == []
