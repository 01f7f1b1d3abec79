"""From a judged revision to the critic's reward, and the leaks that forfeit it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence

from ctrl_hpc.flow.text import extract_program
from ctrl_hpc.records import Critique, Judgement, Problem, Revision, Reward, Solution, Verdict

_WHOLE_LINES = 5
"""Lines of code in one block from which on a critique is taken to hold a program."""
_COPIED_SHARE = 0.5
"""Share of the revision's new lines that stand in the critique word for word."""
_MIN_NEW_LINES = 3
"""New lines that a revision must have for that share to mean anything."""
_MIN_LINE_CHARACTERS = 8
"""Shorter lines (``else:``, ``return x``) are the same in many programs."""


def leaks_solution(critique: str, draft: str | None, revision: str | None) -> bool:
    """Whether a critique gives the solution away.

    It does when it holds a block of code of at least :data:`_WHOLE_LINES` lines that are not merely quoted from the
    draft, or when at least half of the lines that the revision adds to the draft stand in it word for word.
    """
    old = _lines(draft or "")
    block = _lines(extract_program(critique) or "")
    if len(block) >= _WHOLE_LINES and not block <= old:
        return True
    new = {line for line in _lines(revision or "") - old if len(line) >= _MIN_LINE_CHARACTERS}
    if len(new) < _MIN_NEW_LINES:
        return False
    said = _lines(critique)
    return len(new & said) >= _COPIED_SHARE * len(new)


def _lines(text: str) -> set[str]:
    """The distinct lines that are not blank, without their indentation and Markdown's bullets and backticks."""
    return {line.strip().removeprefix("- ").strip().strip("`").strip() for line in text.split("\n")} - {""}


REASONS: dict[str, str] = {
    "passed": "the revision passes all tests",
    "kept_passed": "judged correct, and the kept draft passes all tests",
    "kept_failed": "judged correct, but the kept draft does not pass",
    "no_judgement": "the critique has no overall judgement, or several that disagree",
    "no_program": "the revision holds no program",
    "wrong_answer": "the revision gives a wrong answer",
    "compile_error": "the revision does not compile",
    "runtime_error": "the revision raises an exception or crashes",
    "time_limit": "the revision exceeds the time limit",
    "memory_limit": "the revision exceeds the memory limit",
    "output_limit": "the revision exceeds the output limit",
    "unsupported": "the revision returns something that the tests cannot judge",
    "verdict_right": "asked for the judgement alone, which agrees with the draft's verdict",
    "verdict_wrong": "asked for the judgement alone, which does not agree with it",
    "reward_error": "the function of rl.reward failed: the sample is masked out of its group",
    "sandbox_error": "the environment failed: the sample is masked out of its group",
}
"""Every reason a reward can have."""


def agrees(judgement: Judgement | None, accepted: bool) -> bool:
    """Whether a critique's judgement of a draft is what its execution found; silence never is."""
    return judgement is not None and (judgement == "correct") == accepted


def transition(draft: Verdict, revision: Verdict) -> str:
    """One of :data:`~ctrl_hpc.records.TRANSITIONS`."""
    if draft.accepted:
        return "keep" if revision.accepted else "break"
    return "fix" if revision.accepted else "stuck"


def score(
    critique: Critique,
    revision: Revision,
    draft: Verdict,
    *,
    verdict_coef: float = 0.0,
    transitions: Mapping[str, float] | None = None,
    leak_penalty: float = 0.0,
    draft_program: str | None = None,
) -> Reward:
    """What a critique of an executed draft earned through its executed revision.

    ``(1 - verdict_coef) * [revision passes] + verdict_coef * [judgement agrees with the draft's verdict]``, in [0, 1];
    ``verdict_coef=0`` is the paper's reward (the other term: Critique-RL, arXiv 2510.24320). ``transitions``, a value
    for each of ``TRANSITIONS``, takes the place of [revision passes] (ReCrit, arXiv 2605.18799). ``leak_penalty``
    is taken off when the critique gives the solution away (:func:`~ctrl_hpc.flow.reward.leaks_solution`; it needs
    ``draft_program``).

    Without an overall judgement the reward is 0, or the least of ``transitions`` when that is lower, so that silence
    never pays. When a verdict that it needs is an environment's fault, the reward is masked.
    """
    assert revision.critique_id == critique.id, f"revision of {revision.critique_id} scored for {critique.id}"
    assert revision.verdict is not None, f"the revision of {critique.id} has not been executed"
    shown = None if revision.kept else revision.program
    leaked = leak_penalty > 0.0 and leaks_solution(critique.text, draft_program, shown)
    penalty = leak_penalty if leaked else 0.0
    if critique.judgement is None:
        least = min([0.0, *(transitions or {}).values()])
        return Reward(critique_id=critique.id, value=least - penalty, reason="no_judgement", leaked=leaked)
    needed = (revision.verdict, draft) if verdict_coef > 0.0 or transitions else (revision.verdict,)
    if any(verdict.status == "sandbox_error" for verdict in needed):
        return Reward(critique_id=critique.id, value=0.0, reason="sandbox_error", masked=True)
    outcome = transitions[transition(draft, revision.verdict)] if transitions else float(revision.verdict.accepted)
    judged = agrees(critique.judgement, draft.accepted)
    value = (1.0 - verdict_coef) * outcome + verdict_coef * judged - penalty
    return Reward(critique_id=critique.id, value=value, reason=_reason(revision, revision.verdict), leaked=leaked)


type Function = Callable[[Problem, Solution, Critique, Revision], float]
"""A reward of the user's own, from executed records."""


def score_by(function: Function, problem: Problem, draft: Solution, critique: Critique, revision: Revision) -> Reward:
    """What a critique earned by a function of the user's own.

    An environment's fault is masked and the function not asked; what it gives a critique without a judgement counts
    only below 0. Raises whatever it raises, and ValueError when it gives no finite number.
    """
    assert revision.verdict is not None and draft.verdict is not None, f"{critique.id} has not been executed"
    if "sandbox_error" in (revision.verdict.status, draft.verdict.status):
        return Reward(critique_id=critique.id, value=0.0, reason="sandbox_error", masked=True)
    value = float(function(problem, draft, critique, revision))
    if not math.isfinite(value):
        raise ValueError(f"it gave {value}")
    if critique.judgement is None:
        return Reward(critique_id=critique.id, value=min(0.0, value), reason="no_judgement")
    return Reward(critique_id=critique.id, value=value, reason=_reason(revision, revision.verdict))


def score_verdict(critique: Critique, draft: Verdict) -> Reward:
    """What a critique earned that was asked for its judgement alone: 1 when it agrees with the draft's verdict, else 0.

    Critique-Coder (arXiv 2509.22824) mixes a fifth of such prompts into the training.
    """
    if draft.status == "sandbox_error":
        return Reward(critique_id=critique.id, value=0.0, reason="sandbox_error", masked=True)
    if critique.judgement is None:
        return Reward(critique_id=critique.id, value=0.0, reason="no_judgement")
    right = agrees(critique.judgement, draft.accepted)
    return Reward(critique_id=critique.id, value=float(right), reason="verdict_right" if right else "verdict_wrong")


def verdict_only(drafts: Sequence[Solution], share: float, seed: int) -> frozenset[str]:
    """The ids of a ``share`` of the drafts, drawn by ``seed``, whose critiques are rewarded for the judgement alone."""
    count = round(share * len(drafts))
    return frozenset(draft.id for draft in random.Random(f"verdict only {seed}").sample(list(drafts), count))


def _reason(revision: Revision, verdict: Verdict) -> str:
    if revision.kept:
        return "kept_passed" if verdict.accepted else "kept_failed"
    if revision.program is None:
        return "no_program"
    return "passed" if verdict.accepted else verdict.status
