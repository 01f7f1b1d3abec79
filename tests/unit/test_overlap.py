"""The simulated overlap of rollouts and training: hand-worked waits and versions, and the shipped trace."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import overlap
import pytest
from overlap import Layout

# a draft's two critiques of 10 tokens at 0.1 s a token, each revised in 4 tokens at 0.25 s and run in 0.5 s
STEP: dict[str, Any] = {
    "load_s": 0.125,
    "rollout_s": 1.0,
    "revise_s": 1.0,
    "publish_s": 0.25,
    "trainer_s": 2.0,
    "critique_tokens": [10, 10],
    "revision_tokens": [4, 4],
    "runs": [1, 1],
}
TRACE: dict[str, Any] = {
    "provenance": {"run": "by hand", "git_commit": "0"},
    "group_size": 2,
    "steps": [STEP],
    "execution_s": [0.5],
}
ONE = Layout(
    trainer_groups=1, critic_servers=1, generator_servers=1, slots=2, executors=2, prompts_per_step=1, group_size=2
)


def test_on_policy_the_trainer_waits_for_the_whole_rollout() -> None:
    waits = overlap.simulate(TRACE, ONE, max_staleness=0, steps=4)
    # load 0.125, critique 1.0, revision 1.0, execution 0.5; then update 2.0 and publish 0.25
    assert waits.wait_s == pytest.approx((2.625,) * 4)
    assert (waits.step_s, waits.trainer_s, waits.publish_s) == pytest.approx((4.875, 2.0, 0.25))
    assert waits.rollouts_s == pytest.approx(2.625) and waits.fraction == pytest.approx(2.625 / 4.875)
    assert waits.versions == (0, 1, 2, 3) and waits.staleness == 0


@pytest.mark.parametrize("max_staleness", [1, 2])
def test_ahead_it_waits_for_what_the_update_does_not_cover(max_staleness: int) -> None:
    waits = overlap.simulate(TRACE, ONE, max_staleness=max_staleness, steps=4)
    # step 0's rollouts end at 2.625, its update at 4.875; step 1's, by version 0 still, at 5.125, its update at 7.375;
    # step 2's begin at 5.125, when version 1 is there, and end at 7.75, step 3's at 10.375
    assert waits.wait_s == pytest.approx((2.625, 0.25, 0.375, 0.375))
    assert waits.step_s == pytest.approx((10.375 + 2.25) / 4)
    assert waits.versions == (0, 0, 1, 2) and waits.staleness == 0.75


@pytest.mark.parametrize(
    ("max_staleness", "versions"),
    [(0, (0, 1, 2, 3, 4, 5)), (1, (0, 0, 1, 2, 3, 4)), (2, (0, 0, 0, 1, 2, 3)), (3, (0, 0, 0, 0, 1, 2))],
)
def test_a_slow_trainer_has_the_versions_that_the_producer_gives_it(
    max_staleness: int, versions: tuple[int, ...]
) -> None:
    """The same table as in tests/megatron/test_ahead.py."""
    slow = TRACE | {"steps": [STEP | {"trainer_s": 10.0}]}
    waits = overlap.simulate(slow, ONE, max_staleness=max_staleness, steps=6)
    assert waits.versions == versions
    assert waits.wait_s[1:] == pytest.approx((0.0 if max_staleness else 2.625,) * 5)


def test_one_executor_runs_one_program_after_the_other_and_none_twice() -> None:
    layout = replace(ONE, trainer_groups=2, slots=1, executors=1)
    waits = overlap.simulate(TRACE, layout, max_staleness=0, steps=1)
    # critiques end at 1 and 2, revisions at 3 and 4, executions at 4.5 and 5
    assert waits.wait_s == pytest.approx((5.125,)) and waits.trainer_s == pytest.approx(1.0)
    same = TRACE | {"steps": [STEP | {"revision_tokens": [4, 0], "runs": [1, 0]}]}
    assert overlap.simulate(same, layout, max_staleness=0, steps=1).wait_s == pytest.approx((3.625,))


@pytest.mark.parametrize(("chunk", "in_flight", "wait_s"), [(0, 2, 5.125), (2, 1, 5.125), (1, 1, 5.125), (1, 2, 3.625)])
def test_chunks_go_their_way_beside_each_other(chunk: int, in_flight: int, wait_s: float) -> None:
    """Two drafts, four critiques, two slots: as one, critiques until 2, revisions until 4, executions until 5.

    One chunk after the other: 2.5 each. Both at once: critiques until 1 and 2, revisions until 2 and 3, executions
    until 2.5 and 3.5.
    """
    layout = replace(ONE, prompts_per_step=2, chunk=chunk, chunks_in_flight=in_flight)
    assert overlap.simulate(TRACE, layout, max_staleness=0, steps=1).wait_s == pytest.approx((wait_s,))


@pytest.mark.slow
def test_the_command_meets_its_target_with_the_shipped_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["overlap.py", "--out", str(tmp_path / "overlap.png")])
    overlap.main()
    said = capsys.readouterr().out
    assert "git_commit" in said and (tmp_path / "overlap.png").stat().st_size > 10_000
    assert [line.partition(":")[0] for line in said.splitlines()[1:4]] == [f"max_staleness={k}" for k in range(3)]
    trace = overlap.load()
    assert len(trace["steps"]) == 50 and trace["provenance"]["run"] == "tiny_ci"
    off, on, more = (overlap.simulate(trace, Layout(), max_staleness=stale) for stale in (0, 1, 2))
    assert more.fraction <= on.fraction <= 0.10 < off.fraction


def test_a_staleness_that_is_not_there_and_a_wrong_trace_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="max_staleness: -1 is not allowed; it must be >= 0"):
        overlap.simulate(TRACE, ONE, max_staleness=-1)
    (tmp_path / "t.json").write_text('{"steps": [], "execution_s": [], "provenance": {}}')
    with pytest.raises(ValueError, match="not a trace: it lacks group_size"):
        overlap.load(tmp_path / "t.json")
