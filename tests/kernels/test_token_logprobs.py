"""``token_logprobs`` against float64, on the shapes, values, targets and gradients that break such kernels."""

import math

import ctrl_kernels
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracle import dense_logprobs, relative_error

NAN = float("nan")


def both(logits: torch.Tensor, targets: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of the Triton backend."""
    return ctrl_kernels.token_logprobs(logits, targets, return_entropy=True, backend="triton", **options)


def gradient(outputs: tuple[torch.Tensor, ...], logits: torch.Tensor, *upstream: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(outputs, logits, [g.to(o) for g, o in zip(upstream, outputs, strict=True)])[0]


def problem(tokens: int, columns: int, device: torch.device, dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    """Logits that require a gradient, targets with one ignored, and upstream gradients."""
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(tokens, columns, generator=generator)).to(device, dtype).requires_grad_()
    targets = torch.randint(0, columns, (tokens,), generator=generator)
    targets[tokens // 2] = -100
    upstream = torch.randn(2, tokens, generator=generator)
    return [logits, targets.to(device), *upstream.to(device)]


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    ("tokens", "columns", "options"),
    [
        (3, 1, {}),
        (7, 11, {"vocab_size": 9, "temperature": 0.7}),
        (19, 640, {"temperature": 1.3}),
        (2, 2049, {"vocab_size": 2000, "softcap": 5.0}),
        (2, 20011, {"softcap": 30.0, "temperature": 0.5}),
    ],
)
def test_float32_values_and_gradients(
    tokens: int, columns: int, options: dict, backend: str, device: torch.device
) -> None:
    logits, targets, *upstream = problem(tokens, columns, device, torch.float32)
    targets = torch.where(targets >= options.get("vocab_size", columns), 0, targets)
    exact_logits = logits.detach().double().requires_grad_()
    outputs = ctrl_kernels.token_logprobs(logits, targets, return_entropy=True, backend=backend, **options)
    exact = dense_logprobs(exact_logits, targets, **options)
    limit = 5e-6 * (1 + logits.abs().max().item()) / options.get("temperature", 1.0)
    assert all(o.dtype == torch.float32 for o in outputs)
    assert (outputs[0] - exact[0]).abs().max() <= limit
    assert (outputs[1] - exact[1]).abs().max() <= limit
    found, expected = gradient(outputs, logits, *upstream), gradient(exact, exact_logits, *upstream)
    assert found.dtype == torch.float32
    # Rounding a score z to fp32 changes its probability by up to 6e-8 |z|, relatively.
    assert relative_error(found, expected) <= limit / 25 or expected.norm() == 0 == found.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_eager(dtype: torch.dtype, device: torch.device) -> None:
    logits, targets, *upstream = problem(12, 700, device, dtype)
    exact_logits = logits.detach().double().requires_grad_()
    eager_logits = logits.detach().requires_grad_()
    outputs = both(logits, targets)
    exact = dense_logprobs(exact_logits, targets)
    eager = dense_logprobs(eager_logits, targets)
    expected = gradient(exact, exact_logits, *upstream)
    assert (outputs[0] - exact[0]).abs().max() <= 5e-6 * (1 + logits.abs().max().item())
    found = gradient(outputs, logits, *upstream)
    assert found.dtype == dtype
    assert relative_error(found, expected) <= relative_error(gradient(eager, eager_logits, *upstream), expected)


@pytest.mark.parametrize("present", [(True, False), (False, True)])
def test_one_upstream_gradient_alone(present: tuple[bool, bool], device: torch.device) -> None:
    logits, targets, *upstream = problem(4, 50, device, torch.float32)
    exact_logits = logits.detach().double().requires_grad_()
    pick = [o for o, p in zip(both(logits, targets), present, strict=True) if p]
    exact = [o for o, p in zip(dense_logprobs(exact_logits, targets), present, strict=True) if p]
    grads = [g for g, p in zip(upstream, present, strict=True) if p]
    assert relative_error(gradient(pick, logits, *grads), gradient(exact, exact_logits, *grads)) < 1e-6


def test_expanded_upstream_gradient_and_retained_graph(device: torch.device) -> None:
    logits, targets, *_ = problem(5, 33, device, torch.float32)
    loss = ctrl_kernels.token_logprobs(logits, targets, backend="triton").sum()  # its gradient has stride 0
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    exact_logits = logits.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(dense_logprobs(exact_logits, targets)[0].sum(), exact_logits)
    assert torch.equal(first, second)
    assert relative_error(first, expected) < 1e-6


def test_logits_changed_in_place_are_refused(device: torch.device) -> None:
    logits, targets, *_ = problem(3, 20, device, torch.float32)
    leaf = logits.detach().clone().requires_grad_()
    changed = leaf * 1
    loss = ctrl_kernels.token_logprobs(changed, targets, backend="triton").sum()
    changed.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("offset", [-500.0, 500.0, -120.0])
def test_a_common_offset_changes_nothing(offset: float, device: torch.device) -> None:
    logits, targets, *_ = problem(3, 100, device, torch.float32)
    shifted = (logits.detach() + offset).requires_grad_()
    exact = dense_logprobs(shifted.detach().double(), targets)
    outputs = both(shifted, targets)
    assert torch.allclose(outputs[0].double(), exact[0], atol=5e-6 * 500, rtol=0)
    assert torch.allclose(outputs[1].double(), exact[1], atol=2e-6, rtol=1e-6)


def test_low_temperature(device: torch.device) -> None:
    logits, targets, *upstream = problem(4, 300, device, torch.float32)
    exact_logits = logits.detach().double().requires_grad_()
    outputs, exact = both(logits, targets, temperature=0.05), dense_logprobs(exact_logits, targets, temperature=0.05)
    assert (outputs[0] - exact[0]).abs().max() <= 5e-6 * (1 + 20 * logits.abs().max().item())
    assert relative_error(gradient(outputs, logits, *upstream), gradient(exact, exact_logits, *upstream)) < 1e-5


def test_minus_infinity(device: torch.device) -> None:
    logits, targets, *upstream = problem(4, 40, device, torch.float32)
    with torch.no_grad():
        logits[0, 5:] = -math.inf  # most of a row
        logits[1] = -math.inf  # a whole row
        logits[3] = -math.inf
        logits[3, 7] = 2.0  # a one-hot row
    targets = torch.tensor([3, 6, 8, 7], device=device)
    logprobs, entropy = both(logits, targets)
    exact_logits = logits.detach()[[0, 2, 3]].double().requires_grad_()
    exact = dense_logprobs(exact_logits, targets[[0, 2, 3]])
    assert torch.allclose(logprobs[[0, 2, 3]].double(), exact[0], atol=1e-6)
    assert torch.allclose(entropy[[0, 2, 3]].double(), exact[1], atol=1e-6)
    assert logprobs[1] == -math.inf
    assert entropy[1] == 0 and entropy[3] == 0 and logprobs[3] == 0
    found = gradient((logprobs, entropy), logits, *upstream)
    finite = [g[[0, 2, 3]] for g in upstream]
    assert relative_error(found[[0, 2, 3]], gradient(exact, exact_logits, *finite)) < 1e-6
    assert torch.equal(found[1], torch.zeros(40, device=device))


def test_nan_and_infinity_are_loud(device: torch.device) -> None:
    logits = torch.zeros(3, 10, device=device)
    logits[0, 4], logits[1, 4] = NAN, math.inf
    logprobs, _ = both(logits, torch.tensor([1, 1, 1], device=device))
    assert logprobs[:2].isnan().all()
    assert abs(logprobs[2].item() + math.log(10)) < 1e-6


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_targets(backend: str, device: torch.device) -> None:
    logits, _, *upstream = problem(6, 12, device, torch.float32)
    padded = torch.tensor([99, 0, -100, 9, 10, 11, -1], device=device)
    exact = dense_logprobs(logits.detach().double(), torch.tensor([0, -100, 9, 0, 0, 0], device=device), vocab_size=10)
    for targets in (padded[1:], padded.int()[1:]):  # neither starts at a multiple of 16 bytes
        logprobs, entropy = ctrl_kernels.token_logprobs(
            logits, targets, vocab_size=10, return_entropy=True, backend=backend
        )
        assert torch.allclose(logprobs[[0, 2]].double(), exact[0][[0, 2]], atol=1e-6)
        assert logprobs[1] == 0 == entropy[1]
        assert logprobs[3:].isnan().all()  # padding, past the end and negative
        found = gradient((logprobs, entropy), logits, *upstream)
        assert found[3:, :10].isnan().all()
        assert torch.equal(found[1], torch.zeros(12, device=device))
        assert torch.equal(found[:3, 10:], torch.zeros(3, 2, device=device))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_nan_at_ignored_tokens_goes_nowhere(backend: str, device: torch.device) -> None:
    logits, targets, *upstream = problem(4, 30, device, torch.float32)
    with torch.no_grad():
        logits[2] = NAN
    upstream[0][2] = upstream[1][2] = NAN
    outputs = ctrl_kernels.token_logprobs(logits, targets, return_entropy=True, backend=backend)
    assert outputs[0][2] == 0 == outputs[1][2]
    found = gradient(outputs, logits, *upstream)
    assert torch.equal(found[2], torch.zeros(30, device=device))
    assert found.isfinite().all()


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_no_tokens_and_no_kept_tokens(backend: str, device: torch.device) -> None:
    logits = torch.randn(0, 10, device=device, requires_grad=True)
    outputs = ctrl_kernels.token_logprobs(
        logits, torch.zeros(0, dtype=torch.int64, device=device), return_entropy=True, backend=backend
    )
    assert outputs[0].shape == outputs[1].shape == (0,)
    (outputs[0].sum() + outputs[1].sum()).backward()
    assert logits.grad is not None and logits.grad.shape == (0, 10)
    logits = torch.randn(2, 10, device=device, requires_grad=True)
    ignored = torch.full((2,), -100, device=device)
    ctrl_kernels.token_logprobs(logits, ignored, backend=backend).sum().backward()
    assert torch.equal(logits.grad, torch.zeros(2, 10, device=device))


def test_views(device: torch.device) -> None:
    wide = torch.randn(4, 200, device=device)
    targets = torch.tensor([0, 30, 64, 99], device=device)
    for view in (wide[:, 3:103], wide[:, ::2], wide.view(200, 4).T[:, :100]):
        leaf = view.detach().requires_grad_()
        exact_leaf = view.detach().double().requires_grad_()
        found = both(leaf, targets)
        exact = dense_logprobs(exact_leaf, targets)
        assert torch.allclose(found[0].double(), exact[0], atol=2e-6)
        ones = torch.ones(4, device=device)
        assert relative_error(gradient(found, leaf, ones, ones), gradient(exact, exact_leaf, ones, ones)) < 1e-6


def test_offsets_beyond_32_bits() -> None:
    columns = 640
    memory = torch.from_numpy(np.empty(2**31 + 2 * columns, dtype=np.float16))  # reserved, hardly any of it touched
    logits = memory.as_strided((2, columns), (2**31 + columns, 1))
    values = torch.randn(2, columns).half()
    logits.copy_(values)
    targets = torch.tensor([3, 600])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        logits = memory.to(device).as_strided((2, columns), (2**31 + columns, 1))
    logits = logits.detach().requires_grad_()
    outputs = both(logits, targets.to(device))
    exact_values = values.double().requires_grad_()
    exact = dense_logprobs(exact_values, targets)
    assert torch.allclose(outputs[0].double().cpu(), exact[0], atol=1e-5)
    ones = torch.ones(2)
    found = gradient(outputs, logits, ones, ones)
    assert relative_error(found, gradient(exact, exact_values, ones, ones)) < 1e-3


def test_same_bits_twice(device: torch.device) -> None:
    logits, targets, *upstream = problem(9, 700, device, torch.bfloat16)
    first, second = both(logits, targets), both(logits, targets)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(gradient(first, logits, *upstream), gradient(second, logits, *upstream))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 6),
    columns=st.integers(1, 70),
    padding=st.integers(0, 20),
    temperature=st.floats(0.1, 4.0),
    spread=st.floats(0.0, 60.0),
    seed=st.integers(0, 2**20),
)
def test_any_shape(tokens: int, columns: int, padding: int, temperature: float, spread: float, seed: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(tokens, columns + padding, generator=generator)).to(device)
    logits[:, columns:] = NAN
    targets = torch.randint(0, columns, (tokens,), generator=generator).to(device)
    logprobs, entropy = both(logits, targets, temperature=temperature, vocab_size=columns)
    exact = dense_logprobs(logits.double(), targets, temperature=temperature, vocab_size=columns)
    limit = 5e-6 * (1 + logits[:, :columns].abs().max().item() / temperature)
    assert (logprobs - exact[0]).abs().max() <= limit
    assert (entropy - exact[1]).abs().max() <= limit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": 1e-9}, "temperature"),
        ({"temperature": NAN}, "temperature"),
        ({"vocab_start": -1}, "vocab_start"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"softcap": -3.0}, "softcap"),
        ({"backend": "cuda"}, "auto, triton, torch"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, r"shape \(2,\)"),
        ({"targets": torch.zeros(2)}, "int32 or int64"),
        ({"logits": torch.zeros(2)}, r"\(N, V\)"),
        ({"logits": torch.zeros(2, 5).double(), "backend": "triton"}, "float64"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    inputs = {"logits": torch.zeros(2, 5), "targets": torch.zeros(2, dtype=torch.int64)} | arguments
    if torch.cuda.is_available():
        inputs |= {name: inputs[name].cuda() for name in ("logits", "targets")}
    with pytest.raises(ValueError, match=message):
        ctrl_kernels.token_logprobs(inputs.pop("logits"), inputs.pop("targets"), **inputs)


def test_gradcheck_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([1, -100, 4])
    options = {"temperature": 0.7, "vocab_size": 6, "softcap": 3.0, "return_entropy": True}
    assert torch.autograd.gradcheck(lambda x: ctrl_kernels.token_logprobs(x, targets, **options), (logits,))
