"""MBPP (Austin et al. 2021) and MBPP+ (Liu et al. 2023): write a function from a sentence and examples of its tests."""

from __future__ import annotations

from ctrl_hpc.data import evalplus, table
from ctrl_hpc.data.table import Loaded
from ctrl_hpc.records import AssertTest, Problem

PLUS_SIZE = 378
"""Problems of MBPP+."""
_HUB_SPLITS = {"prompt": (1, 10), "test": (11, 510), "validation": (511, 600), "train": (601, 974)}
"""The first and last task of each part, as published."""
_PARTS: dict[str, tuple[str, ...]] = {
    "test": ("test",),
    "validation": ("validation",),
    "dev": ("validation",),
    "train": ("train",),
    "train+validation": ("train", "validation"),
}
_PARTS["all"] = tuple(_HUB_SPLITS)
SIZES = {"test": 500, "validation": 90, "train": 374, "train+validation": 464, "all": 974}
"""Problems of each split; ``dev`` is another name of ``validation``."""


def load(path: str | None, split: str) -> Loaded[Problem]:
    """MBPP: the tasks of a split, by their numbers; the ten of the paper's prompt are in ``all`` alone."""
    table.require_split("mbpp", split, *_PARTS)
    parts = _PARTS[split]
    ranges = [_HUB_SPLITS[part] for part in parts]
    rows = (row for part in _read(path, parts) for row in part if _in(row, ranges))
    return table.problems(rows, _problem)


def _read(path: str | None, parts: tuple[str, ...]) -> list[list[table.Row]]:
    def read(split: str) -> list[table.Row]:
        return list(table.rows(path, hub="google-research-datasets/mbpp", config="full", split=split))

    if path is None or table.is_published(path):
        return [read(part) for part in parts]
    return [read("mbpp")]


def _in(row: table.Row, ranges: list[tuple[int, int]]) -> bool:
    number = row.values.get("task_id")
    return not isinstance(number, int) or any(first <= number <= last for first, last in ranges)


def _problem(row: table.Row) -> Problem:
    number = _number(row)
    tests = _texts(row, "test_list")
    setup = _imports(row) + (f"{row.text('test_setup_code')}\n" if row.get("test_setup_code") else "")
    said = row.text("text" if "text" in row.values else "prompt").strip()
    part = next((name for name, (first, last) in _HUB_SPLITS.items() if first <= number <= last), "test")
    return Problem(
        id=f"mbpp/{number}",
        source="mbpp",
        split="dev" if part == "validation" else part,
        prompt=f"{said}\n\nYour code should pass these tests:\n\n" + "\n".join(tests),
        tests=tuple(AssertTest(code=f"{setup}{test}\n") for test in tests),
        canonical_solution=row.text("code").replace("\r\n", "\n"),
        harness="mbpp",
        provenance=row.where,
    )


def _number(row: table.Row) -> int:
    number = row["task_id"]
    if type(number) is not int:
        raise ValueError(f"task_id: expected a number, got {type(number).__name__}")
    return number


def _imports(row: table.Row) -> str:
    """The lines that a row's tests begin with."""
    lines = row.get("test_imports", [])
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ValueError("test_imports: expected a list of lines")
    return "".join(f"{line}\n" for line in lines if line)


def _texts(row: table.Row, name: str) -> list[str]:
    texts = row[name]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name}: expected a list of assertions")
    return [text.replace("\r\n", "\n") for text in texts]


def load_plus(path: str | None, split: str) -> Loaded[Problem]:
    """MBPP+ with all its tests and every oracle of its own."""
    table.require_split("mbppplus", split, "test")
    return table.problems(table.rows(path, hub="evalplus/mbppplus", split=split), _plus)


def _plus(row: table.Row) -> Problem:
    examples = _texts(row, "test_list")
    return Problem(
        id=f"MBPP/{_number(row)}",
        source="mbppplus",
        split="test",
        prompt=f"{row.text('prompt').strip()}\n\nYour code should pass this test:\n\n{examples[0]}",
        tests=(AssertTest(code=_imports(row) + evalplus.without_numpy(row.text("test"), row.where)),),
        canonical_solution=row.text("code"),
        harness="mbpp",
        provenance=row.where,
    )
