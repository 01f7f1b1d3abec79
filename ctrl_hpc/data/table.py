"""Rows of a published data set, from the hub or local files, made into records; a bad row is left out and named."""

from __future__ import annotations

import ast
import datetime
import gzip
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ctrl_hpc.flow.fences import parsed
from ctrl_hpc.harness import harness
from ctrl_hpc.jsonl import well_formed
from ctrl_hpc.records import AssertTest, FunctionTest, Problem, StdinTest, TestCase
from ctrl_hpc.sandbox.judge import COMPARISONS, rule

ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".parquet", ".arrow")
"""Files that can be read."""
_ROWS = 64
"""Rows of a table that are Python objects at a time."""
HUB_FILES = "hf://datasets/"
"""Where the files of the hub's data sets lie."""
_BAD_ROW = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)
"""What a row that is not as published raises."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row and where it came from."""

    where: str
    values: dict[str, Any]
    number: int = 0
    """Its place in the split, from 0."""
    fault: str = ""
    """Why the row could not be read; empty when it could."""

    def __getitem__(self, name: str) -> Any:
        """The value of a column; raises ValueError when the row lacks it."""
        if name not in self.values:
            raise ValueError(f"{self.where}: {name}: missing; the row has {', '.join(sorted(self.values))}")
        return self.values[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a column that need not be there; ``default`` for None too."""
        value = self.values.get(name)
        return default if value is None else value

    def text(self, name: str) -> str:
        """A column that must be text."""
        value = self[name]
        if not isinstance(value, str):
            raise ValueError(f"{self.where}: {name}: expected text, got {type(value).__name__}")
        return value

    def decoded(self, name: str) -> Any:
        """A column that holds JSON as text; what is not text is returned as it is."""
        value = self[name]
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.where}: {name}: not JSON: {error}") from None

    def date(self, name: str) -> datetime.datetime:
        """A column that is a moment: as such, as text of ISO 8601, or in milliseconds since 1970; without a zone."""
        value = self[name]
        if isinstance(value, datetime.datetime):
            return value.replace(tzinfo=None)
        if isinstance(value, datetime.date):
            return datetime.datetime(value.year, value.month, value.day)
        try:
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return datetime.datetime.fromtimestamp(value / 1000, datetime.UTC).replace(tzinfo=None)
            return datetime.datetime.fromisoformat(value).replace(tzinfo=None)
        except (ValueError, TypeError, OverflowError, OSError):
            raise ValueError(f"{self.where}: {name}: {value!r} is not a date") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A row that did not become a record."""

    where: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded[R]:
    """The records of a data set, and the rows that were left out."""

    items: list[R]
    left_out: list[LeftOut] = field(default_factory=list)


def collect[R](rows: Iterable[Row], make: Callable[[Row], R]) -> Loaded[R]:
    """A record for each row; rows that cannot be read, or that ``make`` refuses, are left out.

    Raises ValueError with the first row's fault when every row is bad.
    """
    items: list[R] = []
    left_out: list[LeftOut] = []
    for row in rows:
        try:
            if row.fault:
                raise ValueError(row.fault)
            items.append(make(row))
        except _BAD_ROW as error:
            reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            left_out.append(LeftOut(where=row.where, reason=_short(reason.removeprefix(f"{row.where}: "))))
    if left_out and not items:
        others = f" (and {len(left_out) - 1} more rows)" if len(left_out) > 1 else ""
        raise ValueError(f"{left_out[0].where}: {left_out[0].reason}{others}")
    return Loaded(items=items, left_out=left_out)


def lines(left_out: Sequence[LeftOut], most: int = 20) -> list[str]:
    """The rows that were left out, for people: how many, and the first ``most`` by name."""
    if not left_out:
        return []
    more = [f"  and {len(left_out) - most} more"] if len(left_out) > most else []
    named = [f"  {item.where}: {item.reason}" for item in left_out[:most]]
    return [f"{len(left_out)} bad rows left out", *named, *more]


Keep = Callable[[Problem], Problem]
"""What becomes of a problem as soon as it is read: a store takes its tests, so that nothing holds a data set's."""


def as_it_is(problem: Problem) -> Problem:
    """The problem, tests and all."""
    return problem


def problems(rows: Iterable[Row], make: Callable[[Row], Problem], keep: Keep = as_it_is) -> Loaded[Problem]:
    """As :func:`collect`, for problems: those whose tests check nothing, or cannot be run, are left out too.

    The second problem of an id gets ``#2`` behind it. ``keep`` has the last word on each.
    """
    seen: Counter[str] = Counter()

    def made(row: Row) -> Problem:
        problem = usable(make(row))
        seen[problem.id] += 1
        return keep(problem if seen[problem.id] == 1 else replace(problem, id=f"{problem.id}#{seen[problem.id]}"))

    return collect(rows, made)


def usable(problem: Problem) -> Problem:
    """A problem with its texts well formed, and only such limits and known-wrong programs as can be.

    Raises ValueError when its tests check nothing or cannot be encoded, and for an unknown harness or comparison.
    """
    if not problem.tests:
        raise ValueError("no tests")
    tests = tuple(map(_encodable, problem.tests))
    printed = [test.expected_stdout for test in problem.tests if isinstance(test, StdinTest)]
    if len(printed) == len(problem.tests) and not any(map(str.strip, printed)):
        raise ValueError("every expected output is empty: a program that does nothing would pass")
    harness(problem.harness or "")
    if problem.comparison is not None and problem.comparison.partition(":")[0] in COMPARISONS:
        rule(problem.comparison)
    texts: dict[str, Any] = {name: _text(name, getattr(problem, name)) for name in _TEXTS}
    for name in ("id", "prompt"):
        if not texts[name].strip(" /\t\r\n\0"):
            raise ValueError(f"{name}: empty")
    wrong = [program for program in problem.wrong_solutions or () if isinstance(program, str)]
    return replace(
        problem,
        **texts,
        cpu_s=problem.cpu_s if problem.cpu_s is not None and 0 < problem.cpu_s <= _LONGEST_S else None,
        memory_mb=problem.memory_mb if problem.memory_mb is not None and 0 < problem.memory_mb <= _LARGEST_MB else None,
        wrong_solutions=None if problem.wrong_solutions is None else tuple(map(well_formed, wrong)),
        tests=tests,
    )


_TEXTS = ("id", "prompt", "starter_code", "difficulty", "canonical_solution", "checker", "provenance")
_LONGEST_S, _LARGEST_MB = 3600.0, 1 << 20
"""Limits beyond these are no judge's: the row's are unknown."""


def _text(name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{name}: expected text, got {type(value).__name__}")
    return None if value is None else well_formed(value)


def _encodable(test: TestCase) -> TestCase:
    texts = {
        StdinTest: ("stdin", "expected_stdout"),
        AssertTest: ("code",),
        FunctionTest: ("name",),
    }[type(test)]
    for name in texts:
        text = getattr(test, name)
        if not isinstance(text, str):
            raise ValueError(f"tests: {name}: expected text, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(f"tests: {name}: holds a lone surrogate, which cannot be encoded") from None
    if isinstance(test, AssertTest):
        _require_check(test.code)
    if isinstance(test, FunctionTest) and not test.name.isidentifier():
        raise ValueError(f"tests: name: {test.name!r} is not a function's name")
    return test


_TOO_LONG = 200_000
"""Characters of test code that are not parsed here."""


def _require_check(code: str) -> None:
    """Raise ValueError for test code that is not Python, or that neither asserts nor calls anything."""
    if len(code) > _TOO_LONG:
        return
    tree = parsed(code)
    if tree is None:
        raise ValueError("tests: code: not Python")
    if not any(isinstance(node, (ast.Assert, ast.Raise, ast.Call)) for node in ast.walk(tree)):
        raise ValueError("tests: code: checks nothing: every program would pass")


def _short(text: str) -> str:
    text = " ".join(well_formed(text).split())
    return text if len(text) <= 300 else text[:297] + "..."


def rows(
    path: str | None, *, hub: str, files: Sequence[str] = (), config: str | None = None, split: str
) -> Iterator[Row]:
    """The rows of one split: of ``hub`` when ``path`` is None, else of a file or a folder of files.

    ``files`` names the files of a hub's data set that a program of its own would read, which is not run; ``config``
    is the part of a data set that has several. A local folder with the hub's README.md is read as the hub's is.

    Other files may be JSON lines (also gzipped), a JSON list, parquet or arrow; in a folder with files named after
    several splits, those of the split are read.
    """
    place = None if path is None else Path(path)
    if place is None or is_published(place):
        yield from _published(hub if place is None else str(place), place, files, config, split)
        return
    count = 0
    for file in _files(place, files, split):
        before = count
        for line, values in _file_rows(file):
            yield _row(f"{file}:{line}", values, count)
            count += 1
        if count == before:
            raise ValueError(f"{file}: holds no rows")


def is_published(place: str | Path) -> bool:
    """Whether a local folder is laid out as the hub's repositories are: with a README.md that describes it."""
    return (Path(place) / "README.md").is_file()


def _row(where: str, values: Any, number: int) -> Row:
    if isinstance(values, _Unreadable):
        return Row(where=where, values={}, number=number, fault=values.reason)
    if not isinstance(values, dict):
        fault = f"expected an object, got {type(values).__name__}"
        return Row(where=where, values={}, number=number, fault=fault)
    return Row(where=where, values=values, number=number)


def require_split(name: str, split: str, *allowed: str) -> None:
    """Raise ValueError unless a data set has a split."""
    if split not in allowed:
        raise ValueError(f"data: {name} has no split {split!r}; allowed: {', '.join(allowed)}")


def _published(hub: str, folder: Path | None, files: Sequence[str], config: str | None, split: str) -> Iterator[Row]:
    """The rows that ``datasets`` reads: of the hub, where it keeps them for later, or of a local folder."""
    import datasets

    # Rows come as lines of text where they are JSON: read as a table, one bad line or odd type would lose them all.
    kind = "text" if files and files[0].endswith(".jsonl") else "arrow"
    base = HUB_FILES + hub if folder is None else str(folder)
    number = -1
    try:
        if files:
            places = {split: [f"{base}/{name}" for name in files]}
            table = datasets.load_dataset(kind, data_files=places, split=split, streaming=folder is not None)
        else:
            table = datasets.load_dataset(hub, config, split=split, streaming=folder is not None)
        for number, values in enumerate(table):
            read = _json(values["text"].removeprefix("\ufeff")) if files and kind == "text" else dict(values)
            if not (files and kind == "text" and not values["text"].strip()):
                yield _row(f"{hub}[{number}]", read, number)
    except (OSError, ValueError, datasets.exceptions.DatasetsError, *_client_errors()) as error:
        reason = " ".join(str(error).split())[:200]
        where = "from the hub" if folder is None else "as the hub's layout"
        advice = "; give local files with data.path" if folder is None else ""
        raise ValueError(f"{hub}: cannot be loaded {where} ({reason}){advice}") from None
    if number < 0:
        raise ValueError(f"{hub}: holds no rows of the split {split}")


def _client_errors() -> list[type[Exception]]:
    """What the hub's HTTP client raises without a network; which client that is depends on the hub's version."""
    return [sys.modules[name].HTTPError for name in ("httpx", "httpx2") if name in sys.modules]


def _files(place: Path, names: Sequence[str], split: str) -> list[Path]:
    if place.is_file():
        if not place.name.endswith(ENDINGS):
            raise ValueError(f"{place}: cannot be read; allowed: {', '.join(ENDINGS)}")
        return [place]
    if not place.is_dir():
        raise ValueError(f"data.path: {place}: no such file or folder")
    asked = {name: sorted(place.glob(name)) for name in names}
    if any(asked.values()):
        missing = [name for name, found in asked.items() if not found]
        if missing:
            raise ValueError(f"data.path: {place}: has no {', '.join(missing)}")
        return [file for found in asked.values() for file in found]
    found = sorted(file for file in place.rglob("*") if file.name.endswith(ENDINGS) and _is_data(file))
    own = [
        file for file in found if split in re.split(r"[-_.\d]+", file.name) or split in file.relative_to(place).parts
    ]
    if not found:
        raise ValueError(f"data.path: {place}: holds no file that ends in {', '.join(ENDINGS)}")
    return own or found


def _is_data(file: Path) -> bool:
    """Whether a file is not one of those that describe a saved data set."""
    return file.name not in ("dataset_info.json", "state.json", "dataset_dict.json", "dataset_infos.json")


@dataclass(frozen=True, slots=True)
class _Unreadable:
    reason: str


def _json(text: str | bytes) -> Any:
    """A line's value, or why it has none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return _Unreadable(f"not JSON: {error}")


def _file_rows(file: Path) -> Iterable[tuple[int, Any]]:
    """The rows with their numbers from 1; of JSON lines the lines' numbers."""
    if file.name.endswith((".jsonl", ".jsonl.gz")):
        return _json_lines(file)
    if file.suffix == ".json":
        try:
            content = json.loads(file.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}: not JSON: {error}") from None
        if not isinstance(content, list):
            raise ValueError(f"{file}: expected a list of rows, got {type(content).__name__}")
        return enumerate(content, start=1)
    return enumerate(_columns(file), start=1)


def _json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if text.strip():
                    yield number, _json(text)
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{file}: {error}") from None


def _columns(file: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.ipc
    import pyarrow.parquet

    try:
        if file.suffix == ".parquet":
            with pyarrow.parquet.ParquetFile(file) as table:
                for batch in table.iter_batches(batch_size=_ROWS):
                    yield from batch.to_pylist()
            return
        with pyarrow.memory_map(str(file)) as source:
            try:
                stream: Any = pyarrow.ipc.open_stream(source)
            except pyarrow.ArrowInvalid:
                whole = pyarrow.ipc.open_file(source)
                stream = (whole.get_batch(number) for number in range(whole.num_record_batches))
            for batch in stream:
                for start in range(0, batch.num_rows, _ROWS):
                    yield from batch.slice(start, _ROWS).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())[:200]}") from None


def python3(programs: Sequence[str]) -> str | None:
    """The first program that is Python 3, else the first: many published ones are Python 2."""
    return next(
        (program for program in programs[:20] if parsed(program) is not None), programs[0] if programs else None
    )
