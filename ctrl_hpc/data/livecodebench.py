"""LiveCodeBench (Jain et al. 2024): contest problems by date, from stdin to stdout or as a method of ``Solution``."""

from __future__ import annotations

import base64
import binascii
import io
import json
import pickle
import re
import zlib
from typing import Any

from ctrl_hpc.data import table
from ctrl_hpc.records import FunctionTest, Problem, StdinTest, TestCase

SIZE = 112
"""Problems of the paper's window."""
WINDOW = ("2024-08", "2024-11")
"""Months, both included, of the split ``test``: the paper's window (112 problems)."""
_WINDOW = re.compile(r"(\d{4}-\d{2})\.\.(\d{4}-\d{2})")


def load(path: str | None, split: str) -> list[Problem]:
    """The problems of a window of months: ``test`` is the paper's, ``2024-10..2025-01`` any other, ``all`` all."""
    first, last = window(split)
    rows = table.rows(path, hub="livecodebench/code_generation_lite", files="test*.jsonl", split="test")
    return [_problem(row) for row in rows if first <= row.text("contest_date")[:7] <= last]


def window(split: str) -> tuple[str, str]:
    """The first and last month of a split, as ``YYYY-MM``."""
    match = _WINDOW.fullmatch(split)
    if match:
        return match[1], match[2]
    known = {"test": WINDOW, "all": ("0000-00", "9999-99")}
    if split not in known:
        raise ValueError(f"data: livecodebench has no split {split!r}; allowed: test, all, or YYYY-MM..YYYY-MM")
    return known[split]


def _problem(row: table.Row) -> Problem:
    metadata = row.decoded("metadata") if row.get("metadata") else {}
    name = metadata.get("func_name")
    cases = [*row.decoded("public_test_cases"), *_private(row)]
    return Problem(
        id=f"livecodebench/{row.text('question_id')}",
        source="livecodebench",
        split="test",
        prompt=row.text("question_content"),
        starter_code=row.get("starter_code") or None,
        tests=tuple(_test(case, name, row.where) for case in cases),
        difficulty=row.get("difficulty"),
        comparison="livecodebench",
        provenance=row.where,
    )


def _test(case: dict[str, Any], name: str | None, where: str) -> TestCase:
    if case.get("testtype") != "functional":
        return StdinTest(stdin=case["input"], expected_stdout=case["output"])
    if name is None:
        raise ValueError(f"{where}: metadata: func_name: missing; the tests call a function")
    try:
        arguments = tuple(json.loads(line) for line in case["input"].split("\n") if line.strip())
        return FunctionTest(name=name, args=arguments, expected=json.loads(case["output"]))
    except ValueError as error:
        raise ValueError(f"{where}: a functional test is not JSON: {error}") from None


def _private(row: table.Row) -> list[dict[str, Any]]:
    """The hidden tests: JSON, or JSON that was pickled, compressed and written in base64."""
    text = row["private_test_cases"]
    if not isinstance(text, str):
        return list(text or [])
    if text.lstrip().startswith("["):
        return list(row.decoded("private_test_cases"))
    try:
        content = _TextUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(text, validate=True)))).load()
        return list(json.loads(content))
    except (binascii.Error, zlib.error, pickle.UnpicklingError, EOFError, ValueError, TypeError) as error:
        raise ValueError(f"{row.where}: private_test_cases: cannot be decoded: {error}") from None


class _TextUnpickler(pickle.Unpickler):
    """Reads pickled plain data; anything that names a class or a function, and so could run code, is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"holds {module}.{name}, not plain text")
