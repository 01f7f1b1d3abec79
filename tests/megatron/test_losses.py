"""Losses by name, importance weights and advantages, as the trainer makes them, against formulas in plain float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ctrl_hpc.config import ROOT, Config, RLConfig, load
from ctrl_hpc.config.functions import load_function
from ctrl_hpc.config.objectives import LOSSES
from ctrl_hpc.train.advantages import ESTIMATORS, OVER_THE_STEP, estimate
from ctrl_hpc.train.batch import Batch, collate, micro_batches
from ctrl_hpc.train.losses import RLLoss
from ctrl_hpc.train.policy import Head
from ctrl_hpc.train.rollouts import Experience

LENGTHS = (7, 3, 9, 5, 1, 8)
REWARDS = (1.0, 0.0, 0.0, 1.0, 0.25, 1.0)
GROUPS = (0, 0, 0, 1, 1, 1)
VOCABULARY, WIDTH = 23, 6
OWN = f"{ROOT}/examples/own-objective/objective.py"


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(VOCABULARY, (n + 2,), generator=generator).tolist() for n in LENGTHS]
    return collate([(row[:2], row[2:]) for row in rows], [None, None, (2, 5), None, None, None])


class Case:
    """A batch with hidden states, and what the plain formulas see: dense log-probabilities at every slot."""

    def __init__(self, shift: float = 0.4) -> None:
        self.batch, generator = batch(), torch.Generator().manual_seed(2)
        self.mask = self.batch.mask_SR
        shape = self.mask.shape

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, dtype=torch.float64)

        self.hidden = normal(*shape, WIDTH).requires_grad_()
        self.weight = normal(VOCABULARY, WIDTH).requires_grad_()
        self.targets = torch.zeros(shape, dtype=torch.int64)
        for row, n in enumerate(LENGTHS):
            self.targets[row, :n] = self.batch.tokens_SL[row, 2 : 2 + n]
        now = self.logprobs().detach()
        self.old = (now + shift * normal(*shape)).clamp_max(-1e-3)
        self.rollout = (self.old + 0.5 * normal(*shape)).clamp_max(-1e-3)
        self.reference = now + 0.5 * normal(*shape)
        self.advantages = normal(*shape) * self.mask

    def logprobs(self) -> Tensor:
        return (self.hidden @ self.weight.T).log_softmax(-1).gather(-1, self.targets[..., None])[..., 0]

    def ours(self, options: RLConfig, *, budget: int = 12, old: bool = True, seed: int = 0) -> Tensor:
        """The trainer's loss, its micro-batches added up."""
        loss = RLLoss.of(
            self.batch,
            options,
            advantages_SR=self.advantages,
            rollout_SR=self.rollout,
            old_SR=self.old if old else None,
            reference_SR=self.reference if options.kl_coef else None,
            seed=seed,
        )
        head = Head(
            weight=self.weight, main_grad=None, group=None, vocab_start=0, vocab_size=VOCABULARY, backend="torch"
        )
        parts = micro_batches(
            self.batch, data_rank=0, data_size=1, budget=budget, multiple=1, device=torch.device("cpu")
        )
        assert len(parts) > 1
        total = torch.zeros((), dtype=torch.float64)
        self.logged: dict[str, float] = {}
        for micro in parts:
            hidden_ND = self.hidden[micro.rows_B[micro.rows_N], micro.slots_N]
            value, logged = loss(head, micro, hidden_ND)
            total = total + value
            for name, number in logged.items():
                self.logged[name] = self.logged.get(name, 0.0) + float(number)
        return total

    def mean(self, values: Tensor) -> Tensor:
        """Of each sequence, over its policy's tokens, [S, 1]."""
        return (values * self.mask).sum(1, keepdim=True) / self.mask.sum(1, keepdim=True)


def ppo(case: Case, ratio: Tensor, low: float = 0.2, high: float = 0.2) -> Tensor:
    a = case.advantages
    return -torch.minimum(a * ratio, a * ratio.clamp(1 - low, 1 + high))


def cispo(case: Case, logp: Tensor) -> Tensor:
    """MiniMax-M1 (2506.13585): the bounded ratio is a weight without gradient."""
    return -(logp - case.old).exp().clamp(0.8, 1.2).detach() * case.advantages * logp


def dppo(case: Case, logp: Tensor) -> Tensor:
    """DPPO-TV (2602.04879): no token whose probability went too far its advantage's way."""
    p, q = logp.detach().exp(), case.old.exp()
    valid = torch.where(case.advantages > 0, p - q <= 0.05, p - q >= -0.05)
    return -case.advantages * (logp - case.old).exp().clamp(max=1.5).detach() * logp * valid


def sapo(case: Case, logp: Tensor) -> Tensor:
    """SAPO, with its paper's temperatures 1.0 and 1.05."""
    tau = torch.where(case.advantages > 0, 1.0, 1.05)
    return -case.advantages * 4 / tau * torch.sigmoid(tau * ((logp - case.old).exp() - 1))


def gmpo(case: Case, logp: Tensor) -> Tensor:
    """GMPO (2507.20673): log-ratios clipped the advantage's way, then their geometric mean."""
    change, sign = logp - case.old, case.advantages.sign()
    return -case.advantages * case.mean(sign * torch.minimum(sign * change, sign * change.clamp(-0.2, 0.2))).exp()


def gspo(case: Case, logp: Tensor) -> Tensor:
    return ppo(case, case.mean(logp - case.old).exp())


def gspo_token(case: Case, logp: Tensor) -> Tensor:
    """GSPO-token (2507.18071)."""
    return ppo(case, (logp - logp.detach() + case.mean(logp - case.old).detach()).exp())


def covariance(case: Case) -> Tensor:
    """(A - mean A) (log pi - mean log pi) of the policy's tokens (Cui et al. 2025); -inf at others."""
    a, logp = case.advantages[case.mask], case.old[case.mask]
    out = torch.full(case.mask.shape, -math.inf, dtype=torch.float64)
    out[case.mask] = (a - a.mean()) * (logp - logp.mean())
    return out


def kl_cov(case: Case, logp: Tensor) -> Tensor:
    """The three tokens of highest covariance are held; nothing is clipped."""
    held = covariance(case) >= covariance(case).flatten().topk(3).values[-1]
    return -case.advantages * (logp - case.old).exp() + 0.7 * held * (logp - case.old).abs()


def clip_cov(case: Case, logp: Tensor) -> Tensor:
    """As many tokens as there are within the bounds, so that the draw is no matter, get no gradient."""
    found = covariance(case)
    return ppo(case, (logp - case.old).exp()) * ~((found > 0.2) & (found < 2.0))


def own(case: Case, logp: Tensor) -> Tensor:
    return -case.advantages * logp * ((logp.detach() - case.old).abs() < 0.2)


FORMULAS: dict[str, tuple[Callable[[Case, Tensor], Tensor], dict[str, Any]]] = {
    "clip": (lambda case, logp: ppo(case, (logp - case.old).exp()), {}),
    "clip, sequence": (gspo, {"loss": "clip", "ratio": "sequence"}),
    "cispo": (cispo, {}),
    "dppo": (dppo, {"clip_low": 0.05, "clip_high": 0.05, "ratio_cap": 1.5}),
    "sapo": (sapo, {}),
    "gmpo": (gmpo, {}),
    "gspo_token": (gspo_token, {}),
    "clip_cov": (clip_cov, {"cov_fraction": 1.0, "cov_bounds": (0.2, 2.0)}),
    "kl_cov": (kl_cov, {"cov_fraction": 0.1, "cov_coef": 0.7}),
    "own": (own, {"loss": f"{OWN}:loss"}),
}


def aggregated(case: Case, terms: Tensor, aggregation: str) -> Tensor:
    if aggregation == "token-mean":
        return (terms * case.mask).sum() / case.mask.sum()
    if aggregation == "seq-mean-token-sum":
        return (terms * case.mask).sum() / len(LENGTHS)
    return case.mean(terms).mean()


def close(ours: Tensor, plain: Tensor, case: Case) -> None:
    """Values and gradients within 1e-6, relative to the whole tensor."""
    assert ours.item() == pytest.approx(plain.item(), rel=1e-6)
    found, wanted = (torch.autograd.grad(x, (case.hidden, case.weight)) for x in (ours, plain))
    for a, b in zip(found, wanted, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-6


def test_there_is_a_formula_for_every_loss() -> None:
    assert {name for name in FORMULAS if name in LOSSES} == set(LOSSES)


@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("name", FORMULAS)
def test_a_loss_by_name_is_its_formula(name: str, aggregation: str) -> None:
    term, keys = FORMULAS[name]
    case = Case()
    options = RLConfig(**{"loss": name, "kl_coef": 0.1, "aggregation": aggregation} | keys)
    gap = case.logprobs() - case.reference
    terms = term(case, case.logprobs()) + 0.1 * ((-gap).exp() + gap - 1)
    close(case.ours(options), aggregated(case, terms, aggregation), case)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize(("cap", "bounds"), [(1.5, ()), (None, (0.5, 2.0)), (1.2, (0.5, 2.0))])
@pytest.mark.parametrize("old", [True, False])
def test_importance_weights(level: str, cap: float | None, bounds: tuple[float, ...], old: bool) -> None:
    """Truncated (TIS), masked (MIS; IcePop for tokens) and both; levels as verl's ``rollout_correction``."""
    case = Case()
    logp = case.logprobs()
    before = case.old if old else logp.detach()
    gap = (before - case.rollout) * case.mask
    if level != "token":
        gap = gap.sum(1, keepdim=True) / (case.mask.sum(1, keepdim=True) if level == "geometric" else 1)
    ratios = gap.exp().expand(case.mask.shape)
    weights = ratios.clamp(max=cap) if cap else ratios
    if bounds:
        kept = (ratios >= bounds[0]) & (ratios <= bounds[1])
        weights = weights * kept
    terms = ppo(case, (logp - before).exp()) * weights
    options = RLConfig(kl_coef=0.0, importance_level=level, importance_cap=cap, importance_bounds=bounds)  # type: ignore[arg-type]
    close(case.ours(options, old=old), aggregated(case, terms, "token-mean"), case)
    assert float(weights[case.mask].min()) < 1
    if bounds:
        assert case.logged["rollout_masked"] == pytest.approx(float((~kept[case.mask]).double().mean()))


def test_the_tokens_of_high_covariance_do_not_depend_on_the_micro_batches() -> None:
    options = RLConfig(loss="clip_cov", kl_coef=0.0, cov_fraction=0.1, cov_bounds=(-5.0, 5.0))
    first, again, other = (
        Case().ours(options, budget=budget, seed=seed) for budget, seed in ((12, 3), (30, 3), (12, 4))
    )
    assert first.item() == pytest.approx(again.item(), rel=1e-12) and first.item() != pytest.approx(other.item())


def experience(rewards: tuple[float, ...] = REWARDS, invalid: tuple[int, ...] = ()) -> Experience:
    made = batch()
    return Experience(
        batch=made,
        rewards_S=torch.tensor(rewards),
        groups_S=torch.tensor(GROUPS),
        valid_S=torch.tensor([row not in invalid for row in range(len(rewards))]),
        rollout_SR=torch.zeros(made.mask_SR.shape),
        position=0,
        metrics={},
    )


TOKENS = (7, 3, 6, 5, 1, 8)
"""The policy's own: three of the third critique's were forced."""


def spread(values: list[float]) -> list[list[float]]:
    return [[value] * n for value, n in zip(values, TOKENS, strict=True)]


def whitened(rows: list[list[float]]) -> list[list[float]]:
    flat = [value for row in rows for value in row]
    mean = sum(flat) / len(flat)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in flat) / (len(flat) - 1))
    return [[(value - mean) / (deviation + 1e-8) for value in row] for row in rows]


def test_opo_takes_off_the_mean_by_length() -> None:
    """Hao et al. 2025, as verl's ``compute_opo_outcome_advantage``."""
    first, second = 7 / 16, (5 + 0.25 + 8) / 14
    check("opo", spread([1 - first, -first, -first, 1 - second, 0.25 - second, 1 - second]))


@pytest.mark.parametrize("rewards", [REWARDS, (1.0, 0.0, 0.0, 0.0, 0.0, 0.0), (0.5, 1.0, 0.25, 2.0, -1.0, 1.0)])
def test_pass_k_is_what_a_critique_adds_to_the_best_of_k(rewards: tuple[float, ...]) -> None:
    """Every subset written out (Chen et al. 2025); the analytic form for rewards 0 and 1 below."""
    expected = []
    for row in range(6):
        group = [other for other in range(6) if GROUPS[other] == GROUPS[row]]
        best = {subset: max(rewards[other] for other in subset) for subset in combinations(group, 2)}
        mean = sum(best.values()) / len(best)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in best.values()) / len(best))
        mine = [value for subset, value in best.items() if row in subset]
        expected.append((sum(mine) / len(mine) - mean) / deviation if deviation else 0.0)
    check("pass_k", spread(expected), RLConfig(estimator="pass_k", pass_k=2), rewards=rewards)


def test_pass_k_of_rewards_0_and_1_is_the_papers_closed_form() -> None:
    """Chen et al. 2025: N = 6 critiques of which 4 are wrong, k = 3."""
    from ctrl_hpc.train.advantages import _pass_k

    mean = 1 - math.comb(4, 3) / math.comb(6, 3)
    deviation = math.sqrt(mean * (1 - mean))
    right, wrong = (1 - mean) / deviation, (1 - mean - math.comb(3, 2) / math.comb(5, 2)) / deviation
    found = _pass_k([0.0, 1.0, 0.0, 0.0, 1.0, 0.0], RLConfig(estimator="pass_k", pass_k=3))
    assert found == pytest.approx([wrong, right, wrong, wrong, right, wrong], rel=1e-12)


def test_reinforce_pp_compares_with_the_whole_step() -> None:
    """Hu et al. 2025, as verl's ``compute_reinforce_plus_plus_outcome_advantage``."""
    check("reinforce_pp", whitened(spread(list(REWARDS))))
    discounted = [[r * 0.9 ** (n - 1 - t) for t in range(n)] for r, n in zip(REWARDS, TOKENS, strict=True)]
    check("reinforce_pp", whitened(discounted), RLConfig(estimator="reinforce_pp", gae_gamma=0.9))


def test_reinforce_pp_with_a_baseline_takes_off_the_groups_mean_first() -> None:
    """As verl's ``compute_reinforce_plus_plus_baseline_outcome_advantage``."""
    centred = [1 - 1 / 3, -1 / 3, -1 / 3, 1 - 0.75, 0.25 - 0.75, 1 - 0.75]
    check("reinforce_pp_baseline", whitened(spread(centred)))


def check(
    name: str,
    expected: list[list[float]],
    options: RLConfig | None = None,
    rewards: tuple[float, ...] = REWARDS,
) -> None:
    found = estimate(experience(rewards), None, options or RLConfig(estimator=name))  # type: ignore[arg-type]
    mask_SR = batch().mask_SR
    assert bool((found.advantages_SR[~mask_SR] == 0).all())
    flat = torch.tensor([value for row in expected for value in row], dtype=torch.float64)
    ours = found.advantages_SR[mask_SR].double()
    assert float((ours - flat).norm()) <= 1e-6 * float(flat.norm())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_masked_critique_is_in_no_comparison(name: str) -> None:
    options = RLConfig(estimator=name, pass_k=2)  # type: ignore[arg-type]
    one = estimate(experience((1.0, 0.0, 0.0, 1.0, 0.25, 0.5), (1,)), None, options).advantages_SR
    other = estimate(experience((1.0, 7.0, 0.0, 1.0, 0.25, 0.5), (1,)), None, options).advantages_SR
    assert torch.equal(one, other) and bool((one[1] == 0).all()) and bool((one[3:] != 0).any())
    assert bool(estimate(experience(invalid=tuple(range(6))), None, options).advantages_SR.eq(0).all())


def test_every_estimator_of_the_configuration_is_known() -> None:
    import ctrl_kernels

    from ctrl_hpc.config import facts

    assert set(facts.facts(Config)["rl.estimator"].choices) == {*ctrl_kernels.ESTIMATORS, *ESTIMATORS, "gae"}
    assert set(ESTIMATORS) - OVER_THE_STEP == {"opo", "pass_k"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            ["rl.loss=grpo"],
            r"rl\.loss: 'grpo' is not allowed; it must be one of clip, cispo, dppo, sapo, gmpo, .*FILE\.py",
        ),
        (["rl.loss=nowhere.py:loss"], r"rl\.loss: .*nowhere\.py:loss' is not allowed"),
        (["rl.loss=sapo", "rl.ratio=sequence"], r"rl\.ratio: goes with rl\.loss=clip or clip_cov, not sapo"),
        (["rl.loss=cispo", "rl.dual_clip=3"], r"rl\.dual_clip: goes with rl\.loss=clip or gspo_token or clip_cov"),
        (["rl.ratio_cap=3"], r"rl\.ratio_cap: goes with rl\.loss=dppo, not clip"),
        (["rl.clip_low=2"], r"rl\.clip_low: 2\.0 leaves no ratio above 0; at most 1"),
        (["rl.importance_bounds=[5,0.5]"], r"rl\.importance_bounds: .*two numbers, the lower first"),
        (["rl.estimator=pass_k", "rl.pass_k=8"], r"rl\.pass_k: 8 must be less than rl\.group_size=8"),
    ],
)
def test_an_objective_that_cannot_be_is_refused_in_one_line(changes: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        load(ROOT / "configs" / "tiny.yaml", changes)


def test_a_function_that_is_not_there_or_fails_is_told(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def loss(*a): return 1\n")
    (tmp_path / "broken.py").write_text("import nothing_of_that_name\n")
    with pytest.raises(ValueError, match="defines no function other"):
        load_function("rl.loss", f"{tmp_path}/mine.py:other")
    with pytest.raises(ValueError, match=r"broken\.py fails: ModuleNotFoundError"):
        load_function("rl.loss", f"{tmp_path}/broken.py:loss")
    for place in ("mine.py:other", "mine.py:0", "none.py:loss"):  # told before anything is run
        with pytest.raises(ValueError, match=r"rl\.loss: .* is not allowed; .*that exists and defines it"):
            load(ROOT / "configs" / "tiny.yaml", [f"rl.loss={tmp_path}/{place}"])
    (tmp_path / "odd.py").write_text("if True:\n    def loss(*a): return 1\nother: object = loss\nx = y = loss\n")
    for name in ("loss", "other", "y"):
        assert load(ROOT / "configs" / "tiny.yaml", [f"rl.loss={tmp_path}/odd.py:{name}"]).rl.loss.endswith(name)
    with pytest.raises(ValueError, match="must give a tensor of shape"):
        Case().ours(RLConfig(loss=f"{tmp_path}/mine.py:loss"))
