"""Inputs at the edge, on both backends: no rows, no columns, odd strides, numbers that are none, transforms."""

import math
from collections.abc import Callable
from typing import Any

import ctrl_kernels
import pytest
import torch

BACKENDS = ["triton", "torch"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "columns"), [(0, 10), (0, 0), (3, 1), (3, 0)])
def test_no_tokens_and_no_columns(tokens: int, columns: int, backend: Any) -> None:
    """One column is certain; a target outside the vocabulary, which no columns at all make every one, is NaN."""
    targets = zeros(tokens, dtype=torch.int64)
    logits, hidden, weight = (
        x.requires_grad_() for x in (normal(tokens, columns), normal(tokens, 4), normal(columns, 4))
    )
    for logprobs, entropy, leaves in (
        (*ctrl_kernels.token_logprobs(logits, targets, return_entropy=True, backend=backend), [logits]),
        (
            *ctrl_kernels.linear_token_logprobs(hidden, weight, targets, return_entropy=True, backend=backend),
            [hidden, weight],
        ),
    ):
        assert logprobs.shape == entropy.shape == (tokens,)
        assert (entropy == 0).all()
        assert logprobs.isnan().all() if columns == 0 else (logprobs == 0).all()
        for gradient, leaf in zip(torch.autograd.grad((logprobs + entropy).sum(), leaves), leaves, strict=True):
            assert gradient.shape == leaf.shape and (gradient == 0).all()
    loss, _ = ctrl_kernels.linear_policy_loss(
        hidden, weight, targets, zeros(tokens) - 1, zeros(tokens) + 1, zeros(tokens) + 1, backend=backend
    )
    if columns or not tokens:  # -min(e, 1.2) where the log-prob rose from -1 to 0
        assert loss.item() == pytest.approx(-1.2 if tokens else 0.0)
        assert all((x == 0).all() for x in torch.autograd.grad(loss, (hidden, weight)))
    else:
        assert loss.isnan()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_empty_grids(shape: tuple[int, int], backend: Any) -> None:
    empty, leaf = zeros(*shape), zeros(*shape).requires_grad_()
    for function in (ctrl_kernels.policy_loss, ctrl_kernels.value_loss):
        loss, metrics = function(leaf, empty, empty, empty, backend=backend)
        assert loss == 0 and all(value == 0 for value in metrics.values())
        assert torch.autograd.grad(loss, leaf)[0].shape == shape
    advantages, returns = ctrl_kernels.gae(empty, empty, empty, gamma=1.0, lam=1.0, backend=backend)
    assert advantages.shape == returns.shape == shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_strides(backend: Any) -> None:
    """Transposed, sliced and expanded tensors give what dense ones do, their gradients too."""
    targets = torch.tensor([1, 9, 2, 9, -100, 9, 4, 9], device=DEVICE)[::2]
    logits, hidden, weight = normal(20, 4).T[:, ::2], normal(6, 4).T, normal(6, 10).T
    grids = normal(5, 4).T, normal(5, 4, seed=1).T, normal(4, 1).expand(4, 5), (normal(5, 4, seed=2) > 0).T

    def outputs(dense: bool) -> list[torch.Tensor]:
        def given(x: torch.Tensor) -> torch.Tensor:
            return (x.contiguous() if dense else x).detach().requires_grad_(x.is_floating_point())

        leaves = [given(x) for x in (logits, hidden, weight, grids[0])]
        chosen = given(targets)
        grid = [given(x).detach() for x in grids[1:]]
        losses = [
            ctrl_kernels.token_logprobs(leaves[0], chosen, backend=backend).sum(),
            ctrl_kernels.linear_token_logprobs(leaves[1], leaves[2], chosen, backend=backend).sum(),
            ctrl_kernels.policy_loss(leaves[3], *grid, backend=backend)[0],
        ]
        advantages = ctrl_kernels.gae(grid[0], grid[1], grid[2], gamma=0.9, lam=0.8, backend=backend)
        return [*losses, *advantages, *torch.autograd.grad(sum(losses), leaves)]

    for strided, dense in zip(outputs(False), outputs(True), strict=True):
        assert torch.allclose(strided, dense, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("linear", [False, True])
def test_logits_beyond_measure(linear: bool, backend: Any) -> None:
    """Logits as large as fp32 holds are numbers; infinity and NaN make their own row NaN and no other."""
    for value, logprob, entropy in (
        (3e38, 0.0, 0.0),
        (-1e30, -1e30, math.log(4)),
        (-math.inf, -math.inf, math.log(4)),
        (math.inf, math.nan, math.nan),
        (math.nan, math.nan, math.nan),
    ):
        logits = zeros(2, 5)
        logits[0, 2] = value
        targets = torch.tensor([2, 2], device=DEVICE)
        if linear:
            # One hidden unit a token and a weight of 1: the bias of a product by 0 would turn infinity into NaN.
            found = [
                ctrl_kernels.linear_token_logprobs(
                    torch.ones(1, 1, device=DEVICE), row[:, None], targets[:1], return_entropy=True, backend=backend
                )
                for row in logits
            ]
            outputs = [torch.cat(x) for x in zip(*found, strict=True)]
        else:
            outputs = list(ctrl_kernels.token_logprobs(logits, targets, return_entropy=True, backend=backend))
        assert outputs[0].tolist() == pytest.approx([logprob, -math.log(5)], nan_ok=True)
        assert outputs[1].tolist() == pytest.approx([entropy, math.log(5)], nan_ok=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rewards_that_are_no_numbers_stay_in_their_group(backend: Any) -> None:
    half = math.sqrt(0.5)
    rewards = torch.tensor([1.0, 2.0, math.nan, 4.0, 5.0, 6.0, math.inf, 0.0, math.nan], device=DEVICE)
    groups = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4], device=DEVICE)
    found = ctrl_kernels.group_advantages(rewards, groups, backend=backend).tolist()
    expected = [-half, half, math.nan, math.nan, -half, half, math.nan, math.nan, 0.0]
    assert found == pytest.approx(expected, abs=2e-6, nan_ok=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rewards_of_other_types(backend: Any) -> None:
    groups, half = torch.tensor([7, 7, -3, -3], device=DEVICE), math.sqrt(0.5)
    for rewards in (torch.tensor([1, 2, 3, 4]), torch.tensor([False, True, False, True])):
        found = ctrl_kernels.group_advantages(rewards.to(DEVICE), groups, backend=backend)
        assert found.dtype == torch.float32
        assert found.tolist() == pytest.approx([-half, half, -half, half], abs=2e-6)


def _vmap(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return torch.vmap(function)(x[None])


def _func_grad(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return torch.func.grad(lambda y: function(y).sum())(x)


@pytest.mark.parametrize("transform", [_vmap, _func_grad])
def test_transforms_are_refused(transform: Callable[..., torch.Tensor]) -> None:
    targets, grid = zeros(4, dtype=torch.int64), zeros(4, 4)
    functions = [
        lambda x: ctrl_kernels.token_logprobs(x, targets, backend="triton"),
        lambda x: ctrl_kernels.token_logprobs(x, targets, backend="torch"),
        lambda x: ctrl_kernels.linear_token_logprobs(x, grid, targets, backend="torch"),
        lambda x: ctrl_kernels.policy_loss(x, grid, grid, grid, backend="triton")[0],
        lambda x: ctrl_kernels.value_loss(x, grid, grid, grid, backend="triton")[0],
        lambda x: ctrl_kernels.gae(x, grid, grid, gamma=1.0, lam=1.0, backend="triton")[0],
        lambda x: ctrl_kernels.group_advantages(x[0], targets, backend="triton"),
    ]
    for function in functions:
        with pytest.raises(RuntimeError, match=r"torch\.vmap and torch\.func are not supported"):
            transform(function, normal(4, 4))


OBJECTIVES: list[dict[str, Any]] = [
    *({"objective": name} for name in ctrl_kernels.OBJECTIVES),
    *({"ratio": name} for name in ctrl_kernels.RATIOS[1:]),
    *({"kl_coef": 0.1, "kl_estimator": name} for name in ctrl_kernels.KL_ESTIMATORS),
    {"kl_coef": 0.1, "kl_correction": True},
]


def impossible(old: float, options: dict[str, Any], backend: Any, *, new: float = -math.inf) -> list[torch.Tensor]:
    """Loss and gradient of two sequences, of which a token of the first has these log-probs."""
    logprobs, constant = normal(2, 4) - 3, normal(2, 4, seed=1) - 3
    advantages = normal(2, 4, seed=2)
    logprobs[0, 1], constant[0, 1] = new, old
    leaf = logprobs.requires_grad_()
    loss, metrics = ctrl_kernels.policy_loss(
        leaf, constant, advantages, zeros(2, 4) + 1, ref_logprobs=constant, drift_weights=zeros(2, 4) + 0.1,
        backend=backend, **options,
    )  # fmt: skip
    return [loss.detach(), torch.autograd.grad(loss, leaf)[0], metrics["ratio"], metrics["kl"]]


@pytest.mark.parametrize("old", [-math.inf, -2.0])
@pytest.mark.parametrize("options", OBJECTIVES)
def test_a_token_of_probability_zero_has_no_gradient(options: dict[str, Any], old: float) -> None:
    """Its log-ratio is -20 whatever the old log-prob is, so its ratio exp(-20); all numbers are finite."""
    found, expected = (impossible(old, options, backend) for backend in BACKENDS)
    for a, b in zip(found, expected, strict=True):
        assert a.isfinite().all() and torch.allclose(a, b, rtol=1e-5, atol=1e-7)
    assert found[1][0, 1] == 0 and (found[1][1] != 0).any()
    if options == {"objective": "clip"}:  # -A exp(-20), or -A (1 - clip_low) where A < 0; and 0.1 |L| of the drift
        others = impossible(-2.0, options, "triton", new=-2.0)
        a = normal(2, 4, seed=2)[0, 1].item()
        change = -a * (math.exp(-20) if a > 0 else 0.8) + 0.1 * 20 + a
        assert (found[0] - others[0]).item() == pytest.approx(change / 8, rel=1e-4)


@pytest.mark.parametrize("options", OBJECTIVES)
def test_log_probs_that_are_no_numbers_are_loud(options: dict[str, Any]) -> None:
    """NaN, old or new, makes the loss NaN, and the gradient of its token, or of its sequence where that shares one."""
    for new, old in ((math.nan, -2.0), (-2.0, math.nan)):
        found, expected = (impossible(old, options, backend, new=new) for backend in BACKENDS)
        for a, b in zip(found, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-7, equal_nan=True)
        assert found[0].isnan() and found[1][0, 1].isnan() and found[1][1].isfinite().all()
