"""MBPP+ (Liu et al. 2023): write a function from a one-line description and an example of its tests."""

from __future__ import annotations

import sys

from ctrl_hpc.data import evalplus, table
from ctrl_hpc.records import AssertTest, Problem

SIZE = 378
"""Problems of the whole data set."""


def load(path: str | None, split: str) -> list[Problem]:
    """MBPP+ with all its tests; problems whose tests need numpy itself are left out and named on stderr."""
    table.require_split("mbppplus", split, "test")
    problems, left_out = [], []
    for row in table.rows(path, hub="evalplus/mbppplus", split=split):
        try:
            problems.append(_problem(row))
        except evalplus.NeedsNumpy:
            left_out.append(str(row["task_id"]))
    if left_out:
        print(f"mbppplus: left out, as their tests need numpy: {', '.join(left_out)}", file=sys.stderr)
    return problems


def _problem(row: table.Row) -> Problem:
    examples = row["test_list"]
    if not isinstance(examples, list) or not examples:
        raise ValueError(f"{row.where}: test_list: expected a list of assertions")
    imports = "".join(f"{line}\n" for line in row.get("test_imports", []))
    return Problem(
        id=f"MBPP/{row['task_id']}",
        source="mbppplus",
        split="test",
        prompt=f"{row.text('prompt').strip()}\n\nYour code should pass this test:\n\n{examples[0]}",
        tests=(AssertTest(code=imports + evalplus.without_numpy(row.text("test"), row.where)),),
        canonical_solution=row.text("code"),
        provenance=row.where,
    )
