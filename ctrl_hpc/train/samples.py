"""The table ``rl/samples``: whole samples of a step, from the problem to the reward, for people to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ctrl_hpc.records import Problem, Solution
from ctrl_hpc.train.experience import Rollout

COLUMNS = [
    *("step", "solution_id", "problem", "draft", "draft_verdict", "critique", "judgement", "revision", "kept"),
    *("verdict", "detail", "reward", "reason", "weight_version"),
]
"""``draft`` is the program that was critiqued (the whole answer where it holds none), ``detail`` what went wrong in the
revision, ``kept`` whether the draft was kept because the critique judged it correct."""
Cell = str | float | bool | None


def rows(step: int, rollouts: Sequence[Rollout], drafts: Mapping[str, tuple[Problem, Solution]]) -> list[list[Cell]]:
    """Rows of ``COLUMNS``; ``drafts`` are problems and solutions by the solution's id."""
    return [_row(step, item, *drafts.get(item.solution_id, (None, None))) for item in rollouts]


def _row(step: int, item: Rollout, problem: Problem | None, draft: Solution | None) -> list[Cell]:
    verdict = draft.verdict if draft is not None else None
    known = "accepted" if item.draft_accepted else "not accepted"
    told = verdict.status + (f": {verdict.detail}" if verdict.detail else "") if verdict is not None else known
    return [
        step,
        item.solution_id,
        problem.prompt if problem is not None else None,
        (draft.program or draft.text) if draft is not None else None,
        told,
        item.critique,
        item.judgement,
        item.revision,
        item.kept,
        item.status,
        item.detail,
        item.reward,
        item.reason,
        item.version,
    ]
