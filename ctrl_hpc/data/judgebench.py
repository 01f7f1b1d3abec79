"""JudgeBench (Tan et al. 2024): pairs of answers to hard questions, one right and one wrong; which is which?"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from typing import Literal

from ctrl_hpc.data import table
from ctrl_hpc.jsonl import well_formed
from ctrl_hpc.records import Pair

SIZES = {"gpt": 350, "claude": 270}
"""Pairs of each split as published: of answers by GPT-4o, and by Claude 3.5 Sonnet; the paper judges the 350."""
_CATEGORIES = {
    "mmlu-pro": "knowledge",
    "livebench-reasoning": "reasoning",
    "livebench-math": "math",
    "livecodebench": "coding",
}
"""Category by the beginning of the source's name; another source, of pairs of one's own, is its own category."""


def load(path: str | None, split: str) -> list[Pair]:
    """The pairs of a split, ``gpt`` or ``claude``; those that cannot be read are left out and named on stderr."""
    table.require_split("judgebench", split, *SIZES)
    loaded = table.collect(table.rows(path, hub="ScalerLab/JudgeBench", split=split), pair_of)
    for line in table.lines(loaded.left_out):
        print(f"judgebench: {line}", file=sys.stderr)
    return loaded.items


def pair_of(row: table.Row) -> Pair:
    """A row of the data set; raises ValueError for one that is not as published."""
    source, label = row.text("source"), row.text("label")
    category = next((name for start, name in _CATEGORIES.items() if source.startswith(start)), source)
    right: dict[str, Literal["A", "B"]] = {"A>B": "A", "B>A": "B"}
    if label not in right:
        raise ValueError(f"{row.where}: label: {label!r} is not one of {', '.join(right)}")
    return Pair(
        id=row.text("pair_id"),
        category=category,
        source=source,
        question=well_formed(row.text("question")),
        answer_a=well_formed(row.text("response_A")),
        answer_b=well_formed(row.text("response_B")),
        right=right[label],
        provenance=row.where,
    )


def categories(pairs: Iterable[Pair]) -> dict[str, int]:
    """How many pairs each category has."""
    return dict(Counter(pair.category for pair in pairs).most_common())
