"""Majority votes over several judgements of one program."""

from __future__ import annotations

from collections.abc import Sequence

from ctrl_hpc.records import Critique, Judgement


def majority(judgements: Sequence[Judgement | None]) -> Judgement | None:
    """The judgement that more than half of those that judge at all agree on; None for a tie or when none judges."""
    surplus = sum((judgement == "correct") - (judgement == "incorrect") for judgement in judgements)
    if surplus == 0:
        return None
    return "correct" if surplus > 0 else "incorrect"


def elect(critiques: Sequence[Critique]) -> Critique:
    """The critique that speaks for several of one program: the first whose judgement is the majority's.

    In a tie the first, without a judgement: the votes are several that disagree.
    """
    assert critiques, "no critique to choose from"
    verdict = majority([critique.judgement for critique in critiques])
    for critique in critiques:
        if critique.judgement == verdict and verdict is not None:
            return critique
    first = critiques[0]
    return Critique(
        id=first.id, solution_id=first.solution_id, text=first.text, judgement=None, generation=first.generation
    )
