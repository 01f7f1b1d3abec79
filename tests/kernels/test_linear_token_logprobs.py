"""``linear_token_logprobs`` against float64: chunks, segments, masks, saved logits, frozen inputs and accumulators."""

import math
from typing import Any

import ctrl_kernels
import pytest
import torch
from ctrl_kernels import reference
from ctrl_kernels.options import SoftmaxOptions
from ctrl_kernels.projection import Projection
from kernel_oracle import dense_logprobs, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

NAN = float("nan")


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest floating-point tensor has that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.elements = max(self.elements, tensor.numel())
        return out


def sevens(tokens: int) -> list[slice]:
    return [slice(i, min(i + 7, tokens)) for i in range(0, tokens, 7)]


@pytest.mark.parametrize("save_logits", [False, True])
@pytest.mark.parametrize(("workspace", "together"), [(200_000, 8), (100_000, 4), (60_000, 2), (40_000, 1), (20_000, 1)])
def test_segments_go_together_as_far_as_the_workspace_holds_them(
    workspace: int, together: int, save_logits: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """200 tokens are two tiles of 128, and n segments of 16 columns take 4 (16 n + 6) bytes a token: 256 times that
    must fit 3/4 of the workspace, 137216 bytes for n = 8, 71680 for 4, 38912 for 2, 22528 for 1, or else in two chunks.
    """
    monkeypatch.setattr(Projection, "_workspace_bytes", workspace)
    hidden, weight, targets, upstream = problem(200, 8 * 16, 6, device)
    targets[::5] = 1
    projection = Projection(weight=weight, options=SoftmaxOptions().shard(len(weight)), workspace_mb=1)
    assert projection.together(len(hidden)) == together
    assert [s.start for _, s in projection.segments(together)] == list(range(0, 128, together * 16))
    expected = exact(hidden, weight, targets, upstream)
    outputs = ctrl_kernels.linear_token_logprobs(
        hidden, weight, targets, return_entropy=True, save_logits=save_logits, workspace_mb=1, backend="triton"
    )
    found = torch.autograd.grad(outputs, (hidden, weight), list(upstream))
    for a, b in zip((*outputs, *found), expected, strict=True):
        assert relative_error(a, b) < 3e-6


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_packed_rows_are_taken_as_they_come(backend: Any, device: torch.device) -> None:
    """Fifty sequences behind one prefix, of which one is long: its row of 400 positions is no dimension of anything."""
    lengths = [400] + [1] * 49
    packed, sequences, steps = sum(lengths), len(lengths), max(lengths)
    hidden, weight, targets, upstream = problem(packed, 16, 4, device)
    constants = {"old_logprobs": upstream[0] - 3, "advantages": upstream[1], "mask": targets != -100}
    with LargestTensor() as watched:
        outputs = ctrl_kernels.linear_token_logprobs(
            hidden, weight, targets, return_entropy=True, workspace_mb=1, backend=backend
        )
        found = torch.autograd.grad(outputs, (hidden, weight), list(upstream))
        loss, _ = ctrl_kernels.linear_policy_loss(hidden, weight, targets, **constants, backend=backend)
        torch.autograd.grad(loss, (hidden, weight))
    assert 16 * constants["mask"].sum() <= watched.elements < sequences * steps
    for rows in (slice(0, 400), slice(400, 401), slice(448, 449)):
        alone = ctrl_kernels.linear_token_logprobs(hidden[rows], weight, targets[rows], backend="torch")
        assert torch.allclose(outputs[0][rows], alone, rtol=1e-5, atol=1e-6)
    for a, b in zip(found, exact(hidden, weight, targets, upstream)[2:], strict=True):
        assert relative_error(a, b) < 3e-6


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven tokens a chunk, whatever the workspace."""
    monkeypatch.setattr(Projection, "chunks", lambda self, n, *_, **__: sevens(n))
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 7 * 40)
    monkeypatch.setattr(reference, "PRODUCT_ROWS", 1)


def problem(
    tokens: int, columns: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weight, targets below 3/4 of the columns with every fifth ignored, and two upstream gradients."""
    generator = torch.Generator().manual_seed(tokens + columns)
    hidden = torch.randn(tokens, width, generator=generator).to(device, dtype).requires_grad_()
    weight = (
        (4 / math.sqrt(width) * torch.randn(columns, width, generator=generator)).to(device, dtype).requires_grad_()
    )
    targets = torch.randint(0, max(1, 3 * columns // 4), (tokens,), generator=generator)
    targets[::5] = -100
    return hidden, weight, targets.to(device), torch.randn(2, tokens, generator=generator).to(device)


def exact(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor, **options: Any
) -> list:
    """Outputs and gradients in float64."""
    hidden, weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    outputs = dense_logprobs(hidden @ weight.T, targets, **options)
    return [*outputs, *torch.autograd.grad(outputs, (hidden, weight), [g.double() for g in upstream])]


def found(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, upstream: torch.Tensor, **options: Any
) -> list:
    """Outputs and gradients of the package."""
    outputs = ctrl_kernels.linear_token_logprobs(hidden, weight, targets, return_entropy=True, **options)
    return [*outputs, *torch.autograd.grad(outputs, (hidden, weight), list(upstream))]


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("save_logits", [False, True])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(
    ("tokens", "columns", "width", "options"),
    [
        (1, 1, 3, {}),
        (23, 40, 5, {"vocab_size": 31, "temperature": 0.7}),
        (17, 333, 24, {"softcap": 4.0, "temperature": 1.5}),
    ],
)
def test_float32_values_and_gradients(
    tokens: int, columns: int, width: int, options: dict, backend: str, save_logits: bool, device: torch.device
) -> None:
    inputs = problem(tokens, columns, width, device)
    expected = exact(*inputs, **options)
    outputs = found(*inputs, **options, backend=backend, save_logits=save_logits)
    assert all(
        torch.allclose(a.double(), b, atol=1e-4 * 5e-2, rtol=1e-6)
        for a, b in zip(outputs[:2], expected[:2], strict=True)
    )
    for a, b in zip(outputs[2:], expected[2:], strict=True):
        assert relative_error(a, b) < 2e-6 or a.norm() == 0 == b.norm()


def test_several_tiles_a_segment(device: torch.device) -> None:
    inputs = problem(2, 2 * 8 * 2048 + 77, 4, device)
    inputs[2][0] = 24_000
    expected = exact(*inputs)
    for save_logits in (False, True):
        for a, b in zip(found(*inputs, backend="triton", save_logits=save_logits), expected, strict=True):
            assert relative_error(a, b) < 1e-5  # logits reach 20, of which fp32 keeps 1e-6


@pytest.mark.parametrize("save_logits", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_eager(dtype: torch.dtype, save_logits: bool, device: torch.device) -> None:
    hidden, weight, targets, upstream = problem(30, 700, 32, device, dtype)
    expected = exact(hidden, weight, targets, upstream)
    eager_inputs = [x.detach().requires_grad_() for x in (hidden, weight)]
    eager = dense_logprobs((eager_inputs[0] @ eager_inputs[1].T).float(), targets)
    eager_gradients = torch.autograd.grad(eager, eager_inputs, list(upstream))
    outputs = found(hidden, weight, targets, upstream, backend="triton", save_logits=save_logits)
    assert relative_error(outputs[0], expected[0]) < 1e-6  # the logits are never rounded to half precision
    assert relative_error(outputs[1], expected[1]) < 1e-6
    for a, b, c in zip(outputs[2:], expected[2:], eager_gradients, strict=True):
        assert a.dtype == dtype
        assert relative_error(a, b) <= relative_error(c, b)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("trained", [(True, False), (False, True)])
def test_frozen_inputs(trained: tuple[bool, bool], backend: str, device: torch.device) -> None:
    hidden, weight, targets, upstream = problem(9, 30, 6, device)
    expected = exact(hidden, weight, targets, upstream)[2:]
    leaves = [x.detach().requires_grad_(t) for x, t in zip((hidden, weight), trained, strict=True)]
    outputs = ctrl_kernels.linear_token_logprobs(*leaves, targets, return_entropy=True, backend=backend)
    torch.autograd.backward(outputs, list(upstream))
    for leaf, gradient, t in zip(leaves, expected, trained, strict=True):
        assert (leaf.grad is not None) == t
        assert not t or relative_error(leaf.grad, gradient) < 1e-6


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("save_logits", [False, True])
def test_tokens_without_a_part_are_not_read(save_logits: bool, backend: str, device: torch.device) -> None:
    hidden, weight, targets, upstream = problem(20, 30, 6, device)
    with torch.no_grad():
        hidden[::5] = NAN  # ignored
        weight[25:] = NAN  # padding
    upstream[:, ::5] = NAN
    upstream[:, 1:9] = 0.0  # no gradient asked for
    outputs = found(hidden, weight, targets, upstream, vocab_size=25, backend=backend, save_logits=save_logits)
    kept = targets != -100
    expected = exact(hidden[kept], weight[:25], targets[kept], upstream[:, kept])
    assert relative_error(outputs[0][kept], expected[0]) < 1e-6
    assert relative_error(outputs[2][kept], expected[2]) < 1e-6
    assert relative_error(outputs[3][:25], expected[3]) < 1e-6
    assert torch.equal(outputs[2][~kept], torch.zeros_like(outputs[2][~kept]))
    assert torch.equal(outputs[3][25:], torch.zeros_like(outputs[3][25:]))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_nothing_to_do(backend: str, device: torch.device) -> None:
    hidden, weight, targets, _ = problem(5, 20, 6, device)
    for rows in (slice(0, 0), slice(0, 5)):
        logprobs = ctrl_kernels.linear_token_logprobs(
            hidden[rows], weight, torch.full_like(targets, -100)[rows], backend=backend
        )
        gradients = torch.autograd.grad(logprobs.sum(), (hidden, weight))
        assert all(torch.equal(g, torch.zeros_like(g)) for g in (logprobs, *gradients))
    logprobs = ctrl_kernels.linear_token_logprobs(hidden, weight, targets, backend=backend)
    gradients = torch.autograd.grad((logprobs * 0).sum(), (hidden, weight))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_main_grad_is_added_to(backend: str, device: torch.device) -> None:
    hidden, weight, targets, upstream = problem(20, 30, 6, device)
    expected = exact(hidden, weight, targets, upstream, vocab_size=28)
    main_grad = torch.ones_like(weight)
    outputs = ctrl_kernels.linear_token_logprobs(
        hidden, weight, targets, vocab_size=28, return_entropy=True, main_grad=main_grad, backend=backend
    )
    torch.autograd.backward(outputs, list(upstream))
    assert weight.grad is None
    assert relative_error(main_grad - 1, expected[3]) < 1e-5
    assert relative_error(hidden.grad, expected[2]) < 1e-6


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_retained_graph_and_no_gradient(backend: str, device: torch.device) -> None:
    hidden, weight, targets, upstream = problem(9, 30, 6, device)
    for save_logits in (False, True):
        options = {"return_entropy": True, "backend": backend, "save_logits": save_logits}
        outputs = ctrl_kernels.linear_token_logprobs(hidden, weight, targets, **options)
        first = torch.autograd.grad(outputs, (hidden, weight), list(upstream), retain_graph=True)
        second = torch.autograd.grad(outputs, (hidden, weight), list(upstream))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        with torch.no_grad():
            again = ctrl_kernels.linear_token_logprobs(hidden, weight, targets, **options)
        assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
        assert not again[0].requires_grad


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("save_logits", [False, True])
@pytest.mark.parametrize("ignored", [False, True])
def test_expanded_upstream_gradient(ignored: bool, save_logits: bool, backend: str, device: torch.device) -> None:
    hidden, weight, targets, upstream = problem(9, 30, 6, device)
    targets = targets if ignored else targets.clamp_min(0)
    logprobs = ctrl_kernels.linear_token_logprobs(hidden, weight, targets, save_logits=save_logits, backend=backend)
    gradients = torch.autograd.grad(logprobs.sum(), (hidden, weight))  # the sum's gradient has stride 0
    ones = torch.stack((torch.ones_like(upstream[0]), torch.zeros_like(upstream[0])))
    for gradient, expected in zip(gradients, exact(hidden, weight, targets, ones)[2:], strict=True):
        assert relative_error(gradient, expected) < 1e-6


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_tokens_times_vocabulary_never_exists(backend: str, device: torch.device) -> None:
    inputs = problem(60, 400, 4, device)
    with LargestTensor() as largest:
        found(*inputs, backend=backend)
    assert largest.elements < 60 * 400 / 5


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_transposed_inputs(backend: str, device: torch.device) -> None:
    hidden, weight, targets, upstream = problem(9, 30, 6, device)
    views = [x.detach().T.contiguous().T.requires_grad_() for x in (hidden, weight)]
    for a, b in zip(
        found(*views, targets, upstream, backend=backend), exact(hidden, weight, targets, upstream), strict=True
    ):
        assert relative_error(a, b) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.zeros(5, 4)}, "share D"),
        ({"weight": torch.zeros(5, 3).half()}, "share dtype"),
        ({"targets": torch.zeros(3).long()}, r"shape \(2,\)"),
        ({"main_grad": torch.zeros(4, 3)}, "main_grad"),
        ({"workspace_mb": 0}, "workspace_mb"),
        ({"temperature": 0}, "temperature"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    inputs = {"hidden": torch.zeros(2, 3), "weight": torch.zeros(5, 3), "targets": torch.zeros(2).long()} | arguments
    with pytest.raises(ValueError, match=message):
        ctrl_kernels.linear_token_logprobs(**inputs)


def test_gradcheck_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([1, -100, 4])
    options = {"temperature": 0.7, "vocab_size": 6, "softcap": 3.0, "return_entropy": True}
    assert torch.autograd.gradcheck(
        lambda h, w: ctrl_kernels.linear_token_logprobs(h, w, targets, **options), (hidden, weight)
    )
