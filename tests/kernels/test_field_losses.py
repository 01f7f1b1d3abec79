"""Losses of the field against formulas written out here in float64: values and gradients, both backends, one pass."""

import math
from collections.abc import Callable
from typing import Any

import ctrl_kernels
import pytest
import torch
from kernel_oracle import dense_logprobs, relative_error

Tensors = dict[str, torch.Tensor]
Term = Callable[[torch.Tensor, Tensors], torch.Tensor]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = ["triton", "torch"]


def batch(seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensors:
    """Sequences with holes and a masked one, ratios far on both sides of 1, advantages of both signs and 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(4, 21, generator=generator, dtype=torch.float64)

    old = -normal().abs() - 0.05
    mask = torch.rand(4, 21, generator=generator) < 0.8
    mask[2] = False
    found = {
        "logprobs": (old + 0.5 * normal()).clamp_max(-0.01),
        "old_logprobs": old,
        "advantages": normal().where(torch.rand(4, 21, generator=generator) < 0.9, 0.0),
        "importance_weights": normal().abs(),
        "drift_weights": normal().abs(),
        "mask": mask,
    }
    # What kernels read in single precision is what the formulas here start from.
    return {name: x if name == "mask" else x.float().to(dtype).to(DEVICE) for name, x in found.items()} | {
        "mask": mask.to(DEVICE)
    }


def ratio(logp: torch.Tensor, x: Tensors) -> torch.Tensor:
    return (logp - x["old_logprobs"]).clamp(-20, 20).exp()


def sequence_mean(values: torch.Tensor, x: Tensors) -> torch.Tensor:
    mask = x["mask"].to(values.dtype)
    return (values * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp_min(1)


def ppo(r: torch.Tensor, x: Tensors, low: float, high: float) -> torch.Tensor:
    return torch.maximum(-x["advantages"] * r, -x["advantages"] * r.clamp(1 - low, 1 + high))


def cispo(logp: torch.Tensor, x: Tensors) -> torch.Tensor:
    return -ratio(logp, x).clamp(0.7, 1.4).detach() * x["advantages"] * logp


def dppo(kind: str) -> Term:
    def term(logp: torch.Tensor, x: Tensors) -> torch.Tensor:
        p, q = logp.detach().exp(), x["old_logprobs"].exp()
        if kind == "tv":
            valid = torch.where(x["advantages"] > 0, p - q <= 0.15, p - q >= -0.1)
        else:
            d = q * (x["old_logprobs"] - logp.detach()) + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
            valid = torch.where(x["advantages"] > 0, (d <= 0.15) | (p <= q), (d <= 0.1) | (p >= q))
        return -x["advantages"] * ratio(logp, x).clamp(max=1.3).detach() * logp * valid

    return term


def sapo(logp: torch.Tensor, x: Tensors) -> torch.Tensor:
    tau = torch.where(x["advantages"] > 0, 1.2, 1.7)
    return -x["advantages"] * torch.sigmoid(tau * (ratio(logp, x) - 1)) * 4 / tau


def gspo(logp: torch.Tensor, x: Tensors) -> torch.Tensor:
    return ppo(sequence_mean(logp - x["old_logprobs"], x).exp(), x, 0.1, 0.1)


def gspo_token(logp: torch.Tensor, x: Tensors) -> torch.Tensor:
    mean = sequence_mean(logp - x["old_logprobs"], x).detach()
    return ppo((logp - logp.detach() + mean).exp(), x, 0.1, 0.1)


def gmpo(logp: torch.Tensor, x: Tensors) -> torch.Tensor:
    change, sign = logp - x["old_logprobs"], x["advantages"].sign()
    kept = sign * torch.minimum(sign * change, sign * change.clamp(-0.3, 0.4))
    return -x["advantages"] * sequence_mean(kept, x).exp()


def kl_cov(logp: torch.Tensor, x: Tensors) -> torch.Tensor:
    return -x["advantages"] * ratio(logp, x) + x["drift_weights"] * (logp - x["old_logprobs"]).abs()


LOSSES: dict[str, tuple[Term, dict[str, Any]]] = {
    "CISPO": (cispo, {"objective": "cispo", "clip_low": 0.3, "clip_high": 0.4}),
    "DPPO-TV": (dppo("tv"), {"objective": "dppo_tv", "clip_low": 0.1, "clip_high": 0.15, "ratio_cap": 1.3}),
    "DPPO-KL": (dppo("kl"), {"objective": "dppo_kl", "clip_low": 0.1, "clip_high": 0.15, "ratio_cap": 1.3}),
    "SAPO": (sapo, {"objective": "sapo", "tau_positive": 1.2, "tau_negative": 1.7}),
    "GSPO": (gspo, {"ratio": "sequence", "clip_low": 0.1, "clip_high": 0.1}),
    "GSPO-token": (gspo_token, {"ratio": "sequence-token", "clip_low": 0.1, "clip_high": 0.1}),
    "GMPO": (gmpo, {"objective": "gmpo", "clip_low": 0.3, "clip_high": 0.4}),
    "KL-Cov": (kl_cov, {"clip_low": 1.0, "clip_high": math.inf}),
}
ONE_PASS = [name for name in LOSSES if name not in ("GSPO", "GSPO-token", "GMPO")]


def aggregated(terms: torch.Tensor, x: Tensors, aggregation: str) -> torch.Tensor:
    mask = x["mask"].to(terms.dtype)
    if aggregation == "token-mean":
        return (terms * mask).sum() / mask.sum()
    sequences = mask.any(1).sum()
    if aggregation == "seq-mean-token-sum":
        return (terms * mask).sum() / sequences
    return sequence_mean(terms, x).sum() / sequences


def given(name: str, x: Tensors) -> Tensors:
    return {key: value for key, value in x.items() if key != "drift_weights" or name == "KL-Cov"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("aggregation", ctrl_kernels.AGGREGATIONS)
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients(name: str, aggregation: str, backend: str) -> None:
    term, options = LOSSES[name]
    exact, single = batch(), batch(dtype=torch.float32)
    logp = exact["logprobs"].requires_grad_()
    expected = aggregated(term(logp, exact) * exact["importance_weights"], exact, aggregation)
    (wanted,) = torch.autograd.grad(expected, logp)
    leaf = single["logprobs"].requires_grad_()
    masked = {key: x if key == "mask" else x.masked_fill(~single["mask"], math.nan) for key, x in single.items()}
    inputs = given(name, masked)
    loss, metrics = ctrl_kernels.policy_loss(**inputs, aggregation=aggregation, backend=backend, **options)
    (found,) = torch.autograd.grad(3 * loss, leaf)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6, abs=1e-7)
    assert relative_error(found / 3, wanted) < 1e-6
    assert all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ratio_name", ctrl_kernels.RATIOS)
@pytest.mark.parametrize("estimator", ctrl_kernels.KL_ESTIMATORS)
def test_corrected_kl(estimator: str, ratio_name: str, backend: str) -> None:
    exact, single = batch(seed=4), batch(seed=4, dtype=torch.float32)
    leaf, logp = single["logprobs"].requires_grad_(), exact["logprobs"].requires_grad_()
    ref = exact["old_logprobs"].roll(1, 1).masked_fill(~exact["mask"], 0.0)
    d = logp - ref
    kl = {"k1": d, "k2": d.square() / 2, "k3": ((-d).exp() + d - 1).clamp(-10, 10)}[estimator]
    mean = sequence_mean(logp - exact["old_logprobs"], exact)
    r = {"token": ratio(logp, exact), "sequence": mean.exp()}
    r["sequence-token"] = (logp - logp.detach() + mean.detach()).exp()
    expected = aggregated(ppo(r[ratio_name], exact, 0.2, 0.2) + 0.3 * r[ratio_name] * kl, exact, "token-mean")
    loss, _ = ctrl_kernels.policy_loss(
        leaf, single["old_logprobs"], single["advantages"], single["mask"], ref_logprobs=ref.float(), kl_coef=0.3,
        kl_estimator=estimator, kl_correction=True, ratio=ratio_name, backend=backend,
    )  # fmt: skip
    assert loss.item() == pytest.approx(expected.item(), rel=2e-6)
    assert relative_error(*(torch.autograd.grad(x, y)[0] for x, y in ((loss, leaf), (expected, logp)))) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ONE_PASS)
def test_one_pass(name: str, backend: str) -> None:
    term, options = LOSSES[name]
    exact, single = batch(seed=1), batch(seed=1, dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(4, 21, 8, generator=generator).to(DEVICE).requires_grad_()
    weight = torch.randn(50, 8, generator=generator).to(DEVICE).requires_grad_()
    targets = torch.randint(50, (4, 21), generator=generator).to(DEVICE)
    leaves = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logp, _ = dense_logprobs(leaves[0].flatten(0, 1) @ leaves[1].T, targets.flatten())
    logp = logp.view(4, 21)
    single["old_logprobs"] = (logp.detach() + exact["old_logprobs"] + 0.8).float().clamp_max(-0.01)
    exact["old_logprobs"] = single["old_logprobs"].double()
    expected = aggregated(term(logp, exact) * exact["importance_weights"], exact, "seq-mean-token-mean")
    wanted = torch.autograd.grad(expected, leaves)
    inputs = {key: x for key, x in given(name, single).items() if key != "logprobs"}
    loss, _ = ctrl_kernels.linear_policy_loss(
        hidden, weight, targets, **inputs, aggregation="seq-mean-token-mean", backend=backend, **options
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight)), wanted, strict=True):
        assert relative_error(a, b) < 3e-6


@pytest.mark.parametrize("name", ["GSPO", "GSPO-token", "GMPO"])
def test_losses_over_sequences_take_two_passes(name: str) -> None:
    zeros = torch.zeros(1, 2, device=DEVICE)
    with pytest.raises(ValueError, match="needs all log-probs first"):
        ctrl_kernels.linear_policy_loss(zeros[..., None], zeros.T, zeros.long(), zeros, zeros, zeros, **LOSSES[name][1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_advantages_of_sequences(backend: str) -> None:
    x = batch(dtype=torch.float32)
    a_sequence = x["advantages"][:, 0]
    losses = [
        ctrl_kernels.policy_loss(
            x["logprobs"], x["old_logprobs"], advantages, x["mask"], ratio="sequence", backend=backend
        )[0]
        for advantages in (a_sequence, a_sequence[:, None], a_sequence[:, None].expand(4, 21).contiguous())
    ]
    assert losses[0] == losses[1] == losses[2]


def test_covariance_tokens() -> None:
    logprobs = torch.tensor([[-1.0, -2.0, -3.0, -9.0]])
    advantages = torch.tensor([[3.0, 0.0, -2.0, 99.0]])
    mask = torch.tensor([[1, 1, 1, 0]])
    # Means -2 and 1/3; covariances 1 * 8/3, 0, -1 * -7/3.
    largest = ctrl_kernels.covariance_tokens(logprobs, advantages, mask, fraction=0.4)
    assert largest.tolist() == [[True, False, False, False]]
    within = ctrl_kernels.covariance_tokens(logprobs, advantages, mask, fraction=1.0, bounds=(2.0, 2.5))
    assert within.tolist() == [[False, False, True, False]]
    none = ctrl_kernels.covariance_tokens(logprobs, advantages, mask * 0, fraction=0.4)
    assert not none.any()
    generator = torch.Generator().manual_seed(0)
    many = ctrl_kernels.covariance_tokens(
        torch.randn(8, 100, generator=generator), torch.randn(8, 100, generator=generator), torch.ones(8, 100),
        fraction=0.01, bounds=(-math.inf, math.inf), generator=generator,
    )  # fmt: skip
    assert many.sum() == 8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("aggregation", ctrl_kernels.AGGREGATIONS)
@pytest.mark.parametrize("clip", [0.2, None])
def test_value_loss(clip: float | None, aggregation: str, backend: str) -> None:
    x, single = batch(seed=3), batch(seed=3, dtype=torch.float32)
    leaf = x["logprobs"].requires_grad_()
    error = (leaf - x["advantages"]).square()
    if clip is not None:
        bounded = leaf.clamp(x["old_logprobs"] - clip, x["old_logprobs"] + clip)
        error = torch.maximum(error, (bounded - x["advantages"]).square())
    expected = 0.5 * aggregated(error, x, aggregation)
    (wanted,) = torch.autograd.grad(expected, leaf)
    values = single["logprobs"].requires_grad_()
    nan = {k: t.masked_fill(~single["mask"], math.nan) for k, t in single.items() if k != "mask"}
    loss, metrics = ctrl_kernels.value_loss(
        nan["logprobs"], nan["old_logprobs"], nan["advantages"], single["mask"],
        clip=clip, aggregation=aggregation, backend=backend,
    )  # fmt: skip
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert relative_error(torch.autograd.grad(loss, values)[0], wanted) < 1e-6
    assert metrics["tokens"] == single["mask"].sum() and (metrics["clip_fraction"] > 0) == (clip is not None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_value_loss_worked_by_hand(backend: str) -> None:
    values = torch.tensor([[1.0, 3.0]], device=DEVICE, requires_grad=True)
    zeros, ones = torch.zeros(1, 2, device=DEVICE), torch.ones(1, 2, device=DEVICE)
    # Against returns 0.9: (0.1)^2 < (0.2 - 0.9)^2 where the first is clipped from 1 to 0.2; 2.1^2 > (0.2 - 0.9)^2.
    loss, metrics = ctrl_kernels.value_loss(values, zeros, 0.9 * ones, ones, clip=0.2, backend=backend)
    assert loss.item() == pytest.approx((0.5 * 0.49 + 0.5 * 4.41) / 2)
    assert torch.autograd.grad(loss, values)[0].tolist() == [pytest.approx([0.0, 2.1 / 2])]
    assert metrics["clip_fraction"] == 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "grpo"}, "clip, cispo, dppo_tv, dppo_kl, sapo, gmpo"),
        ({"objective": "sapo", "ratio": "sequence"}, "goes with objective='clip' alone"),
        ({"objective": "cispo", "dual_clip": 3.0}, "dual_clip goes with"),
        ({"ratio_cap": 2.0}, "ratio_cap"),
        ({"objective": "sapo", "tau_positive": 0.0}, "tau_positive"),
        ({"objective": "dppo_tv", "clip_low": -0.1}, "clip_low"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    zeros = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=message):
        ctrl_kernels.policy_loss(zeros, zeros, zeros, zeros, **options)
