"""The reward of a critique, case by case."""

import pytest

from ctrl_hpc.flow.reward import REASONS, score, score_verdict, transition, verdict_only
from ctrl_hpc.records import Critique, Revision, Solution, Verdict

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


SHAPED = {"fix": 1.0, "keep": 0.5, "break": -1.0, "stuck": -0.25}


@pytest.mark.parametrize(
    ("revised", "draft", "name"),
    [
        (revision(RIGHT), WRONG, "fix"),
        (revision(RIGHT), RIGHT, "keep"),
        (revision(RIGHT, kept=True), RIGHT, "keep"),
        (revision(WRONG), RIGHT, "break"),
        (revision(Verdict(status="time_limit")), RIGHT, "break"),
        (revision(WRONG), WRONG, "stuck"),
        (revision(WRONG, program=None), WRONG, "stuck"),
    ],
)
def test_what_became_of_the_draft_is_worth_its_number(revised, draft, name):
    assert transition(draft, revised.verdict) == name
    judgement = "correct" if revised.kept else "incorrect"
    assert score(critique(judgement), revised, draft, transitions=SHAPED).value == SHAPED[name]


def test_silence_is_worth_no_more_than_the_worst_transition():
    assert score(critique(None), revision(RIGHT), WRONG, transitions=SHAPED).value == -1.0
    positive = dict.fromkeys(SHAPED, 0.5)
    assert score(critique(None), revision(RIGHT), WRONG, transitions=positive).value == 0.0


def test_a_transition_cannot_be_told_from_a_faulty_draft():
    assert score(critique("incorrect"), revision(RIGHT), FAULT, transitions=SHAPED).masked


def test_transitions_and_the_judgement_are_weighed():
    reward = score(critique("incorrect"), revision(WRONG), WRONG, transitions=SHAPED, verdict_coef=0.2)
    assert reward.value == pytest.approx(0.8 * -0.25 + 0.2)


PROGRAM = "values = input().split()\ntotal = sum(map(int, values))\nprint(total)"
FIXED = "import sys\nvalues = sys.stdin.read().split()\nnumbers = [int(value) for value in values]\nprint(sum(numbers))"


@pytest.mark.parametrize(
    ("text", "leaked", "value"),
    [
        (f"Use this:\n```python\n{FIXED}\nprint('done')\n```\nOverall judgment: Incorrect", True, 0.7),
        ("Read all of the input, not only its first line.\nOverall judgment: Incorrect", False, 1.0),
    ],
)
def test_who_gives_the_program_away_pays(text, leaked, value):
    leaking = Critique(id="p/0#0", solution_id="p/0", text=text, judgement="incorrect")
    revised = revision(RIGHT, program=FIXED)
    reward = score(leaking, revised, WRONG, leak_penalty=0.3, draft_program=PROGRAM)
    assert (reward.leaked, reward.value) == (leaked, pytest.approx(value))
    assert score(leaking, revised, WRONG, draft_program=PROGRAM).value == 1.0


def test_the_judgement_alone():
    assert score_verdict(critique("incorrect"), WRONG).value == 1.0
    assert score_verdict(critique("correct"), RIGHT).reason == "verdict_right"
    assert score_verdict(critique("correct"), WRONG).value == 0.0
    assert score_verdict(critique("correct"), WRONG).reason == "verdict_wrong"
    assert score_verdict(critique(None), WRONG).reason == "no_judgement"
    assert score_verdict(critique("correct"), FAULT).masked
    assert {"verdict_right", "verdict_wrong"} <= set(REASONS)


def test_a_share_of_the_drafts_is_asked_for_the_judgement_alone():
    drafts = [Solution(id=f"p{k}/0", problem_id=f"p{k}", text="", program=None) for k in range(40)]
    chosen = verdict_only(drafts, 0.2, seed=3)
    assert len(chosen) == 8
    assert chosen == verdict_only(drafts, 0.2, seed=3)
    assert chosen != verdict_only(drafts, 0.2, seed=4)
    assert verdict_only(drafts, 0.0, seed=3) == frozenset()
