"""CodeContests+ (Wang et al. 2025, arXiv 2506.05817): problems of CodeContests with other tests, and their checkers.

Checkers are testlib's, in C++: the executor needs ``testlib.h`` for them (``executor.testlib``).
"""

from __future__ import annotations

from ctrl_hpc.data import table
from ctrl_hpc.data.codecontests import WRONG
from ctrl_hpc.data.statement import comparison_of
from ctrl_hpc.data.table import Loaded
from ctrl_hpc.records import Problem, StdinTest

_PYTHON3 = "py3"
_PART = "1x"
"""The part with the fewest tests, of five (``1x`` to ``5x``): the ``default`` one has their generators alone."""
_MILLI = 1000


def load(path: str | None, split: str, *, keep: table.Keep = table.as_it_is) -> Loaded[Problem]:
    """CodeContests+, of which there is one split, with the tests of its part ``1x`` where it is read as the hub's."""
    table.require_split("codecontestsplus", split, "train")
    rows = table.rows(path, hub="ByteDance-Seed/Code-Contests-Plus", config=_PART, split="train")
    return table.problems(rows, _problem, keep)


def _problem(row: table.Row) -> Problem:
    description = row.text("description")
    checker = row.text("checker") if row.get("checker") is not None else ""
    time_ms, memory_mb = row.get("time_limit"), row.get("memory_limit")
    return Problem(
        id=f"codecontestsplus/{row.get('source', '')}/{row['id']}",
        source="codecontestsplus",
        split="train",
        prompt=description,
        tests=_tests(row),
        cpu_s=None if time_ms is None else time_ms / _MILLI,
        memory_mb=None if memory_mb is None else int(memory_mb),
        canonical_solution=table.python3(_python(row, "correct_submissions")),
        wrong_solutions=tuple(_python(row, "incorrect_submissions")[:WRONG]),
        comparison=None if checker.strip() else comparison_of(description),
        checker=checker if checker.strip() else None,
        harness="codecontests",
        provenance=row.where,
    )


def _tests(row: table.Row) -> tuple[StdinTest, ...]:
    """Every test once."""
    found = dict.fromkeys((case["input"], case["output"]) for case in row["test_cases"] or [])
    return tuple(StdinTest(stdin=stdin, expected_stdout=stdout) for stdin, stdout in found)


def _python(row: table.Row, column: str) -> list[str]:
    """The programs in Python 3."""
    return [item["code"] for item in row.get(column, []) if item["language"] == _PYTHON3]
