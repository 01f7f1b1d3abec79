"""CodeContests (Li et al. 2022): competition problems from stdin to stdout; public, private and generated tests."""

from __future__ import annotations

from typing import Any

from ctrl_hpc.data import table
from ctrl_hpc.data.statement import comparison_of
from ctrl_hpc.data.table import Loaded
from ctrl_hpc.records import Problem, StdinTest

SIZES = {"train": 13328, "valid": 117, "test": 165}
"""Problems of each split as published; the paper evaluates on the 165."""
_PYTHON3 = 3
_KINDS = ("public_tests", "private_tests", "generated_tests")
_DIFFICULTIES = "unknown easy medium hard harder hardest external A B C D E F G H I J K L M N O P Q R S T U V".split()


WRONG = 3
"""Known-wrong programs kept of each problem."""


def load(path: str | None, split: str, *, keep: table.Keep = table.as_it_is) -> Loaded[Problem]:
    """CodeContests with all its tests; the development split is called ``valid`` there."""
    table.require_split("codecontests", split, "train", "dev", "test")
    wanted = {"dev": "valid"}.get(split, split)
    rows = table.rows(path, hub="deepmind/code_contests", split=wanted)
    return table.problems(rows, lambda row: _problem(row, split), keep)


def _problem(row: table.Row, split: str) -> Problem:
    description = row.text("description")
    for name in ("input_file", "output_file"):
        if row.get(name) and row.get(name) not in ("stdin", "stdout", "standard input", "standard output"):
            raise ValueError(f"{name}: reads or writes the file {row.get(name)!r}, not stdin and stdout")
    right = _python(row.get("solutions", {}))
    return Problem(
        id=f"codecontests/{row.text('name')}",
        source="codecontests",
        split=split,
        prompt=description,
        tests=_tests(row),
        cpu_s=_seconds(row.get("time_limit")),
        memory_mb=max(int(row.get("memory_limit_bytes", 0)) >> 20, 0) or None,
        difficulty=_difficulty(row, row.get("cf_rating", 0)),
        canonical_solution=table.python3(right),
        wrong_solutions=tuple(_python(row.get("incorrect_solutions", {}))[:WRONG]),
        comparison=comparison_of(description),
        harness="codecontests",
        provenance=row.where,
    )


def _tests(row: table.Row) -> tuple[StdinTest, ...]:
    """Every test of every kind, each once."""
    found: dict[tuple[str, str], None] = {}
    for kind in _KINDS:
        inputs, outputs = _columns(row.get(kind, {}), "input", "output")
        if len(inputs) != len(outputs):
            raise ValueError(f"{row.where}: {kind}: {len(inputs)} inputs but {len(outputs)} outputs")
        found |= dict.fromkeys(zip(inputs, outputs, strict=True))
    return tuple(StdinTest(stdin=stdin, expected_stdout=stdout) for stdin, stdout in found)


def _columns(data: Any, *names: str) -> list[list[Any]]:
    """The columns of a list of records, whether it is given as such or as a record of lists."""
    if isinstance(data, list):
        return [[item[name] for item in data] for name in names]
    return [list(data.get(name) or []) for name in names]


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


def _python(solutions: Any) -> list[str]:
    """The programs in Python 3."""
    languages, texts = _columns(solutions, "language", "solution")
    return [text for language, text in zip(languages, texts, strict=True) if language in (_PYTHON3, "PYTHON3")]
