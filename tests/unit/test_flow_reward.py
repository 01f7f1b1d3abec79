"""The reward of a critique, case by case."""

import pytest

from ctrl_hpc.flow.reward import REASONS, score
from ctrl_hpc.records import Critique, Revision, Verdict

RIGHT, WRONG, FAULT = Verdict(status="accepted"), Verdict(status="wrong_answer"), Verdict(status="sandbox_error")


def critique(judgement):
    return Critique(id="p/0#0", solution_id="p/0", text="...", judgement=judgement)


def revision(verdict, *, kept=False, program="print(1)"):
    return Revision(critique_id="p/0#0", text="...", program=program, kept=kept, verdict=verdict)


@pytest.mark.parametrize(
    ("judgement", "revised", "draft", "value", "reason", "masked"),
    [
        ("incorrect", revision(RIGHT), WRONG, 1.0, "passed", False),
        ("incorrect", revision(RIGHT), RIGHT, 1.0, "passed", False),
        ("incorrect", revision(WRONG), RIGHT, 0.0, "wrong_answer", False),
        ("incorrect", revision(Verdict(status="time_limit")), WRONG, 0.0, "time_limit", False),
        ("incorrect", revision(Verdict(status="unsupported")), WRONG, 0.0, "unsupported", False),
        ("incorrect", revision(WRONG, program=None), WRONG, 0.0, "no_program", False),
        ("correct", revision(RIGHT, kept=True), RIGHT, 1.0, "kept_passed", False),
        ("correct", revision(WRONG, kept=True), WRONG, 0.0, "kept_failed", False),
        (None, revision(RIGHT), WRONG, 0.0, "no_judgement", False),
        ("incorrect", revision(FAULT), WRONG, 0.0, "sandbox_error", True),
        ("correct", revision(FAULT, kept=True), FAULT, 0.0, "sandbox_error", True),
        ("incorrect", revision(RIGHT), FAULT, 1.0, "passed", False),
        (None, revision(FAULT), WRONG, 0.0, "no_judgement", False),
    ],
)
def test_the_papers_reward(judgement, revised, draft, value, reason, masked):
    reward = score(critique(judgement), revised, draft)
    assert (reward.value, reward.reason, reward.masked) == (value, reason, masked)
    assert reason in REASONS


@pytest.mark.parametrize(
    ("judgement", "revised", "draft", "value"),
    [
        ("incorrect", revision(RIGHT), WRONG, 1.0),  # fixed, and rightly judged
        ("incorrect", revision(WRONG), WRONG, 0.25),  # rightly judged only
        ("incorrect", revision(RIGHT), RIGHT, 0.75),  # right program after a wrong judgement
        ("correct", revision(WRONG, kept=True), WRONG, 0.0),
        (None, revision(RIGHT), WRONG, 0.0),
    ],
)
def test_a_quarter_for_the_right_judgement(judgement, revised, draft, value):
    assert score(critique(judgement), revised, draft, verdict_coef=0.25).value == value


def test_the_judgement_cannot_be_scored_against_a_faulty_draft():
    assert score(critique("incorrect"), revision(RIGHT), FAULT, verdict_coef=0.25).masked
