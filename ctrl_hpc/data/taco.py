"""TACO (Li et al. 2023): competition problems with stdin or function tests; the paper's training data."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ctrl_hpc import jsonl
from ctrl_hpc.data import table
from ctrl_hpc.data.statement import comparison_of, with_options
from ctrl_hpc.data.table import Loaded
from ctrl_hpc.records import FunctionTest, Problem, StdinTest, TestCase

SIZES = {"train": 25443, "test": 1000, "all": 26443}
"""Problems of each split as published; the paper trains on 18820 of all 26443."""
_TIME = re.compile(r"([\d.]+)\s*(milliseconds?|ms|seconds?|secs?|s)\b", re.IGNORECASE)
_MEMORY = re.compile(r"([\d.]+)\s*(kilobytes?|megabytes?|gigabytes?|kb|mb|gb|kib|mib|gib)\b", re.IGNORECASE)


_SPECIAL_JUDGES = "output_spj.jsonl"
"""TACO's list of the test problems that need a special judge, of its repository; read where it lies with the data."""
_SPECIAL = {0: "any", 1: "any", 2: "nocase", 3: "float"}
"""What its classes mean: unclassed, several right answers, any letter case, an error allowed."""
_LONGEST_EXAMPLE = 400


def load(
    path: str | None, split: str, *, list_streams: bool = True, keep: table.Keep = table.as_it_is
) -> Loaded[Problem]:
    """TACO with all its tests; the split ``all`` is both. Without ``list_streams`` stdin tests given as lists go."""
    table.require_split("taco", split, *SIZES)
    found: Loaded[Problem] = Loaded(items=[])
    special = _special_judges(path)
    for part in ("train", "test") if split == "all" else (split,):
        rows = table.rows(path, hub="BAAI/TACO", files=(f"{part}/*.arrow",), split=part)
        judges = special if part == "test" else {}
        made = partial(_problem, split=part, special=judges, list_streams=list_streams)
        loaded = table.problems(rows, made, keep)
        found.items.extend(loaded.items)
        found.left_out.extend(loaded.left_out)
    return found


def _special_judges(path: str | None) -> dict[int, int]:
    """The class of every test problem that needs a special judge; empty where the list is not there."""
    place = Path(path) if path is not None else None
    file = (place if place is None or place.is_dir() else place.parent) if place else None
    if file is None or not (file / _SPECIAL_JUDGES).is_file():
        return {}
    lines = (file / _SPECIAL_JUDGES).read_text(encoding="utf-8-sig").splitlines()
    try:
        entries = [json.loads(line) for line in lines if line.strip()]
        return {entry["idx"]: entry["case"] for entry in entries if entry["special_judge"]}
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{file / _SPECIAL_JUDGES}: not TACO's list of special judges: {error}") from None


def _problem(row: table.Row, *, split: str, special: Mapping[int, int], list_streams: bool) -> Problem:
    question = row.text("question")
    solutions = row.decoded("solutions") if row.get("solutions") else []
    difficulty = row.get("difficulty")
    tests = _tests_of(row, list_streams=list_streams)
    starter = row.get("starter_code") or None
    return Problem(
        id=f"taco/{split}/{row.number}",
        source="taco",
        split=split,
        prompt=question + _naming(question, starter, tests),
        starter_code=starter,
        tests=tests,
        cpu_s=seconds(row.get("time_limit")),
        memory_mb=mebibytes(row.get("memory_limit")),
        difficulty=difficulty.lower().replace("_", " ") if difficulty else None,
        canonical_solution=table.python3([text for text in solutions if isinstance(text, str)]),
        comparison=_comparison(question, special.get(row.number)),
        harness="taco",
        provenance=row.where if not row.get("url") else f"{row.where} {row.text('url')}",
    )


def _comparison(question: str, special: int | None) -> str | None:
    """As the statement says, and as TACO's list does."""
    said = comparison_of(question)
    if special is None:
        return said
    mode, _, text = (said or "exact").partition(":")
    option = _SPECIAL.get(special, "any")
    options = [part for part in text.split(",") if part]
    if option == "float":
        return with_options("float", options)
    return with_options(mode, options if option in options else [*options, option])


def _naming(question: str, starter: str | None, tests: tuple[TestCase, ...]) -> str:
    """What tells the name of the function that the tests call, where nothing else does: the shortest test."""
    calls = [test for test in tests if isinstance(test, FunctionTest)]
    if not calls or calls[0].name in (starter or "") or f"{calls[0].name}(" in question:
        return ""
    examples = (f"assert {test.name}({', '.join(map(repr, test.args))}) == {test.expected!r}" for test in calls[:20])
    shortest = min(examples, key=len)
    if len(shortest) <= _LONGEST_EXAMPLE:
        return f"\n\nYour code should pass this test:\n\n```python\n{shortest}\n```"
    return f"\n\nWrite a function `{calls[0].name}` of {len(calls[0].args)} argument(s)."


def _tests_of(row: table.Row, *, list_streams: bool = True) -> tuple[TestCase, ...]:
    """The tests in the column ``input_output``: with ``fn_name`` calls of a function, else stdin and stdout.

    Where every expected result of a function is a list of one element, that element is the result (the convention of
    the problems that come from Codewars). Integer keys of dictionaries, which JSON made text, are integers again.
    Calls whose arguments are given as text are left out.
    """
    if not row["input_output"]:
        return ()
    data = row.decoded("input_output")
    inputs, outputs = data.get("inputs", []), data.get("outputs", [])
    for key, given in (("inputs", inputs), ("outputs", outputs)):
        if not isinstance(given, list):
            raise ValueError(f"input_output: {key}: expected a list, got {type(given).__name__}")
    if len(inputs) != len(outputs):
        raise ValueError(f"{row.where}: input_output: {len(inputs)} inputs but {len(outputs)} outputs")
    name = data.get("fn_name")
    if name and not isinstance(name, str):
        raise ValueError(f"input_output: fn_name: expected text, got {type(name).__name__}")
    pairs = list(zip(inputs, outputs, strict=True))
    if not name:
        return tuple(
            StdinTest(stdin=_stream(stdin), expected_stdout=_stream(stdout))
            for stdin, stdout in pairs
            if list_streams or not (isinstance(stdin, list) or isinstance(stdout, list))
        )
    calls = [(arguments, expected) for arguments, expected in pairs if isinstance(arguments, list)]
    if not calls and pairs:
        raise ValueError(f"input_output: the arguments of {name} are not lists")
    wrapped = all(isinstance(expected, list) and len(expected) == 1 for _, expected in calls)
    return tuple(
        FunctionTest(
            name=name,
            args=tuple(jsonl.integer_keys(item) if index == 0 else item for index, item in enumerate(arguments)),
            expected=_result(expected[0] if wrapped else expected),
        )
        for arguments, expected in calls
    )


def _result(expected: Any) -> Any:
    """A result with its integer keys: of a dictionary, or of one that is first in a list, as TACO's code has it."""
    if isinstance(expected, list) and expected and isinstance(expected[0], dict):
        return [jsonl.integer_keys(expected[0]), *expected[1:]]
    return jsonl.integer_keys(expected)


def _stream(value: Any) -> str:
    """A stream given as text or a number, or as a list of its lines."""
    if isinstance(value, list):
        return "".join(f"{_line(line)}\n" for line in value)
    return _line(value)


def _line(value: Any) -> str:
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"input_output: expected text or a list of lines, got {type(value).__name__}")
    return str(value)


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
