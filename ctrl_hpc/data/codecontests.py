"""CodeContests (Li et al. 2022): competition problems from stdin to stdout; public, private and generated tests."""

from __future__ import annotations

from typing import Any

from ctrl_hpc.data import table
from ctrl_hpc.records import Problem, StdinTest

SIZES = {"train": 13328, "valid": 117, "test": 165}
"""Problems of each split as published; the paper evaluates on the 165."""
_PYTHON3 = 3
_KINDS = ("public_tests", "private_tests", "generated_tests")
_DIFFICULTIES = "unknown easy medium hard harder hardest external A B C D E F G H I J K L M N O P Q R S T U V".split()


def load(path: str | None, split: str) -> list[Problem]:
    """CodeContests with all its tests; the development split is called ``valid`` there."""
    table.require_split("codecontests", split, "train", "dev", "test")
    wanted = {"dev": "valid"}.get(split, split)
    problems = [_problem(row, split) for row in table.rows(path, hub="deepmind/code_contests", split=wanted)]
    return [problem for problem in problems if problem.tests]


def _problem(row: table.Row, split: str) -> Problem:
    description = row.text("description")
    rating = row.get("cf_rating", 0)
    return Problem(
        id=f"codecontests/{row.text('name')}",
        source="codecontests",
        split=split,
        prompt=description,
        tests=_tests(row),
        cpu_s=_seconds(row.get("time_limit")),
        memory_mb=max(int(row.get("memory_limit_bytes", 0)) >> 20, 0) or None,
        difficulty=_difficulty(row, rating),
        canonical_solution=_python(row.get("solutions", {})),
        comparison=table.comparison_of(description),
        provenance=row.where,
    )


def _tests(row: table.Row) -> tuple[StdinTest, ...]:
    """Every test of every kind, each once."""
    found: dict[tuple[str, str], None] = {}
    for kind in _KINDS:
        data = row.get(kind, {})
        inputs, outputs = data.get("input", []), data.get("output", [])
        if len(inputs) != len(outputs):
            raise ValueError(f"{row.where}: {kind}: {len(inputs)} inputs but {len(outputs)} outputs")
        found |= dict.fromkeys(zip(inputs, outputs, strict=True))
    return tuple(StdinTest(stdin=stdin, expected_stdout=stdout) for stdin, stdout in found)


def _seconds(limit: dict[str, Any] | None) -> float | None:
    if not limit:
        return None
    return float(limit.get("seconds") or 0) + float(limit.get("nanos") or 0) / 1e9 or None


def _difficulty(row: table.Row, rating: int) -> str | None:
    """By the rating of Codeforces where there is one, else the data set's own name."""
    if rating:
        return "easy" if rating < 1400 else "medium" if rating < 2000 else "hard"
    number = row.get("difficulty", 0)
    return _DIFFICULTIES[number] if 0 < number < len(_DIFFICULTIES) else None


def _python(solutions: dict[str, Any]) -> str | None:
    pairs = zip(solutions.get("language", []), solutions.get("solution", []), strict=True)
    return next((text for language, text in pairs if language == _PYTHON3), None)
