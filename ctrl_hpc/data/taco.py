"""TACO (Li et al. 2023): competition problems with stdin or function tests; the paper's training data."""

from __future__ import annotations

import re
from typing import Any

from ctrl_hpc.data import table
from ctrl_hpc.records import FunctionTest, Problem, StdinTest, TestCase

SIZES = {"train": 25443, "test": 1000, "all": 26443}
"""Problems of each split as published; the paper trains on 18820 of all 26443."""
_TIME = re.compile(r"([\d.]+)\s*(milliseconds?|ms|seconds?|secs?|s)\b", re.IGNORECASE)
_MEMORY = re.compile(r"([\d.]+)\s*(kilobytes?|megabytes?|gigabytes?|kb|mb|gb|kib|mib|gib)\b", re.IGNORECASE)


def load(path: str | None, split: str) -> list[Problem]:
    """TACO with all its tests; problems without any are left out. The split ``all`` is both."""
    table.require_split("taco", split, *SIZES)
    problems = []
    for part in ("train", "test") if split == "all" else (split,):
        rows = table.rows(path, hub="BAAI/TACO", files=f"{part}/*.arrow", split=part)
        problems += [_problem(row, index, part) for index, row in enumerate(rows)]
    return [problem for problem in problems if problem.tests]


def _problem(row: table.Row, index: int, split: str) -> Problem:
    question = row.text("question")
    solutions = row.decoded("solutions") if row.get("solutions") else []
    difficulty = row.get("difficulty")
    return Problem(
        id=f"taco/{split}/{index}",
        source="taco",
        split=split,
        prompt=question,
        starter_code=row.get("starter_code") or None,
        tests=tests_of(row),
        cpu_s=seconds(row.get("time_limit")),
        memory_mb=mebibytes(row.get("memory_limit")),
        difficulty=difficulty.lower().replace("_", " ") if difficulty else None,
        canonical_solution=solutions[0] if solutions else None,
        comparison=table.comparison_of(question),
        provenance=row.where if not row.get("url") else f"{row.where} {row.text('url')}",
    )


def tests_of(row: table.Row) -> tuple[TestCase, ...]:
    """The tests in the column ``input_output``: with ``fn_name`` calls of a function, else stdin and stdout.

    Where every expected result of a function is a list of one element, that element is the result (the convention of
    the problems that come from Codewars).
    """
    if not row["input_output"]:
        return ()
    data = row.decoded("input_output")
    inputs, outputs = data.get("inputs", []), data.get("outputs", [])
    if len(inputs) != len(outputs):
        raise ValueError(f"{row.where}: input_output: {len(inputs)} inputs but {len(outputs)} outputs")
    name = data.get("fn_name")
    if not name:
        return tuple(
            StdinTest(stdin=_stream(stdin), expected_stdout=_stream(stdout))
            for stdin, stdout in zip(inputs, outputs, strict=True)
        )
    wrapped = all(isinstance(expected, list) and len(expected) == 1 for expected in outputs)
    return tuple(
        FunctionTest(name=name, args=tuple(arguments), expected=expected[0] if wrapped else expected)
        for arguments, expected in zip(inputs, outputs, strict=True)
    )


def _stream(value: Any) -> str:
    """A stream given as text, or as a list of its lines."""
    return "".join(f"{line}\n" for line in value) if isinstance(value, list) else str(value)


def seconds(limit: str | None) -> float | None:
    """``"2.0 seconds"`` as a number; None when a limit is unknown."""
    match = _TIME.search(limit or "")
    if match is None:
        return None
    return float(match[1]) / (1000.0 if match[2].lower().startswith("m") else 1.0)


def mebibytes(limit: str | None) -> int | None:
    """``"256.0 megabytes"`` as a number; None when a limit is unknown."""
    match = _MEMORY.search(limit or "")
    if match is None:
        return None
    scale = {"k": 1 / 1024, "m": 1.0, "g": 1024.0}[match[2][0].lower()]
    return max(round(float(match[1]) * scale), 1)
