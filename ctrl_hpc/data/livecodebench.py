"""LiveCodeBench (Jain et al. 2024): contest problems by date, from stdin to stdout or as a method of ``Solution``."""

from __future__ import annotations

import base64
import binascii
import datetime
import io
import json
import pickle
import re
import zlib
from dataclasses import dataclass
from typing import Any

from ctrl_hpc.data import table
from ctrl_hpc.data.table import Loaded
from ctrl_hpc.records import FunctionTest, Problem, StdinTest, TestCase

SIZE = 112
"""Problems of the paper's window."""
_RELEASES = 6
"""Releases so far: release_v1 is the file test.jsonl, every later one adds a file of its own."""
PAPER = "release_v4:2024-08-01..2024-11-01"
"""The split ``test``: what the paper's code evaluates on."""
_MONTH, _DAY = r"\d{4}-\d{2}", r"\d{4}-\d{2}-\d{2}"
_WINDOW = re.compile(rf"(?P<first>{_DAY}|{_MONTH})\.\.(?P<last>{_DAY}|{_MONTH})")
_RELEASE = re.compile(r"release_(?:v(?P<upto>\d)|latest)|v(?P<first>\d)(?:_v(?P<last>\d))?")
_ALLOWED = (
    "test, all, a release (release_v1..release_v6, v5, v4_v6), dates (2024-08..2024-11), or release_v4:2024-08-01.."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Which problems a split holds: those of some files whose contest was in a time."""

    files: tuple[str, ...]
    first: datetime.datetime = datetime.datetime.min
    last: datetime.datetime = datetime.datetime.max
    """The last moment: of a month its end, of a day its beginning, as in LiveCodeBench's own code."""


def load(path: str | None, split: str, *, keep: table.Keep = table.as_it_is) -> Loaded[Problem]:
    """The problems of a split: ``test`` is the paper's 112, ``all`` all, else a release, a window of dates, or both.

    In a folder the releases' files are read, as they are named on the hub; a single file is taken for the release's.
    """
    part = parts(split)
    rows = table.rows(path, hub="livecodebench/code_generation_lite", files=part.files, split="test")
    return table.problems((row for row in rows if _in(row, part)), _problem, keep)


def parts(split: str) -> Part:
    """What a split's name means. Raises ValueError for a name that means nothing."""
    known = {"test": PAPER, "all": "release_latest"}
    text = known.get(split, split)
    release, _, window = f":{text}".rpartition(":") if _WINDOW.fullmatch(text) else text.partition(":")
    release = release.lstrip(":")
    files, dates = _files(release or "release_latest"), _WINDOW.fullmatch(window)
    if not text or not files or (window and dates is None):
        raise ValueError(f"data: livecodebench has no split {split!r}; allowed: {_ALLOWED}")
    if dates is None:
        return Part(files=files)
    try:
        return Part(files=files, first=_moment(dates["first"], end=False), last=_moment(dates["last"], end=True))
    except ValueError:
        raise ValueError(f"data: livecodebench has no split {split!r}; allowed: {_ALLOWED}") from None


def _files(release: str) -> tuple[str, ...]:
    match = _RELEASE.fullmatch(release)
    if match is None:
        return ()
    first = int(match["first"] or 1)
    last = int(match["upto"] or match["last"] or match["first"] or _RELEASES)
    if not 1 <= first <= last <= _RELEASES:
        return ()
    return tuple(f"test{number if number > 1 else ''}.jsonl" for number in range(first, last + 1))


def _moment(text: str, *, end: bool) -> datetime.datetime:
    if len(text) == len("2024-08-01"):
        return datetime.datetime.fromisoformat(text)
    month = datetime.datetime.fromisoformat(f"{text}-01")
    if not end:
        return month
    return (month + datetime.timedelta(days=32)).replace(day=1) - datetime.timedelta(microseconds=1)


def _in(row: table.Row, part: Part) -> bool:
    """Whether a row belongs to the split; a bad one does, so that it is counted."""
    if row.fault:
        return True
    try:
        return part.first <= row.date("contest_date") <= part.last
    except ValueError:
        return True


def _problem(row: table.Row) -> Problem:
    row.date("contest_date")
    metadata = row.decoded("metadata") if row.get("metadata") else {}
    name = metadata.get("func_name")
    cases = [*row.decoded("public_test_cases"), *_private(row)]
    return Problem(
        id=f"livecodebench/{row.text('question_id')}",
        source="livecodebench",
        split="test",
        prompt=row.text("question_content"),
        starter_code=row.get("starter_code") or None,
        tests=tuple(_test(case, name) for case in cases),
        difficulty=row.get("difficulty"),
        comparison="livecodebench",
        harness="livecodebench",
        provenance=row.where,
    )


def _test(case: dict[str, Any], name: str | None) -> TestCase:
    if case.get("testtype") != "functional":
        return StdinTest(stdin=case["input"], expected_stdout=case["output"])
    if name is None:
        raise ValueError("metadata: func_name: missing; the tests call a function")
    try:
        arguments = tuple(json.loads(line) for line in case["input"].split("\n") if line.strip())
        return FunctionTest(name=name, args=arguments, expected=json.loads(case["output"]))
    except ValueError as error:
        raise ValueError(f"a functional test is not JSON: {error}") from None


def _private(row: table.Row) -> list[dict[str, Any]]:
    """The hidden tests: JSON, or JSON that was pickled, compressed and written in base64."""
    text = row["private_test_cases"]
    if not isinstance(text, str):
        return list(text or [])
    if text.lstrip().startswith("["):
        return list(row.decoded("private_test_cases"))
    try:
        content = _TextUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(text, validate=True)))).load()
        return list(json.loads(content) if isinstance(content, (str, bytes)) else content)
    except (binascii.Error, zlib.error, pickle.UnpicklingError, EOFError, ValueError, TypeError) as error:
        raise ValueError(f"private_test_cases: cannot be decoded: {error}") from None


class _TextUnpickler(pickle.Unpickler):
    """Reads pickled plain data; anything that names a class or a function, and so could run code, is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"holds {module}.{name}, not plain text")
