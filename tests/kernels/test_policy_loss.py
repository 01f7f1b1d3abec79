"""``policy_loss``: hand-worked values, then both backends against each other and against finite differences."""

import itertools
import math
from typing import Any

import ctrl_kernels
import pytest
import torch
from kernel_oracle import relative_error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN = float("nan")
BACKENDS = ["triton", "torch"]
AGGREGATIONS = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]


def one(ratio: float, advantage: float, backend: str, **options: Any) -> tuple[float, float]:
    """Loss and gradient of a single token with this ratio."""
    logprobs = torch.tensor([[math.log(ratio)]], device=DEVICE, requires_grad=True)
    loss, _ = ctrl_kernels.policy_loss(
        logprobs,
        torch.zeros(1, 1, device=DEVICE),
        torch.full((1, 1), advantage, device=DEVICE),
        torch.ones(1, 1, device=DEVICE),
        backend=backend,
        **options,
    )
    loss.backward()
    return loss.item(), logprobs.grad.item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "gradient"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.25, 2.0, -2.5, -2.5),  # inside the asymmetric interval [0.8, 1.28]
        (1.5, 2.0, -2.56, 0.0),
        (0.5, 2.0, -1.0, -1.0),  # too low, but the advantage pulls it up
        (0.5, -2.0, 1.6, 0.0),
        (1.5, -2.0, 3.0, 3.0),  # too high, but the advantage pushes it down
        (4.0, -2.0, 6.0, 0.0),  # dual clip at 3
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_clipping(ratio: float, advantage: float, loss: float, gradient: float, backend: str) -> None:
    found = one(ratio, advantage, backend, clip_low=0.2, clip_high=0.28, dual_clip=3.0)
    assert found == pytest.approx((loss, gradient), abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_exact_boundary_keeps_the_gradient(backend: str) -> None:
    assert one(1.0, 2.0, backend, clip_low=0.0, clip_high=0.0) == (-2.0, -2.0)
    assert one(1.0, -2.0, backend, clip_low=0.0, clip_high=0.0) == (2.0, 2.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sign", [1, -1])
def test_log_ratios_are_clamped_without_gradient(sign: int, backend: str) -> None:
    logprobs = torch.tensor([[25.0 * sign]], device=DEVICE, requires_grad=True)
    zero, one_ = torch.zeros(1, 1, device=DEVICE), torch.ones(1, 1, device=DEVICE)
    for ratio in ("token", "sequence"):
        loss, _ = ctrl_kernels.policy_loss(logprobs, zero, -one_, one_, clip_low=1.0, ratio=ratio, backend=backend)
        assert loss.item() == pytest.approx(math.exp(20.0 * sign), rel=1e-5)
        assert torch.autograd.grad(loss, logprobs)[0].item() == 0.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("estimator", "difference", "kl", "slope"),
    [
        ("k1", 0.5, 0.5, 1.0),
        ("k2", -2.0, 2.0, -2.0),
        ("k3", 1.0, math.exp(-1), 1 - math.exp(-1)),
        ("k3", -4.0, 10.0, 0.0),  # e^4 - 5 = 49.6 is clamped to 10
        ("k1", 30.0, 20.0, 0.0),
        ("k2", -30.0, 200.0, 0.0),
    ],
)
def test_kl_estimators(estimator: str, difference: float, kl: float, slope: float, backend: str) -> None:
    logprobs = torch.full((1, 1), difference, device=DEVICE, requires_grad=True)
    zero, unit = torch.zeros(1, 1, device=DEVICE), torch.ones(1, 1, device=DEVICE)
    loss, metrics = ctrl_kernels.policy_loss(
        logprobs, logprobs.detach(), zero, unit, ref_logprobs=zero, kl_coef=0.1, kl_estimator=estimator, backend=backend
    )
    assert loss.item() == pytest.approx(0.1 * kl, rel=1e-5)
    assert metrics["kl"].item() == pytest.approx(kl, rel=1e-5)
    assert torch.autograd.grad(loss, logprobs)[0].item() == pytest.approx(0.1 * slope, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_what_an_estimators_expected_gradient_is_the_gradient_of(estimator: str) -> None:
    """k1's of nothing, k2's of KL(policy || reference), k3's of KL(reference || policy), over five tokens."""
    generator = torch.Generator().manual_seed(5)
    logits, reference = (torch.randn(5, dtype=torch.float64, generator=generator) for _ in range(2))
    logits.requires_grad_()
    policy, other = logits.log_softmax(0), reference.log_softmax(0)
    one, zero = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    expected = torch.zeros(())
    for token in range(5):
        picked = policy[token].reshape(1, 1)
        loss, _ = ctrl_kernels.policy_loss(
            picked, picked.detach(), zero, one, ref_logprobs=other[token].reshape(1, 1), kl_coef=1.0,
            kl_estimator=estimator, backend="torch",
        )  # fmt: skip
        expected = expected + policy[token].exp().detach() * loss
    divergence = {
        "k1": 0 * policy.sum(),
        "k2": (policy.exp() * (policy - other)).sum(),
        "k3": (other.exp() * (other - policy)).sum(),
    }[estimator]
    (found,) = torch.autograd.grad(expected, logits, retain_graph=True)
    (wanted,) = torch.autograd.grad(divergence, logits)
    assert torch.allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_aggregations_and_metrics(backend: str) -> None:
    advantages = torch.tensor([[1.0, 2.0, NAN], [6.0, NAN, NAN], [NAN, NAN, NAN]], device=DEVICE)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]], device=DEVICE)
    logprobs = torch.where(mask == 1, -0.5, NAN).requires_grad_()
    arguments = (logprobs, logprobs.detach(), advantages, mask)
    for aggregation, expected in zip(AGGREGATIONS, (-9 / 3, -(1.5 + 6) / 2, -(3 + 6) / 2), strict=True):
        loss, metrics = ctrl_kernels.policy_loss(*arguments, aggregation=aggregation, backend=backend)
        assert loss.item() == pytest.approx(expected)
        assert metrics["tokens"] == 3 and metrics["ratio"] == 1 and metrics["clip_fraction"] == 0
        halved, _ = ctrl_kernels.policy_loss(*arguments, aggregation=aggregation, denominator=10.0, backend=backend)
        scale = {"token-mean": 3, "seq-mean-token-mean": 2, "seq-mean-token-sum": 2}[aggregation]
        assert halved.item() == pytest.approx(expected * scale / 10)
    tensor = torch.tensor(10, device=DEVICE)
    loss, _ = ctrl_kernels.policy_loss(*arguments, denominator=tensor, backend=backend)
    assert loss.item() == pytest.approx(-0.9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_fully_masked_batch(aggregation: str, ratio: str, backend: str) -> None:
    nan = torch.full((2, 3), NAN, device=DEVICE)
    logprobs = nan.clone().requires_grad_()
    loss, metrics = ctrl_kernels.policy_loss(
        logprobs, nan, nan, torch.zeros(2, 3, device=DEVICE), aggregation=aggregation, ratio=ratio, backend=backend
    )
    assert loss.item() == 0.0
    assert all(value.item() == 0.0 for value in metrics.values())
    loss.backward()
    assert torch.equal(logprobs.grad, torch.zeros(2, 3, device=DEVICE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequence_ratio(backend: str) -> None:
    logprobs = torch.tensor([[0.1, 0.3, NAN], [-0.9, 0.0, 0.0]], device=DEVICE, requires_grad=True)
    old = torch.zeros(2, 3, device=DEVICE)
    advantages = torch.tensor([[1.0], [-1.0]], device=DEVICE).expand(2, 3)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]], device=DEVICE)
    loss, metrics = ctrl_kernels.policy_loss(
        logprobs, old, advantages, mask, ratio="sequence", aggregation="seq-mean-token-mean", backend=backend
    )
    # Ratios exp(0.2) = 1.2214 and exp(-0.3) = 0.7408: the first clips at 1.2, the second at 0.8.
    assert loss.item() == pytest.approx((-1.2 + 0.8) / 2, rel=1e-5)
    assert metrics["clip_fraction"].item() == 1.0
    wide, _ = ctrl_kernels.policy_loss(
        logprobs, old, advantages, mask, ratio="sequence", clip_low=0.5, clip_high=0.5,
        aggregation="seq-mean-token-mean", backend=backend,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(wide, logprobs)
    first, second = -math.exp(0.2) / 4, math.exp(-0.3) / 6
    assert gradient.tolist() == [pytest.approx([first, first, 0.0]), pytest.approx([second] * 3)]


def random_inputs(sequences: int, steps: int, seed: int) -> dict[str, torch.Tensor]:
    """A batch with NaN in masked slots, a masked row, and log-ratios far outside the clamp."""
    generator = torch.Generator().manual_seed(seed)

    def normal() -> torch.Tensor:
        return torch.randn(sequences, steps, generator=generator)

    old = normal() - 2
    tensors = {
        "logprobs": old + 0.5 * normal(),
        "old_logprobs": old,
        "advantages": normal(),
        "ref_logprobs": old + normal(),
        "importance_weights": normal().abs(),
        "entropy": normal().abs(),
    }
    tensors["logprobs"][0, 0] = old[0, 0] + 25
    tensors["logprobs"][1, 1] = old[1, 1] - 25
    mask = torch.rand(sequences, steps, generator=generator) > 0.3
    mask[-1] = False
    return {name: x.masked_fill(~mask, NAN).to(DEVICE) for name, x in tensors.items()} | {"mask": mask.to(DEVICE)}


def run(tensors: dict[str, torch.Tensor], dtype: torch.dtype, **options: Any) -> list[torch.Tensor]:
    """In ``dtype``: loss, metrics and gradients, the upstream gradient first 3, then, over the retained graph, 1."""
    inputs = {name: x if name == "mask" else x.to(dtype).clone() for name, x in tensors.items()}
    leaves = [inputs[name].requires_grad_() for name in ("logprobs", "entropy") if name in inputs]
    loss, metrics = ctrl_kernels.policy_loss(**inputs, **options)
    tripled = torch.autograd.grad(3 * loss, leaves, retain_graph=True, allow_unused=True)
    single = torch.autograd.grad(loss, leaves, allow_unused=True)
    gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, single, strict=True)]
    for three, g in zip(tripled, gradients, strict=True):
        assert three is None or torch.allclose(three, 3 * g, rtol=1e-5 if dtype.itemsize > 2 else 1e-2, atol=1e-7)
    return [loss.detach(), *metrics.values(), *gradients]


@pytest.mark.parametrize(
    ("ratio", "aggregation", "estimator", "dual_clip"),
    [
        (*combination, (None, 3.0)[index % 2])
        for index, combination in enumerate(itertools.product(("token", "sequence"), AGGREGATIONS, ("k1", "k2", "k3")))
    ],
)
def test_triton_agrees_with_the_definition(
    ratio: str, aggregation: str, estimator: str, dual_clip: float | None
) -> None:
    tensors = random_inputs(3, 40, seed=7)
    options = {
        "ratio": ratio,
        "aggregation": aggregation,
        "kl_estimator": estimator,
        "dual_clip": dual_clip,
        "kl_coef": 0.1,
        "entropy_coef": 0.02,
    }
    found = run(tensors, torch.float32, backend="triton", **options)
    expected = run(tensors, torch.float64, backend="torch", **options)
    scale = sum(x.nan_to_num().abs().sum().item() for name, x in tensors.items() if name != "mask")
    for a, b in zip(found[:-2], expected[:-2], strict=True):
        assert abs(a.item() - b.item()) <= 1e-6 * max(abs(b.item()), scale / 100)
    assert relative_error(found[-2], expected[-2]) < 2e-6
    assert relative_error(found[-1], expected[-1]) < 2e-6


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_several_blocks(aggregation: str, ratio: str) -> None:
    tensors = random_inputs(3, 2500, seed=1)
    found = run(tensors, torch.float32, backend="triton", aggregation=aggregation, ratio=ratio)
    expected = run(tensors, torch.float64, backend="torch", aggregation=aggregation, ratio=ratio)
    assert relative_error(found[-2], expected[-2]) < 2e-6
    assert found[0].item() == pytest.approx(expected[0].item(), rel=2e-5, abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_optional_tensors_are_optional(backend: str) -> None:
    tensors = random_inputs(2, 5, seed=3)
    plain = {name: tensors[name] for name in ("logprobs", "old_logprobs", "advantages", "mask")}
    loss, *_ = run(plain, torch.float32, backend=backend)
    everything = run(tensors, torch.float32, backend=backend)
    assert loss.isfinite() and everything[0].isfinite()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_half_precision_is_read_and_written_alone(ratio: str, dtype: torch.dtype, backend: str) -> None:
    """All between is float32: values of the rounded inputs, and gradients rounded once."""
    tensors = {name: x if name == "mask" else x.to(dtype) for name, x in random_inputs(3, 40, seed=9).items()}
    options = {"ratio": ratio, "kl_coef": 0.1, "entropy_coef": 0.02, "dual_clip": 3.0}
    found = run(tensors, dtype, backend=backend, **options)
    expected = run(tensors, torch.float64, backend="torch", **options)
    precision = 2**-8 if dtype == torch.bfloat16 else 2**-11
    for a, b in zip(found[:-2], expected[:-2], strict=True):
        assert a.dtype == torch.float32
        assert abs(a.item() - b.item()) <= 1e-5 * max(1.0, abs(b.item()))
    for a, b in zip(found[-2:], expected[-2:], strict=True):
        assert a.dtype == dtype
        assert relative_error(a, b) < precision


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [(True, False), (False, True), (False, False)])
def test_frozen_inputs(trained: tuple[bool, bool], backend: str) -> None:
    tensors = random_inputs(3, 40, seed=2)
    options = {"kl_coef": 0.1, "entropy_coef": 0.02}
    expected = run(tensors, torch.float64, backend="torch", **options)
    leaves = [tensors[n].clone().requires_grad_(t) for n, t in zip(("logprobs", "entropy"), trained, strict=True)]
    inputs = tensors | {"logprobs": leaves[0], "entropy": leaves[1]}
    loss, _ = ctrl_kernels.policy_loss(**inputs, backend=backend, **options)
    assert loss.item() == pytest.approx(expected[0].item(), rel=1e-5)
    assert loss.requires_grad == any(trained)
    if any(trained):
        loss.backward()
    for leaf, gradient, t in zip(leaves, expected[-2:], trained, strict=True):
        assert (leaf.grad is not None) == t
        assert not t or relative_error(leaf.grad, gradient) < 2e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_views_and_expanded_inputs(backend: str) -> None:
    tensors = random_inputs(4, 6, seed=4)
    tensors["advantages"] = tensors["advantages"][:, :1].nan_to_num().expand(4, 6)
    dense = run({name: x.contiguous() for name, x in tensors.items()}, torch.float32, backend=backend)
    wide = {name: torch.stack((x, x), 2)[..., 1] if name != "advantages" else x for name, x in tensors.items()}
    inputs = wide | {"logprobs": wide["logprobs"].requires_grad_()}
    loss, _ = ctrl_kernels.policy_loss(**inputs, backend=backend)
    assert torch.equal(loss, dense[0])
    assert torch.equal(torch.autograd.grad(loss, inputs["logprobs"])[0], dense[-2])


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradcheck_of_the_definition(aggregation: str, ratio: str) -> None:
    generator = torch.Generator().manual_seed(5)
    old, advantages = torch.randn(2, 2, 3, generator=generator, dtype=torch.float64)
    logprobs = (old + 0.3).requires_grad_()
    entropy = torch.rand(2, 3, generator=generator, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[1, 1, 0], [1, 0, 1]])
    options = {"ratio": ratio, "aggregation": aggregation, "kl_coef": 0.1, "entropy_coef": 0.02, "dual_clip": 3.0}
    assert torch.autograd.gradcheck(
        lambda x, h: ctrl_kernels.policy_loss(x, old, advantages, mask, ref_logprobs=old, entropy=h, **options)[0],
        (logprobs, entropy),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": "group"}, "token, sequence"),
        ({"aggregation": "mean"}, "seq-mean-token-sum"),
        ({"kl_estimator": "k4"}, "k1, k2, k3"),
        ({"clip_low": 1.5}, "clip_low"),
        ({"clip_high": -0.1}, "clip_high"),
        ({"dual_clip": 1.0}, "dual_clip"),
        ({"kl_coef": 0.1}, "needs ref_logprobs"),
        ({"entropy_coef": 0.1}, "needs entropy"),
        ({"denominator": 0.0}, "denominator"),
        ({"denominator": torch.ones(2)}, "scalar"),
        ({"mask": torch.zeros(2, 4)}, "mask must have shape"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    zeros = torch.zeros(2, 3)
    inputs = {"logprobs": zeros, "old_logprobs": zeros, "advantages": zeros, "mask": zeros} | arguments
    with pytest.raises(ValueError, match=message):
        ctrl_kernels.policy_loss(**inputs)
