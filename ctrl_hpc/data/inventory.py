"""What a data set holds, beside what the paper says of it; and where it came from."""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ctrl_hpc.data import codecontests, humaneval, judgebench, livecodebench, mbpp, taco
from ctrl_hpc.records import Pair, Problem

PAPER: dict[tuple[str, str], tuple[int, str]] = {
    ("taco", "train"): (taco.SIZES["train"], "published; the paper trains on 18820 of train and test together"),
    ("taco", "test"): (taco.SIZES["test"], "published"),
    ("taco", "all"): (taco.SIZES["all"], "arXiv 2502.03492: 26443, of which it trains on 18820"),
    ("codecontests", "train"): (codecontests.SIZES["train"], "published"),
    ("codecontests", "dev"): (codecontests.SIZES["valid"], "published"),
    ("codecontests", "test"): (codecontests.SIZES["test"], "arXiv 2502.03492, from its pass rates"),
    ("livecodebench", "test"): (
        livecodebench.SIZE,
        "arXiv 2502.03492, from its pass rates: release_v4, 2024-08-01 to 2024-11-01",
    ),
    ("mbppplus", "test"): (mbpp.PLUS_SIZE, "arXiv 2502.03492, from its pass rates"),
    **{("mbpp", split): (size, "published") for split, size in mbpp.SIZES.items()},
    ("humaneval", "test"): (humaneval.SIZE, "published"),
    ("humanevalplus", "test"): (humaneval.SIZE, "published"),
    ("judgebench", "gpt"): (judgebench.SIZES["gpt"], "arXiv 2502.03492"),
    ("judgebench", "claude"): (judgebench.SIZES["claude"], "published"),
}
"""Problems that a split should have, and who says so."""


def expected(name: str, split: str) -> tuple[int, str] | None:
    """How many problems a split should have and who says so; None when nobody does."""
    return PAPER.get((name, split))


def describe(name: str, split: str, items: Sequence[Problem] | Sequence[Pair]) -> dict[str, Any]:
    """Counts of a data set's problems, the size it should have, and the places it was read from."""
    said = expected(name, split)
    out: dict[str, Any] = {
        "data_set": name,
        "split": split,
        "problems": len(items),
        "expected": None if said is None else said[0],
        "expected_source": None if said is None else said[1],
        "sources": sources(items),
    }
    problems = [item for item in items if isinstance(item, Problem)]
    if problems:
        tests = [len(problem.tests) for problem in problems]
        kinds = Counter(type(test).__name__ for problem in problems for test in problem.tests)
        out |= {
            "tests": sum(tests),
            "tests_median": statistics.median(tests),
            "test_kinds": dict(kinds.most_common()),
            "difficulty": dict(Counter(problem.difficulty or "unknown" for problem in problems).most_common()),
            "with_canonical_solution": sum(problem.canonical_solution is not None for problem in problems),
            "with_time_limit": sum(problem.cpu_s is not None for problem in problems),
            "with_memory_limit": sum(problem.memory_mb is not None for problem in problems),
        }
    else:
        out["categories"] = judgebench.categories(item for item in items if isinstance(item, Pair))
    return out


def sources(items: Sequence[Problem] | Sequence[Pair]) -> dict[str, dict[str, Any]]:
    """The files and data sets that the items name as their provenance: how many each, and of files the SHA-256."""
    places = Counter(_place(item.provenance) for item in items if item.provenance)
    out: dict[str, dict[str, Any]] = {}
    for place, count in places.items():
        out[place] = {"problems": count}
        if Path(place).is_file():
            with open(place, "rb") as file:
                out[place]["sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
    return out


def _place(provenance: str) -> str:
    """``FILE:LINE``, or ``HUB[ROW]``, without the line or row and without an address after it."""
    first = provenance.split(" http")[0]
    return first[: first.rindex("[")] if first.endswith("]") else first.rpartition(":")[0] or first


def lines(facts: dict[str, Any]) -> list[str]:
    """The description for people."""
    size = f"{facts['problems']} problems"
    if facts["expected"] is not None:
        difference = facts["problems"] - facts["expected"]
        as_said = "as it should be" if difference == 0 else f"{difference:+d} against {facts['expected']}"
        size += f" ({as_said}; {facts['expected_source']})"
    out = [f"{facts['data_set']}, split {facts['split']}: {size}"]
    for key in ("tests", "tests_median", "test_kinds", "difficulty", "categories"):
        if key in facts:
            shown = facts[key]
            if isinstance(shown, dict):
                shown = ", ".join(f"{name} {count}" for name, count in shown.items())
            out.append(f"  {key.replace('_', ' ')}: {shown}")
    if "tests" in facts:
        limits = f"time limit {facts['with_time_limit']}, memory limit {facts['with_memory_limit']}"
        out.append(f"  with: canonical solution {facts['with_canonical_solution']}, {limits}")
    for place, about in facts["sources"].items():
        hashed = f", sha256 {about['sha256'][:16]}..." if "sha256" in about else ""
        out.append(f"  from {place}: {about['problems']}{hashed}")
    return out
