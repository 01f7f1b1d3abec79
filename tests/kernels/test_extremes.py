"""Magnitudes and addresses at the edge: logits near +-500, low temperatures, offsets past 2^31; the same bits twice."""

import math
from typing import Any

import ctrl_kernels
import numpy as np
import pytest
import torch
from ctrl_kernels.options import Shard, SoftmaxOptions
from ctrl_kernels.softmax_gradient import logits_gradient, weights_gradient
from ctrl_kernels.softmax_statistics import combine_segments, segment_columns, segment_count, softmax_statistics
from kernel_oracle import dense_logprobs, relative_error
from triton.runtime.interpreter import GridExecutor

BACKENDS = ["triton", "torch"]
FAR = 2**31


def options(columns: int, **changes: Any) -> Shard:
    return SoftmaxOptions(**changes).shard(columns)


def linear_problem(
    device: torch.device, scale: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Hidden states and weights whose logits are ``scale`` normal ones around ``offset``."""
    generator = torch.Generator().manual_seed(11)
    hidden = torch.randn(9, 8, generator=generator)
    weight = scale * torch.randn(50, 8, generator=generator) / math.sqrt(8)
    hidden[:, 0], weight[:, 0] = 1.0, offset
    targets = torch.randint(0, 50, (9,), generator=generator)
    upstream = torch.randn(2, 9, generator=generator)
    return hidden.to(device), weight.to(device), targets.to(device), list(upstream.to(device))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("save_logits", [False, True])
@pytest.mark.parametrize(
    ("scale", "offset", "temperature"), [(3.0, 500.0, 1.0), (3.0, -500.0, 1.0), (170.0, 0.0, 1.0), (3.0, 0.0, 0.05)]
)
def test_large_logits(
    scale: float, offset: float, temperature: float, save_logits: bool, backend: str, device: torch.device
) -> None:
    hidden, weight, targets, upstream = linear_problem(device, scale, offset)
    exact_leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    logits = exact_leaves[0] @ exact_leaves[1].T
    expected = dense_logprobs(logits, targets, temperature=temperature)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    outputs = ctrl_kernels.linear_token_logprobs(
        *leaves, targets, temperature=temperature, return_entropy=True, save_logits=save_logits, backend=backend
    )
    limit = 5e-6 * (1 + logits.abs().max().item() / temperature)
    assert (outputs[0] - expected[0]).abs().max() <= limit
    assert (outputs[1] - expected[1]).abs().max() <= limit
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    exact_gradients = torch.autograd.grad(expected, exact_leaves, [g.double() for g in upstream])
    for gradient, exact in zip(gradients, exact_gradients, strict=True):
        assert relative_error(gradient, exact) <= limit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_of_logits_costs_no_precision(offset: float, backend: str, device: torch.device) -> None:
    """Numbers near 1e4 are a thousandth apart in single precision; their log-probs are as exact as those near 0."""
    logits = 3 * torch.randn(6, 300, generator=torch.Generator().manual_seed(1)) + offset
    targets = torch.tensor([0, 7, 299, 12, 150, 3])
    expected = dense_logprobs(logits.double(), targets)
    outputs = ctrl_kernels.token_logprobs(logits.to(device), targets.to(device), return_entropy=True, backend=backend)
    for a, b in zip(outputs, expected, strict=True):
        assert (a.cpu() - b).abs().max() < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_confident_predictions_keep_their_gradient(backend: str, device: torch.device) -> None:
    """1 - p of a target with p near 1 must not be lost to the rounding of p."""
    logits = torch.zeros(1, 64, device=device)
    logits[0, 5] = 12.0  # 1 - p = 63 exp(-12) = 3.9e-4, below half of bf16's precision at 1
    for dtype in (torch.bfloat16, torch.float32):
        leaf = logits.to(dtype).requires_grad_()
        target = torch.tensor([5], device=device)
        ctrl_kernels.token_logprobs(leaf, target, backend=backend).sum().backward()
        exact = -math.expm1(-math.log1p(63 * math.exp(-12)))
        assert leaf.grad[0, 5].item() == pytest.approx(exact, rel=5e-3)


def test_confident_predictions_of_saved_weights(device: torch.device) -> None:
    hidden = torch.eye(2, device=device).bfloat16()
    weight = torch.zeros(64, 2, device=device).bfloat16()
    weight[5] = 12.0
    targets = torch.tensor([5, 5], device=device)
    exact = -math.expm1(-math.log1p(63 * math.exp(-12)))
    for save_logits in (False, True):
        leaf = weight.clone().requires_grad_()
        logprobs = ctrl_kernels.linear_token_logprobs(hidden, leaf, targets, save_logits=save_logits, backend="triton")
        logprobs.sum().backward()
        assert leaf.grad[5].tolist() == pytest.approx([exact, exact], rel=5e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", ["linear_token_logprobs", "linear_policy_loss"])
def test_targets_of_linear_functions(function: str, backend: str, device: torch.device) -> None:
    hidden, weight, _, _ = linear_problem(device, 3.0, 0.0)
    wide = torch.tensor([7, 3, -100, 11, 0, 49, 8, 9, 10, 2], device=device)[1:]  # starts at 8 bytes past a multiple
    zeros = torch.zeros(9, device=device)

    def run(targets: torch.Tensor) -> torch.Tensor:
        if function == "linear_token_logprobs":
            return ctrl_kernels.linear_token_logprobs(hidden, weight, targets, backend=backend)
        constants = {"old_logprobs": zeros - 3, "advantages": zeros + 1, "mask": zeros + 1}
        return ctrl_kernels.linear_policy_loss(hidden, weight, targets, **constants, backend=backend)[0]

    aligned = run(wide.clone())
    assert aligned.isfinite().all()
    assert torch.equal(run(wide), aligned) and torch.equal(run(wide.int()), aligned)
    for wrong in (50, -1, 10**9):
        targets = wide.clone()
        targets[4] = wrong
        assert run(targets).isnan().any()


def far_apart(rows: int, columns: int, dtype: type) -> torch.Tensor:
    """Rows more than 2^31 elements apart, in memory of which hardly any is touched."""
    memory = torch.from_numpy(np.empty((FAR + 16) * (rows - 1) + columns, dtype=dtype))
    return memory.as_strided((rows, columns), (FAR + 16, 1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="reserves memory that a GPU would have to hold")
def test_offsets_beyond_32_bits_into_every_matrix() -> None:
    columns, tokens = 640, 2
    generator = torch.Generator().manual_seed(2)
    logits, upstream = torch.randn(tokens, columns, generator=generator), torch.randn(2, tokens, generator=generator)
    targets, limits = torch.tensor([3, 600]), options(columns, temperature=0.8)
    segment = segment_columns(columns, 1)
    results = []
    for far in (False, True):
        weights = far_apart(tokens, columns, np.float16) if far else torch.empty(tokens, columns, dtype=torch.float16)
        given, gradient = (
            far_apart(tokens, columns, np.float16) if far else torch.empty_like(weights) for _ in range(2)
        )
        given.copy_(logits)
        tiles = segment_count(1)
        tile_max = far_apart(tokens, tiles, np.float32) if far else torch.empty(tokens, tiles)
        statistics = torch.empty(segment_count(1), tokens, 4)
        softmax_statistics(
            given, targets, statistics, limits, segment=segment, weights_NV=weights, tile_max_NK=tile_max
        )
        logprob, entropy, lse = combine_segments(statistics, targets, limits)
        d_logprob, d_entropy = upstream
        logits_gradient(given, gradient, targets, lse, entropy, d_logprob, d_entropy, limits)
        results += [logprob, entropy, gradient.clone(), weights.clone()]
        weights_gradient(
            weights, weights, tile_max, targets, logprob, lse, entropy, d_logprob, d_entropy, limits, segment=segment
        )
        results.append(weights.clone())
    near, distant = results[:5], results[5:]
    assert all(torch.equal(a, b) for a, b in zip(near, distant, strict=True))
    exact_logits = logits.half().double().requires_grad_()
    exact = dense_logprobs(exact_logits, targets, temperature=0.8)
    (expected,) = torch.autograd.grad(exact, exact_logits, [g.double() for g in upstream])
    assert relative_error(near[0], exact[0]) < 1e-6
    assert relative_error(near[2], expected) < 1e-3 and relative_error(near[4], expected) < 1e-3


def every_kernel(device: torch.device) -> list[torch.Tensor]:
    """Results of every function with gradients, in the Triton backend."""
    hidden, weight, targets, upstream = linear_problem(device, 3.0, 0.0)
    generator = torch.Generator(device).manual_seed(4)
    rewards, groups = torch.randn(40, device=device, generator=generator), torch.arange(40, device=device) % 7
    grid = torch.randn(3, 4, 1300, device=device, generator=generator)
    leaves = [x.bfloat16().requires_grad_() for x in (hidden, weight)]
    found: list[torch.Tensor] = []
    for save_logits in (False, True):
        outputs = ctrl_kernels.linear_token_logprobs(
            *leaves, targets, return_entropy=True, save_logits=save_logits, backend="triton"
        )
        found += [*outputs, *torch.autograd.grad(outputs, leaves, upstream)]
    constants = {"old_logprobs": upstream[0] - 3, "advantages": upstream[1], "mask": upstream[0] > -1}
    loss, metrics = ctrl_kernels.linear_policy_loss(*leaves, targets, **constants, backend="triton")
    found += [loss, *metrics.values(), *torch.autograd.grad(2 * loss, leaves)]
    logits = (hidden @ weight.T).requires_grad_()
    outputs = ctrl_kernels.token_logprobs(logits, targets, return_entropy=True, backend="triton")
    found += [*outputs, *torch.autograd.grad(outputs, logits, upstream)]
    found.append(ctrl_kernels.group_advantages(rewards, groups, backend="triton"))
    found += ctrl_kernels.gae(grid[0], grid[1], grid[2] > 0, gamma=0.99, lam=0.95, backend="triton")
    leaf = grid[0].clone().requires_grad_()
    loss, metrics = ctrl_kernels.policy_loss(leaf, grid[1], grid[2], grid[1] > -1, backend="triton")
    return [x.detach() for x in (*found, loss, *metrics.values(), *torch.autograd.grad(loss, leaf))]


def test_same_bits_twice(device: torch.device) -> None:
    assert all(torch.equal(a, b) for a, b in zip(every_kernel(device), every_kernel(device), strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="watches the interpreter")
def test_launches_use_the_long_axis_of_the_grid_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Axes y and z of a CUDA grid end at 65535 programs."""
    launch, grids = GridExecutor.__call__, []

    def watched(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        grids.append(self.grid)
        launch(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", watched)
    every_kernel(torch.device("cpu"))
    assert len(grids) > 20
    assert all(len(grid) == 1 for grid in grids)
