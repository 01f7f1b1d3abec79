"""Which synthesised critiques the critic is trained on in stage I."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ctrl_hpc.flow.feedback import mentions_hint
from ctrl_hpc.flow.reward import agrees, leaks_solution
from ctrl_hpc.records import Critique, Solution

DROPPED: dict[str, str] = {
    "not_executed": "the draft has no verdict, or an environment fault",
    "no_judgement": "the critique has no overall judgement, or several that disagree",
    "mentions_hint": "the critique gives away that it was shown the execution's result",
    "contradicts_execution": "the overall judgement is not what the execution showed",
    "surplus": "more critiques than asked for, or than balance allows",
}
"""Every reason for which a critique is dropped, in the order in which they are tested."""


_MENDED_BY: dict[str, str] = {
    "not_executed": "the executor array answered with faults alone: see the logs of the executors",
    "no_judgement": 'prompts.critique_prefix="Analysis:" and prompts.critique_close="Overall judgment:" make models '
    "that answer with a word or without a judgement write both",
    "mentions_hint": "prompts.folder: a critique_hinted.j2 that asks more firmly not to mention the hint",
    "contradicts_execution": "synthesize.consistent_only=false keeps critiques whose judgement is wrong",
    "surplus": "synthesize.balance=false keeps critiques of right, or of wrong, drafts alone",
}
"""Which key changes what most critiques were dropped for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejected:
    """A critique that is not trained on: a line of ``synthesize/rejected.jsonl``."""

    reason: str
    """One of :data:`DROPPED`."""
    critique: Critique


def select(
    critiques_with_solutions: Sequence[tuple[Critique, Solution]],
    *,
    n: int,
    balance: bool,
    consistent_only: bool,
    seed: int,
) -> tuple[list[Critique], list[Rejected]]:
    """At most ``n`` critiques, and all others with the reason, both in the order given.

    ``balance`` keeps as many critiques of right drafts as of wrong ones; ``consistent_only`` drops those whose
    judgement contradicts the execution. What is surplus is drawn at random with ``seed``.
    """
    reasons: dict[int, str] = {}
    of_right: list[int] = []
    of_wrong: list[int] = []
    for index, (critique, solution) in enumerate(critiques_with_solutions):
        fault = _fault(critique, solution, consistent_only=consistent_only)
        if fault is not None:
            reasons[index] = fault
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
    reasons |= dict.fromkeys(set(of_right + of_wrong) - set(kept), "surplus")
    critiques = [critique for critique, _ in critiques_with_solutions]
    rejected = [Rejected(reason=reasons[index], critique=critiques[index]) for index in sorted(reasons)]
    return [critiques[index] for index in sorted(kept)], rejected


def counts(rejected: Sequence[Rejected]) -> dict[str, int]:
    """How many critiques were dropped for each reason of :data:`DROPPED`."""
    found = Counter(item.reason for item in rejected)
    return {reason: found[reason] for reason in DROPPED}


def traits(critiques_with_solutions: Sequence[tuple[Critique, Solution]]) -> dict[str, list[Critique]]:
    """Which critiques are ``judged``, ``closed`` (only after ``prompts.critique_close``), ``cut off``, and so on."""
    found: dict[str, list[Critique]] = {
        name: [] for name in ("judged", "closed", "cut off", "mentions hint", "leaks", "contradicts")
    }
    for critique, solution in critiques_with_solutions:
        generation = critique.generation
        shown = {
            "judged": critique.judgement is not None,
            "closed": generation is not None and generation.forced is not None,
            "cut off": generation is not None and generation.finish_reason == "length",
            "mentions hint": mentions_hint(_written(critique)),
            "leaks": leaks_solution(critique.text, solution.program, None),
            "contradicts": critique.judgement is not None
            and solution.verdict is not None
            and not agrees(critique.judgement, solution.verdict.accepted),
        }
        for name, is_so in shown.items():
            if is_so:
                found[name].append(critique)
    return found


def mend(critiques: Sequence[Critique], rejected: Sequence[Rejected]) -> str:
    """What to change when every critique was dropped."""
    if not critiques:
        return "there was no draft to critique: see sample.n_samples and data.n_train"
    worst = max(DROPPED, key=lambda reason: counts(rejected)[reason])
    cut_off = sum(item.generation is not None and item.generation.finish_reason == "length" for item in critiques)
    if worst == "no_judgement" and 2 * cut_off > len(critiques):
        return "synthesize.max_tokens: most critiques were cut off; raise it"
    return f"most were dropped as {worst.replace('_', ' ')}; {_MENDED_BY[worst]}"


def _written(critique: Critique) -> str:
    """All that is learnt of a critique: the thought before it, too."""
    thought = None if critique.generation is None else critique.generation.thought
    return critique.text if thought is None else f"{thought}\n{critique.text}"


def _fault(critique: Critique, solution: Solution, *, consistent_only: bool) -> str | None:
    assert critique.solution_id == solution.id, f"{critique.id} does not belong to {solution.id}"
    if solution.verdict is None or solution.verdict.status in ("sandbox_error", "unsupported"):
        return "not_executed"
    if critique.judgement is None:
        return "no_judgement"
    if mentions_hint(_written(critique)):
        return "mentions_hint"
    if consistent_only and not agrees(critique.judgement, solution.verdict.accepted):
        return "contradicts_execution"
    return None
