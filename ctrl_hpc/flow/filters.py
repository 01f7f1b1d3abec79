"""Which synthesised critiques the critic is trained on in stage I."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence

from ctrl_hpc.flow.feedback import mentions_hint
from ctrl_hpc.flow.reward import agrees
from ctrl_hpc.records import Critique, Solution

DROPPED: dict[str, str] = {
    "not_executed": "the draft has no verdict, or an environment fault",
    "no_judgement": "the critique has no overall judgement, or several that disagree",
    "mentions_hint": "the critique gives away that it was shown the execution's result",
    "contradicts_execution": "the overall judgement is not what the execution showed",
    "surplus": "more critiques than asked for, or than balance allows",
}
"""Every reason for which a critique is dropped, in the order in which they are tested."""


def select(
    critiques_with_solutions: Sequence[tuple[Critique, Solution]],
    *,
    n: int,
    balance: bool,
    consistent_only: bool,
    seed: int,
) -> tuple[list[Critique], dict[str, int]]:
    """At most ``n`` critiques, in the order given, and how many were dropped for each reason of :data:`DROPPED`.

    ``balance`` keeps as many critiques of right drafts as of wrong ones; ``consistent_only`` drops those whose
    judgement contradicts the execution. What is surplus is drawn at random with ``seed``.
    """
    dropped: Counter[str] = Counter(dict.fromkeys(DROPPED, 0))
    of_right: list[int] = []
    of_wrong: list[int] = []
    for index, (critique, solution) in enumerate(critiques_with_solutions):
        fault = _fault(critique, solution, consistent_only=consistent_only)
        if fault is not None:
            dropped[fault] += 1
        elif solution.verdict is not None and solution.verdict.accepted:
            of_right.append(index)
        else:
            of_wrong.append(index)
    rng = random.Random(seed)
    if balance:
        each = min(n // 2, len(of_right), len(of_wrong))
        kept = rng.sample(of_right, each) + rng.sample(of_wrong, each)
    else:
        usable = of_right + of_wrong
        kept = rng.sample(usable, min(n, len(usable)))
    dropped["surplus"] = len(of_right) + len(of_wrong) - len(kept)
    return [critiques_with_solutions[index][0] for index in sorted(kept)], dict(dropped)


def _fault(critique: Critique, solution: Solution, *, consistent_only: bool) -> str | None:
    assert critique.solution_id == solution.id, f"{critique.id} does not belong to {solution.id}"
    if solution.verdict is None or solution.verdict.status in ("sandbox_error", "unsupported"):
        return "not_executed"
    if critique.judgement is None:
        return "no_judgement"
    if mentions_hint(critique.text):
        return "mentions_hint"
    if consistent_only and not agrees(critique.judgement, solution.verdict.accepted):
        return "contradicts_execution"
    return None
