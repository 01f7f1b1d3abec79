"""The simulated overlap of rollouts and training: hand-worked waits, and the shipped trace."""

import pytest

from ctrl_hpc.cli import main
from ctrl_hpc.cluster import simulation
from ctrl_hpc.cluster.simulation import Layout

# two critiques of 10 and 5 tokens at 0.1 s a token; the first is revised in 4 tokens at 0.25 s, run in 0.5 s
STEP = {"rollout_s": 1.0, "revise_s": 1.0, "publish_s": 0.25, "trainer_s": 2.0}
TRACE = {
    "provenance": {"run": "by hand", "git_commit": "0"},
    "steps": [STEP | {"critique_tokens": [10, 10], "revision_tokens": [4, 4]}],
    "execution_s": [0.5],
}
ONE = Layout(
    trainer_groups=1, critic_servers=1, generator_servers=1, slots=2, executors=2, prompts_per_step=1, group_size=2
)


def test_on_policy_the_trainer_waits_for_the_whole_rollout() -> None:
    waits = simulation.simulate(TRACE, ONE, max_staleness=0, steps=4)
    # critique 1.0, revision 1.0, execution 0.5; then update 2.0 and publish 0.25
    assert waits.wait_s == pytest.approx((2.75,) * 4)
    assert (waits.step_s, waits.trainer_s) == pytest.approx((4.75, 2.0))
    assert waits.fraction == pytest.approx(2.75 / 4.75)


def test_one_step_ahead_it_waits_for_what_the_update_does_not_cover() -> None:
    waits = simulation.simulate(TRACE, ONE, max_staleness=1, steps=4)
    assert waits.wait_s == pytest.approx((2.75, 0.75, 0.75, 0.75))
    assert waits.step_s == pytest.approx((4.75 + 3 * 2.75) / 4)


def test_one_executor_runs_one_program_after_the_other() -> None:
    layout = Layout(
        trainer_groups=2, critic_servers=1, generator_servers=1, slots=1, executors=1, prompts_per_step=1, group_size=2
    )
    waits = simulation.simulate(TRACE, layout, max_staleness=0, steps=1)
    # critiques end at 1 and 2, revisions at 2 and 3, executions at 2.5 and 3.5
    assert waits.wait_s == pytest.approx((3.75,)) and waits.trainer_s == pytest.approx(1.0)


@pytest.mark.slow
def test_the_command_meets_its_target_with_the_shipped_trace(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "overlap", "--out", str(tmp_path / "overlap.png")]) == 0
    said = capsys.readouterr().out
    assert "git_commit" in said and (tmp_path / "overlap.png").stat().st_size > 10_000
    trace = simulation.load()
    assert len(trace["steps"]) == 50 and trace["provenance"]["run"] == "tiny_ci"
    off, on = (simulation.simulate(trace, Layout(), max_staleness=stale) for stale in (0, 1))
    assert on.fraction <= 0.10 < off.fraction


def test_a_staleness_that_is_not_there_and_a_wrong_trace_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="max_staleness: 2 is not allowed; allowed: 0, 1"):
        simulation.simulate(TRACE, ONE, max_staleness=2)
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ValueError, match="not a trace: it lacks"):
        simulation.load(tmp_path / "t.json")
