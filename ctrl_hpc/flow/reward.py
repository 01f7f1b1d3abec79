"""The reward of a critique: 1 when the revision that it led to passes all tests (paper, section 3), else 0; and why."""

from __future__ import annotations

from ctrl_hpc.records import Critique, Revision, Reward, Verdict

REASONS: dict[str, str] = {
    "passed": "the revision passes all tests",
    "kept_passed": "judged correct, and the kept draft passes all tests",
    "kept_failed": "judged correct, but the kept draft does not pass",
    "no_judgement": "the critique has no overall judgement, or several that disagree",
    "no_program": "the revision holds no program",
    "wrong_answer": "the revision gives a wrong answer",
    "runtime_error": "the revision raises an exception or crashes",
    "time_limit": "the revision exceeds the time limit",
    "memory_limit": "the revision exceeds the memory limit",
    "output_limit": "the revision exceeds the output limit",
    "unsupported": "the revision returns something that the tests cannot judge",
    "sandbox_error": "the environment failed: the sample is masked out of its group",
}
"""Every reason a reward can have."""


def score(critique: Critique, revision: Revision, draft: Verdict, *, verdict_coef: float = 0.0) -> Reward:
    """What a critique of an executed draft earned through its executed revision.

    ``(1 - verdict_coef) * [revision passes] + verdict_coef * [judgement agrees with the draft's verdict]``, in [0, 1];
    ``verdict_coef=0`` is the paper's reward (the other term: Critique-RL, arXiv 2510.24320). Without an overall
    judgement the reward is 0. When a verdict that it needs is an environment's fault, the reward is masked.
    """
    assert revision.critique_id == critique.id, f"revision of {revision.critique_id} scored for {critique.id}"
    assert revision.verdict is not None, f"the revision of {critique.id} has not been executed"
    if critique.judgement is None:
        return Reward(critique_id=critique.id, value=0.0, reason="no_judgement")
    needed = (revision.verdict, draft) if verdict_coef > 0.0 else (revision.verdict,)
    if any(verdict.status == "sandbox_error" for verdict in needed):
        return Reward(critique_id=critique.id, value=0.0, reason="sandbox_error", masked=True)
    right_judgement = (critique.judgement == "correct") == draft.accepted
    value = (1.0 - verdict_coef) * revision.verdict.accepted + verdict_coef * right_judgement
    return Reward(critique_id=critique.id, value=value, reason=_reason(revision, revision.verdict))


def _reason(revision: Revision, verdict: Verdict) -> str:
    if revision.kept:
        return "kept_passed" if verdict.accepted else "kept_failed"
    if revision.program is None:
        return "no_program"
    return "passed" if verdict.accepted else verdict.status
