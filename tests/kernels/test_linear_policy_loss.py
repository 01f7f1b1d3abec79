"""``linear_policy_loss`` against the losses of dense float64 log-probs: both backends, chunks, masks, accumulators."""

import math
from typing import Any

import ctrl_kernels
import pytest
import torch
from ctrl_kernels import reference
from ctrl_kernels.projection import Projection
from kernel_oracle import dense_logprobs, relative_error

NAN = float("nan")
BACKENDS = ["triton", "torch"]
SOFTMAX = ("temperature", "softcap", "vocab_size")


def sevens(tokens: int) -> list[slice]:
    return [slice(i, min(i + 7, tokens)) for i in range(0, tokens, 7)]


@pytest.fixture
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven tokens a chunk, whatever the workspace."""
    monkeypatch.setattr(Projection, "chunks", lambda self, n, *_, **__: sevens(n))
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 7 * 40)
    monkeypatch.setattr(reference, "PRODUCT_ROWS", 1)


def problem(
    shape: tuple[int, ...], columns: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """A batch with masked tokens, ignored targets, advantages of 0 and ratios on both sides of the clipping range."""
    generator = torch.Generator().manual_seed(sum(shape) + columns)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    hidden = normal(*shape, width).to(dtype)
    weight = (3 / math.sqrt(width) * normal(columns, width)).to(dtype)
    targets = torch.randint(0, max(1, 3 * columns // 4), shape, generator=generator)
    logprobs, _ = dense_logprobs(hidden.flatten(0, -2).double() @ weight.double().T, targets.flatten())
    old = (logprobs.view(shape) + 0.4 * normal(*shape)).float()
    inputs = {
        "hidden": hidden,
        "weight": weight,
        "targets": targets.masked_fill(torch.rand(shape, generator=generator) < 0.1, -100),
        "old_logprobs": old,
        "advantages": normal(*shape).masked_fill(torch.rand(shape, generator=generator) < 0.2, 0.0),
        "mask": torch.rand(shape, generator=generator) < 0.8,
        "ref_logprobs": old + 0.3 * normal(*shape),
        "importance_weights": normal(*shape).abs(),
    }
    return {name: x.to(device) for name, x in inputs.items()}


def results(loss: torch.Tensor, metrics: dict, leaves: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Loss, metrics and gradients by name; the upstream gradient is 1."""
    gradients = torch.autograd.grad(loss, leaves)
    return {"loss": loss, **metrics, "d_hidden": gradients[0], "d_weight": gradients[1]}


def found(inputs: dict[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    """What the package gives."""
    leaves = [inputs[name].detach().requires_grad_() for name in ("hidden", "weight")]
    return results(*ctrl_kernels.linear_policy_loss(*leaves, **without_leaves(inputs), **options), leaves)


def without_leaves(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: x for name, x in inputs.items() if name not in ("hidden", "weight")}


def exact(inputs: dict[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    """The definition in float64, from dense logits; masked hidden states count as 0."""
    softmax = {name: options.pop(name) for name in SOFTMAX if name in options}
    shape = inputs["targets"].shape
    kept = (inputs["mask"] != 0) & (inputs["targets"] != -100)
    leaves = [inputs[name].detach().double().requires_grad_() for name in ("hidden", "weight")]
    hidden = torch.where(kept[..., None], leaves[0], 0.0).flatten(0, -2)
    weight = leaves[1][: softmax.get("vocab_size")]
    targets = torch.where(kept, inputs["targets"], -100).flatten()
    grid = shape if len(shape) == 2 else (1, *shape)
    logprobs, entropy = (x.view(grid) for x in dense_logprobs(hidden @ weight.T, targets, **softmax))
    names = ("old_logprobs", "advantages", "ref_logprobs", "importance_weights")
    constants = {name: inputs[name].double().view(grid) for name in names if name in inputs}
    loss, metrics = ctrl_kernels.policy_loss(
        logprobs, mask=kept.view(grid), entropy=entropy, backend="torch", **constants, **options
    )
    return results(loss, metrics, leaves)


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], gradients: float = 3e-6) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if name.startswith("d_"):
            assert relative_error(got[name], value) < gradients or got[name].norm() == 0 == value.norm(), name
        else:
            assert abs(got[name].item() - value.item()) <= 1e-5 * max(1.0, abs(value.item())), name


EVERYTHING = {"dual_clip": 3.0, "kl_coef": 0.1, "entropy_coef": 0.02, "clip_high": 0.28}


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("shape", "columns", "width", "options"),
    [
        ((1,), 1, 3, {}),
        ((23,), 40, 5, {"vocab_size": 31, "temperature": 0.7}),
        ((23,), 40, 5, EVERYTHING),
        ((3, 11), 333, 24, EVERYTHING | {"softcap": 4.0, "temperature": 1.5, "kl_estimator": "k2"}),
        ((3, 11), 40, 8, {"aggregation": "seq-mean-token-mean"}),
        ((3, 11), 40, 8, EVERYTHING | {"aggregation": "seq-mean-token-mean", "kl_estimator": "k1"}),
        ((3, 11), 40, 8, EVERYTHING | {"aggregation": "seq-mean-token-sum", "denominator": 12.0}),
    ],
)
def test_float32_values_and_gradients(
    shape: tuple[int, ...], columns: int, width: int, options: dict, backend: str, device: torch.device
) -> None:
    inputs = problem(shape, columns, width, device)
    inputs["targets"] = torch.where(inputs["targets"] >= options.get("vocab_size", columns), 0, inputs["targets"])
    assert_close(found(inputs, backend=backend, **options), exact(inputs, **options))


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_worse_than_eager(dtype: torch.dtype, device: torch.device) -> None:
    inputs = problem((30,), 700, 32, device, dtype)
    expected = exact(inputs, **EVERYTHING)
    leaves = [inputs[name].detach().requires_grad_() for name in ("hidden", "weight")]
    targets = torch.where(inputs["mask"], inputs["targets"], -100)
    logprobs, entropy = (x[None] for x in dense_logprobs((leaves[0] @ leaves[1].T).float(), targets))
    constants = {name: x[None] for name, x in without_leaves(inputs).items() if name not in ("targets", "mask")}
    loss, metrics = ctrl_kernels.policy_loss(
        logprobs, mask=(targets != -100)[None], entropy=entropy, backend="torch", **constants, **EVERYTHING
    )
    eager = results(loss, metrics, leaves)
    got = found(inputs, backend="triton", **EVERYTHING)
    for name in ("d_hidden", "d_weight"):
        assert got[name].dtype == dtype
        assert relative_error(got[name], expected[name]) <= relative_error(eager[name], expected[name])
    for name in ("loss", "approx_kl", "entropy"):
        assert got[name].item() == pytest.approx(expected[name].item(), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_scaling_in_float16(backend: str, device: torch.device) -> None:
    """Gradients below the smallest fp16 number, until the upstream gradient lifts them."""
    inputs = problem((30,), 300, 16, device, torch.float16)
    expected = exact(inputs, denominator=2e6)
    leaves = [inputs[name].detach().requires_grad_() for name in ("hidden", "weight")]
    loss, _ = ctrl_kernels.linear_policy_loss(*leaves, **without_leaves(inputs), denominator=2e6, backend=backend)
    assert loss.item() == pytest.approx(expected["loss"].item(), rel=1e-4)
    for _ in range(2):
        gradients = torch.autograd.grad(2.0**20 * loss, leaves, retain_graph=True)
        for gradient, name in zip(gradients, ("d_hidden", "d_weight"), strict=True):
            assert gradient.dtype == torch.float16
            assert relative_error(gradient.double() / 2**20, expected[name]) < 2e-3


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_tokens_and_padding_are_not_read(backend: str, device: torch.device) -> None:
    inputs = problem((4, 9), 40, 6, device)
    clean = exact(inputs, vocab_size=31, **EVERYTHING)
    dropped = ~inputs["mask"] | (inputs["targets"] == -100)
    for name in ("hidden", "old_logprobs", "advantages", "ref_logprobs", "importance_weights"):
        inputs[name][dropped] = NAN
    inputs["weight"][31:] = NAN
    got = found(inputs, vocab_size=31, backend=backend, **EVERYTHING)
    assert_close(got, clean)
    assert torch.equal(got["d_hidden"][dropped], torch.zeros_like(got["d_hidden"][dropped]))
    assert torch.equal(got["d_weight"][31:], torch.zeros_like(got["d_weight"][31:]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(backend: str, device: torch.device) -> None:
    inputs = problem((2, 5), 20, 6, device)
    for change in ({"mask": torch.zeros(2, 5, device=device)}, {"targets": torch.full((2, 5), -100, device=device)}):
        got = found(inputs | change, backend=backend, **EVERYTHING)
        assert all(torch.equal(x, torch.zeros_like(x)) for x in got.values())
    no_advantage = inputs | {"advantages": torch.zeros(2, 5, device=device)}
    got = found(no_advantage, backend=backend)
    assert got["entropy"] > 0 and got["d_hidden"].count_nonzero() == 0 == got["d_weight"].count_nonzero()
    empty = {name: x if name == "weight" else x[:, :0] for name, x in inputs.items()}
    got = found(empty, backend=backend)
    assert got["loss"] == 0 and got["d_hidden"].shape == (2, 0, 6) and got["d_weight"].count_nonzero() == 0


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("trained", [(True, False), (False, True), (False, False)])
def test_frozen_inputs(trained: tuple[bool, bool], backend: str, device: torch.device) -> None:
    inputs = problem((23,), 30, 6, device)
    expected = exact(inputs)
    leaves = [inputs[name].detach().requires_grad_(t) for name, t in zip(("hidden", "weight"), trained, strict=True)]
    loss, _ = ctrl_kernels.linear_policy_loss(*leaves, **without_leaves(inputs), backend=backend)
    assert loss.item() == pytest.approx(expected["loss"].item(), rel=1e-5)
    assert loss.requires_grad == any(trained)
    if any(trained):
        loss.backward()
    for leaf, name, t in zip(leaves, ("d_hidden", "d_weight"), trained, strict=True):
        assert (leaf.grad is not None) == t
        assert not t or relative_error(leaf.grad, expected[name]) < 2e-6


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("backend", BACKENDS)
def test_main_grad_upstream_and_retained_graph(backend: str, device: torch.device) -> None:
    inputs = problem((23,), 30, 6, device)
    expected = exact(inputs, vocab_size=28)
    main_grad = torch.ones(30, 6, device=device)
    leaves = [inputs[name].detach().requires_grad_() for name in ("hidden", "weight")]
    loss, _ = ctrl_kernels.linear_policy_loss(
        *leaves, **without_leaves(inputs), vocab_size=28, main_grad=main_grad, backend=backend
    )
    (3 * loss).backward(retain_graph=True)
    assert leaves[1].grad is None
    assert relative_error(main_grad - 1, 3 * expected["d_weight"]) < 1e-5
    assert relative_error(leaves[0].grad, 3 * expected["d_hidden"]) < 2e-6
    leaves[0].grad = None
    loss.expand(4).sum().backward()  # once more, with an upstream gradient of stride 0
    assert relative_error(main_grad - 1, 7 * expected["d_weight"]) < 1e-5
    assert relative_error(leaves[0].grad, 4 * expected["d_hidden"]) < 2e-6


@pytest.mark.usefixtures("short_chunks")
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_twice_and_without_gradients(backend: str, device: torch.device) -> None:
    inputs = problem((3, 11), 333, 24, device, torch.bfloat16)
    first, second = (found(inputs, backend=backend, **EVERYTHING) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        loss, metrics = ctrl_kernels.linear_policy_loss(**inputs, backend=backend, **EVERYTHING)
    assert torch.equal(loss, first["loss"]) and all(torch.equal(x, first[name]) for name, x in metrics.items())


def test_log_probs_are_those_of_linear_token_logprobs(device: torch.device) -> None:
    inputs = problem((23,), 333, 24, device)
    old = ctrl_kernels.linear_token_logprobs(
        inputs["hidden"], inputs["weight"], inputs["targets"], temperature=0.9, backend="triton"
    )
    _, metrics = ctrl_kernels.linear_policy_loss(**(inputs | {"old_logprobs": old}), temperature=0.9, backend="triton")
    assert metrics["ratio"] == 1.0 and metrics["approx_kl"] == 0.0


def test_a_target_outside_the_vocabulary_is_loud(device: torch.device) -> None:
    inputs = problem((9,), 30, 6, device) | {"mask": torch.ones(9, device=device)}
    for wrong in (30, 29, -7):
        inputs["targets"][4] = wrong
        inputs["advantages"][4] = 1.0
        for backend in BACKENDS:
            got = found(inputs, vocab_size=29, backend=backend)
            assert got["loss"].isnan() and got["d_hidden"][4].isnan().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ratio": "sequence"}, "linear_token_logprobs and policy_loss"),
        ({"aggregation": "seq-mean-token-sum"}, r"\(B, T, D\)"),
        ({"kl_coef": 0.1}, "needs ref_logprobs"),
        ({"mask": torch.zeros(3)}, "mask must have shape"),
        ({"hidden": torch.zeros(3, 3)}, r"\(N, D\) with targets \(N,\)"),
        ({"weight": torch.zeros(5, 4)}, "share D"),
        ({"main_grad": torch.zeros(4, 3)}, "main_grad"),
        ({"workspace_mb": 0}, "workspace_mb"),
        ({"denominator": -1.0}, "denominator"),
        ({"temperature": -1.0}, "temperature"),
        ({"clip_low": 2.0}, "clip_low"),
        ({"backend": "cpu"}, "auto, triton, torch"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    zeros = torch.zeros(2)
    inputs = {"hidden": torch.zeros(2, 3), "weight": torch.zeros(5, 3), "targets": torch.zeros(2).long()}
    inputs |= {"old_logprobs": zeros, "advantages": zeros, "mask": zeros} | arguments
    with pytest.raises(ValueError, match=message):
        ctrl_kernels.linear_policy_loss(**inputs)
