"""What a training loop is made of: data order, learning rate, clock, interruption, experience."""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ctrl_kernels import Backend

from ctrl_hpc.config import OptimizerConfig, RLConfig
from ctrl_hpc.records import Critique, Generation, Revision, Reward, Solution, Verdict
from ctrl_hpc.seeds import sampling_seed, take
from ctrl_hpc.train.advantages import advantages_and_returns
from ctrl_hpc.train.batch import collate, micro_batches
from ctrl_hpc.train.loop import Clock, Interruption, learning_rate
from ctrl_hpc.train.losses import RLLoss
from ctrl_hpc.train.rollouts import Experience, Rollout, learnable_groups


def test_the_order_of_data_depends_on_seed_and_position_alone() -> None:
    whole = take(7, seed=3, start=0, count=21)
    assert [sorted(whole[first : first + 7]) for first in (0, 7, 14)] == [list(range(7))] * 3
    assert whole[:7] != whole[7:14]
    assert take(7, seed=3, start=5, count=9) == whole[5:14]
    assert take(7, seed=4, start=0, count=21) != whole


def test_seeds_differ_by_use_step_and_run() -> None:
    seeds = {sampling_seed(seed, step, use) for seed in (0, 1) for step in (0, 1) for use in ("a", "b")}
    assert len(seeds) == 8 and all(0 <= seed < 2**31 for seed in seeds)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.775, 0.55, 0.325]),
        ("cosine", [0.5, 1.0, 1.0, 0.868198, 0.55, 0.231802]),
    ],
)
def test_the_learning_rate_warms_up_and_decays(schedule: str, rates: list[float]) -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.1, schedule=schedule, warmup_steps=2)  # type: ignore[arg-type]
    assert [learning_rate(config, step, 6) for step in range(6)] == pytest.approx(rates, abs=1e-6)
    assert learning_rate(config, 6, 6) == pytest.approx(1.0 if schedule == "constant" else 0.1)


def test_a_clock_adds_up_a_phase_and_starts_anew() -> None:
    clock = Clock()
    for _ in range(2):
        with clock("update"):
            pass
    assert list(clock.take()) == ["time/update_s", "began_update", "ended_update"]
    assert clock.take() == {}


def test_a_signal_is_noted_and_handed_on_after_the_save(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _frame: received.append(number))
    try:
        with Interruption() as interruption:
            assert not interruption.requested
            os.kill(os.getpid(), signal.SIGUSR2)
            assert interruption.requested and received == []
            with pytest.raises(RuntimeError, match="stopped before the end: saved after step 7"):
                interruption.obey(7)
        assert received == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_the_end_of_the_wall_time_is_met_with_measured_durations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1000))
    interruption = Interruption()
    interruption.measured("step", 100.0)
    interruption.measured("save", 100.0)
    assert not interruption.requested
    interruption.measured("save", 700.0)  # 1.5 x (100 + 700) s are more than is left
    assert interruption.requested


def rollout(solution: str, reward: float, *, masked: bool = False, judgement: str | None = "correct") -> Rollout:
    return Rollout(
        solution_id=solution,
        critique="c",
        judgement=judgement,
        draft_accepted=True,
        revision="r",
        kept=False,
        status="accepted" if reward else "wrong_answer",
        reward=reward,
        reason="sandbox_error" if masked else "passed" if reward else "wrong_answer",
        masked=masked,
        prompt_ids=(1, 2),
        token_ids=(3, 4, 5) if reward else (6,),
        logprobs=(-1.0, -2.0, -3.0) if reward else (-4.0,),
        finish_reason="stop",
        version=4,
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_masked_critiques_leave_their_group_and_groups_without_spread_are_not_learnt(backend: Backend) -> None:
    rollouts = [
        *(rollout("a", reward) for reward in (1.0, 0.0, 0.0)),
        rollout("a", 0.0, masked=True),
        *(rollout("b", 1.0) for _ in range(3)),
        rollout("b", 0.0, masked=True),
        *(rollout("c", reward, judgement=None) for reward in (0.0, 1.0)),
    ]
    experience = Experience.of(rollouts, version=5, position=7, metrics={"time/rollout_s": 2.0})
    deviation = (((2 / 3) ** 2 + 2 * (1 / 3) ** 2) / 2) ** 0.5
    expected = [2 / 3 / deviation, -1 / 3 / deviation, -1 / 3 / deviation, 0, 0, 0, 0, 0, -(0.5**0.5), 0.5**0.5]
    assert experience.advantages("grpo", backend=backend).tolist() == pytest.approx(expected, rel=1e-5)
    assert experience.n_groups == 3 and experience.learnable_groups() == [0, 2]
    assert experience.rows([0, 2]) == [0, 1, 2, 8, 9]
    assert learnable_groups(rollouts) == ["a", "c"]
    assert torch.equal(experience.rollout_SR[0], torch.tensor([-1.0, -2.0, -3.0]))
    assert experience.metrics["rl/reward"] == pytest.approx(5 / 8)
    assert experience.metrics["rl/judgement_accuracy"] == pytest.approx(6 / 8)
    assert experience.metrics["rl/masked"] == 2
    assert experience.metrics["rl/staleness"] == experience.metrics["rl/staleness_mean"] == 1
    assert experience.metrics["rl/reason/sandbox_error"] == pytest.approx(0.2)
    assert experience.metrics["time/rollout_s"] == 2.0 and experience.position == 7


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_generalised_advantages_are_whitened_and_leave_out_what_the_environment_spoilt(backend: Backend) -> None:
    options = RLConfig(gae_gamma=1.0, gae_lambda=0.5)
    rewards_S = torch.tensor([1.0, 0.0, 5.0])
    values_SR = torch.tensor([[0.5, 0.25, 9.0], [0.0, 0.5, 0.5], [7.0, 7.0, 7.0]])
    mask_SR = torch.tensor([[True, True, False], [True, True, True], [False, False, False]])
    advantages_SR, returns_SR = advantages_and_returns(rewards_S, values_SR, mask_SR, options, backend=backend)
    # Sequence 0: deltas 0.25 - 0.5 = -0.25 and 1 - 0.25 = 0.75; sequence 1: 0.5, 0 and 0 - 0.5 = -0.5.
    raw = [-0.25 + 0.5 * 0.75, 0.75, 0.5 + 0.5 * (0.0 + 0.5 * -0.5), 0.0 + 0.5 * -0.5, -0.5]
    mean = sum(raw) / 5
    deviation = (sum((a - mean) ** 2 for a in raw) / 4) ** 0.5
    expected = [(a - mean) / deviation for a in raw]
    assert advantages_SR[mask_SR].tolist() == pytest.approx(expected, rel=1e-5)
    assert not advantages_SR[~mask_SR].any()
    assert returns_SR[mask_SR].tolist() == pytest.approx(
        [a + v for a, v in zip(raw, [0.5, 0.25, 0, 0.5, 0.5], strict=True)]
    )


def test_a_critic_without_token_ids_is_refused_by_name() -> None:
    critique = Critique(id="p/0#1", solution_id="p/0", text="c", judgement="correct", generation=Generation(text="c"))
    verdict = Verdict(status="accepted")
    revision = Revision(critique_id="p/0#1", text="r", program="p", kept=False, verdict=verdict)
    draft = Solution(id="p/0", problem_id="p", text="d", program="d", verdict=verdict)
    with pytest.raises(ValueError, match="critique p/0#1: the critic's server gave no token ids"):
        Rollout.of(critique, revision, draft, Reward(critique_id="p/0#1", value=1.0, reason="passed"))


def test_rollouts_by_older_weights_are_corrected_for_by_truncated_importance_weights() -> None:
    """A critique of three tokens, made two versions ago: the old policy's probabilities over the engine's, at most 1.5.

    By hand: 0.5/0.25 = 2, cut to 1.5; 0.3/0.4 = 0.75; 0.2/0.2 = 1. Advantage 2, ratio 1 (the first minibatch):
    loss -(1.5 + 0.75 + 1) * 2 / 3, and of each token's log-probability the gradient is -weight * 2 / 3.
    """
    batch = collate([((1, 2), (3, 4, 5))])
    options = RLConfig(max_staleness=2, importance_cap=1.5, kl_coef=0.0)
    rollout_SR, logprobs_N = torch.tensor([[0.25, 0.4, 0.2]]).log(), torch.tensor([0.5, 0.3, 0.2]).log()
    logprobs_N.requires_grad_(True)
    head: Any = SimpleNamespace(logprobs_and_entropy=lambda *_: (logprobs_N, torch.zeros(3)), backend="torch")
    micro = micro_batches(batch, data_rank=0, data_size=1, budget=99, multiple=1, device=torch.device("cpu"))[0]
    loss = RLLoss.of(batch, options, advantages_SR=torch.full((1, 3), 2.0), rollout_SR=rollout_SR)
    value, logged = loss(head, micro, torch.zeros(3, 1))
    value.backward()
    assert value.item() == pytest.approx(-(1.5 + 0.75 + 1.0) * 2 / 3, rel=1e-6)
    assert logprobs_N.grad is not None
    assert logprobs_N.grad.tolist() == pytest.approx([-1.5 * 2 / 3, -0.75 * 2 / 3, -2 / 3], rel=1e-6)
    # k3 of old against engine: mean of r - 1 - log r with r = 2, 0.75, 1
    expected = (2 - 1 - math.log(2) + 0.75 - 1 - math.log(0.75)) / 3
    assert logged["rollout_kl"].item() == pytest.approx(expected, rel=1e-5)


def test_a_word_drawn_among_few_tells_of_no_drift() -> None:
    """The engine's log-prob of a forced judgement is among two words: it is left out of ratio and divergence.

    By hand: 0.5/0.25 = 2, cut to 1.5; the second token is the text that was put, the third the drawn word: ratio 1.
    """
    closed = replace(rollout("a", 1.0), forced=(1, 2))
    assert Experience.of([closed], version=5, position=0, metrics={}).rollout_SR[0].isnan().tolist() == [0, 0, 1]
    thought = replace(closed, thought="t", thought_tokens=2)
    assert not Experience.of([thought], version=5, position=0, metrics={}).rollout_SR.isnan().any()

    batch = collate([((1, 2), (3, 4, 5))], [(1, 2)])
    options = RLConfig(max_staleness=2, importance_cap=1.5, kl_coef=0.0)
    rollout_SR, logprobs_N = torch.tensor([[0.25, 1.0, math.nan]]).log(), torch.tensor([0.5, 0.001]).log()
    logprobs_N.requires_grad_(True)
    head: Any = SimpleNamespace(logprobs_and_entropy=lambda *_: (logprobs_N, torch.zeros(2)), backend="torch")
    micro = micro_batches(batch, data_rank=0, data_size=1, budget=99, multiple=1, device=torch.device("cpu"))[0]
    loss = RLLoss.of(batch, options, advantages_SR=torch.full((1, 3), 2.0), rollout_SR=rollout_SR)
    value, logged = loss(head, micro, torch.zeros(2, 1))
    value.backward()
    assert value.item() == pytest.approx(-(1.5 + 1.0) * 2 / 2, rel=1e-6)
    assert logprobs_N.grad is not None and logprobs_N.grad.tolist() == pytest.approx([-1.5, -1.0], rel=1e-6)
    assert logged["rollout_kl"].item() == pytest.approx((2 - 1 - math.log(2)) / 2, rel=1e-5)
