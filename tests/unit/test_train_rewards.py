"""The reward at a step: schedules of its coefficients, and functions of the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from ctrl_hpc.config import ROOT, RLConfig, dump, load
from ctrl_hpc.config.objectives import at_step, stages
from ctrl_hpc.records import Critique, Judgement, Problem, Revision, Solution, Verdict
from ctrl_hpc.train.rewards import Rewards

TINY = ROOT / "configs" / "tiny.yaml"
EXAMPLE = f"{ROOT}/examples/own-objective/objective.py:reward"
RIGHT, WRONG, FAULT = (Verdict(status=status) for status in ("accepted", "wrong_answer", "sandbox_error"))


def sample(
    judgement: Judgement | None = "incorrect", verdict: Verdict = RIGHT, words: int = 3, draft: Verdict = WRONG
) -> tuple[Problem, Solution, Critique, Revision]:
    return (
        Problem(id="p", source="ours", split="train", prompt="", tests=()),
        Solution(id="p/0", problem_id="p", text="", program="x = 1", verdict=draft),
        Critique(id="p/0#0", solution_id="p/0", text="word " * words, judgement=judgement),
        Revision(critique_id="p/0#0", text="", program="x = 2", kept=False, verdict=verdict),
    )


def test_a_schedule_is_constant_between_its_steps() -> None:
    assert stages("1@0, 0.25@50,0@80") == ((0, 1.0), (50, 0.25), (80, 0.0))
    assert [at_step("1@0,0.25@50,0@80", step) for step in (0, 49, 50, 79, 80, 1000)] == [1, 1, 0.25, 0.25, 0, 0]
    assert at_step(0.3, 7) == at_step("0.3", 7) == 0.3


@pytest.mark.parametrize(
    "text", ["1@5", "1@0,0@0", "1@0,0@9,1@3", "1@x", "a@0", "", "1@0,", "1@-1", "nan", "1@0,inf@3"]
)
def test_what_is_no_schedule_is_refused_by_its_key(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"rl\.verdict_coef: .* it must lie in \[0, 1\], or be such numbers from steps"
    ):
        load(TINY, [f"rl.verdict_coef='{text}'"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("rl.verdict_coef=1@0,2@5", r"rl\.verdict_coef: '1@0,2@5' is not allowed"),
        ("rl.leak_penalty=-1", r"rl\.leak_penalty: -1 is not allowed; it must be 0 or greater"),
        ("rl.transition_reward={fix: 1, keep: x, break: 0, stuck: 0}", r"rl\.transition_reward\.keep: 'x' is not"),
        ("rl.reward=nothing.py:f", r"rl\.reward: .*nothing\.py:f' is not allowed; it must be FILE\.py:FUNCTION"),
    ],
)
def test_a_reward_that_cannot_be_is_refused(change: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        load(TINY, [change])


def test_every_coefficient_may_be_a_schedule_and_survives_its_file(tmp_path: Path) -> None:
    changes = [
        "rl.verdict_coef=1@0,0@2",
        "rl.verdict_only_share=1@0,0.25@3",
        "rl.leak_penalty=0.5",
        "rl.transition_reward={fix: 1, keep: 1, break: 0@0, stuck: '0@0,-1@4'}",
    ]
    (tmp_path / "again.yaml").write_text(dump(load(TINY, changes)))
    options = load(tmp_path / "again.yaml").rl
    first, last = Rewards.at(options, 0), Rewards.at(options, 4)
    assert (first.verdict_coef, first.verdict_only_share, first.leak_penalty) == (1, 1, 0.5)
    assert (last.verdict_coef, last.verdict_only_share, last.leak_penalty) == (0, 0.25, 0.5)
    assert first.transitions == {"fix": 1, "keep": 1, "break": 0, "stuck": 0} and last.transitions["stuck"] == -1


def test_critique_rls_two_stages_reward_the_judgement_first_and_then_the_revision() -> None:
    options = RLConfig(verdict_coef="1@0,0@2")
    wrongly_judged_but_fixed, rightly_judged_and_stuck = sample("correct"), sample("incorrect", WRONG)
    for step, expected in ((0, [0.0, 1.0]), (1, [0.0, 1.0]), (2, [1.0, 0.0])):
        found = Rewards.at(options, step).score([wrongly_judged_but_fixed, rightly_judged_and_stuck])
        assert [reward.value for reward in found] == expected


def test_a_function_of_ones_own_rewards() -> None:
    """The example's: 1 for a revision that passes, less 0.001 for each word over 50."""
    samples = [sample(words=80), sample(verdict=WRONG), sample(None), sample(None, WRONG, 60), sample(verdict=FAULT)]
    found = Rewards.at(RLConfig(reward=EXAMPLE), 0).score(samples)
    assert [reward.value for reward in found] == pytest.approx([0.97, 0.0, 0.0, -0.01, 0.0])
    assert [reward.reason for reward in found] == [
        "passed", "wrong_answer", "no_judgement", "no_judgement", "sandbox_error",
    ]  # fmt: skip
    assert [reward.masked for reward in found] == [False, False, False, False, True]
    alone = Rewards.at(RLConfig(reward=EXAMPLE), 0).score([sample("incorrect")], {"p/0"})
    assert (alone[0].value, alone[0].reason) == (1.0, "verdict_right")


def test_a_sample_that_the_function_fails_for_is_left_out_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(
        "def f(problem, draft, critique, revision): return 1 / len(critique.text.split())"
    )
    rewards = Rewards.at(RLConfig(reward=f"{tmp_path}/mine.py:f"), 0)
    found = rewards.score([sample(words=4), sample(words=0)])
    assert [(reward.value, reward.masked, reward.reason) for reward in found] == [
        (0.25, False, "passed"), (0.0, True, "reward_error"),
    ]  # fmt: skip
    assert (
        "failed for p/0#0: ZeroDivisionError: division by zero; 1 of 2 critiques are left out"
        in capsys.readouterr().out
    )
    (alone,) = rewards.score([sample(words=0)])  # a chunk's or turn's only one: the step decides whether all failed
    assert alone.masked
