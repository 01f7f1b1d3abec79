"""Manners towards PyTorch: traces, fake tensors, autocast, mixed types, second derivatives, no host synchronisation."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import ctrl_kernels
import pytest
import torch
from ctrl_kernels import operators
from kernel_oracle import dense_logprobs, relative_error
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

BACKENDS = ["triton", "torch"]
N, V, D = 12, 40, 6


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Compiled code allocates by itself: the memory that the other tests poison stays as it is here."""


def tensors(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Inputs of every function; every fifth target is ignored, the last two columns of the grids are masked."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    targets = torch.randint(V, (N,), generator=generator)
    targets[::5] = -100
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[:, 2:] = False
    found = {
        "hidden": normal(N, D).to(dtype).requires_grad_(),
        "weight": normal(V, D).to(dtype).requires_grad_(),
        "bias": normal(V).to(dtype).requires_grad_(),
        "logits": normal(N, V).to(dtype).requires_grad_(),
        "targets": targets,
        "upstream": normal(N),
        "old": normal(3, 4) - 3,
        "logprobs": (normal(3, 4) - 3).requires_grad_(),
        "advantages": normal(3, 4),
        "mask": mask,
        "groups": torch.arange(N) % 3,
    }
    return {name: x.detach().to(device).requires_grad_(x.requires_grad) for name, x in found.items()}


def grid(x: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"old_logprobs": x["old"].flatten(), "advantages": x["advantages"].flatten(), "mask": x["mask"].flatten()}


def token_logprobs(x: dict[str, torch.Tensor], backend: Any) -> torch.Tensor:
    logprobs, entropy = ctrl_kernels.token_logprobs(x["logits"], x["targets"], return_entropy=True, backend=backend)
    return (x["upstream"] * (logprobs + entropy)).sum()


def linear(x: dict[str, torch.Tensor], backend: Any, **options: Any) -> torch.Tensor:
    logprobs, entropy = ctrl_kernels.linear_token_logprobs(
        x["hidden"], x["weight"], x["targets"], bias=x["bias"], return_entropy=True, backend=backend, **options
    )
    return (x["upstream"] * (logprobs + entropy)).sum()


def one_pass(x: dict[str, torch.Tensor], backend: Any, **options: Any) -> torch.Tensor:
    loss, metrics = ctrl_kernels.linear_policy_loss(
        x["hidden"], x["weight"], x["targets"], **grid(x), bias=x["bias"], entropy_coef=0.1, backend=backend, **options
    )
    return 2 * loss + 0 * metrics["entropy"]


def policy(x: dict[str, torch.Tensor], backend: Any) -> torch.Tensor:
    loss, _ = ctrl_kernels.policy_loss(x["logprobs"], x["old"], x["advantages"], x["mask"], backend=backend)
    return 2 * loss


def value(x: dict[str, torch.Tensor], backend: Any) -> torch.Tensor:
    loss, _ = ctrl_kernels.value_loss(x["logprobs"], x["old"], x["advantages"], x["mask"], clip=0.2, backend=backend)
    return 2 * loss


def advantages(x: dict[str, torch.Tensor], backend: Any) -> torch.Tensor:
    returns = ctrl_kernels.gae(x["advantages"], x["old"], x["mask"], gamma=0.9, lam=0.8, backend=backend)
    return ctrl_kernels.group_advantages(x["upstream"], x["groups"], backend=backend).sum() + sum(returns).sum()


FUNCTIONS = [token_logprobs, linear, one_pass, policy, value, advantages]


def leaves(x: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    return [tensor for tensor in x.values() if tensor.requires_grad]


def gradients(loss: torch.Tensor, x: dict[str, torch.Tensor]) -> list[torch.Tensor | None]:
    return list(torch.autograd.grad(loss, leaves(x), allow_unused=True)) if loss.requires_grad else []


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_graph(function: Callable[..., torch.Tensor], backend: str, device: torch.device) -> None:
    x = tensors(device)
    torch._dynamo.reset()
    traced = torch.compile(function, backend="aot_eager", fullgraph=True)(x, backend)
    expected = function(x, backend)
    assert torch.allclose(traced, expected, rtol=1e-6)
    for a, b in zip(gradients(traced, x), gradients(expected, x), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_saved_logits_and_main_grad_in_one_graph(backend: str, device: torch.device) -> None:
    x = tensors(device)
    torch._dynamo.reset()
    main_grad = torch.zeros(V, D, device=device)
    options = {"save_logits": True, "main_grad": main_grad}
    loss = torch.compile(linear, backend="aot_eager", fullgraph=True)(x, backend, **options)
    loss.backward()
    other = tensors(device)
    expected = linear(other, backend)
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-6)
    assert x["weight"].grad is None and relative_error(main_grad, other["weight"].grad) < 1e-6
    assert relative_error(x["hidden"].grad, other["hidden"].grad) < 1e-6


@pytest.mark.parametrize("function", FUNCTIONS)
def test_fake_tensors_have_the_shapes_of_real_ones(function: Callable[..., torch.Tensor], device: torch.device) -> None:
    x = tensors(device)
    real = gradients(function(x, "triton"), x)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fakes = {name: mode.from_tensor(tensor) for name, tensor in x.items()}
        found = gradients(function(fakes, "triton"), fakes)
    for a, b in zip(found, real, strict=True):
        assert (a is None) == (b is None)
        assert a is None or (a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_autocast_has_no_say(function: Callable[..., torch.Tensor], backend: str, device: torch.device) -> None:
    x = tensors(device)
    expected = function(x, backend)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        found = function(x, backend)
        found_gradients = gradients(found, x)
    assert torch.equal(found, expected)
    for a, b in zip(found_gradients, gradients(expected, x), strict=True):
        assert a is b or torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", [linear, one_pass])
def test_master_weight_in_float32(function: Callable[..., torch.Tensor], backend: str, device: torch.device) -> None:
    x = tensors(device)
    mixed = x | {"hidden": x["hidden"].detach().bfloat16().requires_grad_()}
    exact = {k: t.detach().double().requires_grad_() if t.requires_grad else t for k, t in mixed.items()}
    if backend == "triton":  # which rounds the weight for its products
        exact["weight"] = x["weight"].detach().bfloat16().double().requires_grad_()
    loss, expected = function(mixed, backend), function(exact, "torch")
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found, wanted = gradients(loss, mixed), gradients(expected, exact)
    names = [name for name, tensor in mixed.items() if tensor.requires_grad]
    for name, a, b in zip(names, found, wanted, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == mixed[name].dtype
            assert relative_error(a, b) < 4e-3, name


@pytest.mark.parametrize(
    ("function", "backend"),
    [
        *((f, b) for f in (token_logprobs, linear) for b in BACKENDS),
        *((f, "triton") for f in (one_pass, policy, value)),
    ],
)
def test_a_second_derivative_is_refused(function: Callable[..., torch.Tensor], backend: str) -> None:
    x = tensors(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    loss = function(x, backend)
    inputs = [x["logits"], x["hidden"], x["logprobs"]]
    first = torch.autograd.grad(loss, inputs, create_graph=True, allow_unused=True)
    norm = sum(g.square().sum() for g in first if g is not None)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.autograd.grad(loss + norm, inputs, allow_unused=True)


class Waits(TorchDispatchMode):
    """Refuses whatever makes the host wait for the device, or a shape depend on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten.nonzero.default, torch.ops.aten._local_scalar_dense.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("function", "options"),
    [
        (linear, {"host_sync": False}),
        (linear, {"host_sync": False, "save_logits": True}),
        (one_pass, {"host_sync": False}),
        *((function, {}) for function in (token_logprobs, policy, value, advantages)),
    ],
)
def test_without_host_synchronisation(
    function: Callable[..., torch.Tensor], options: dict[str, Any], device: torch.device
) -> None:
    x = tensors(device)
    expected = function(x, "triton")
    with Waits():
        found = function(x, "triton", **options)
        found_gradients = gradients(found, x)
    assert torch.allclose(found, expected, rtol=1e-6)
    for a, b in zip(found_gradients, gradients(expected, x), strict=True):
        assert (a is None) == (b is None)
        assert a is None or relative_error(a, b) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("save_logits", [False, True])
def test_bias_and_logit_scale(save_logits: bool, backend: str, device: torch.device) -> None:
    x = tensors(device)
    options = {"logit_scale": 0.3, "softcap": 2.0, "temperature": 0.8, "save_logits": save_logits}
    found = linear(x, backend, **options)
    exact = {
        name: t.detach().double().requires_grad_() for name, t in x.items() if name in ("hidden", "weight", "bias")
    }
    logits = 0.3 * (exact["hidden"] @ exact["weight"].T + exact["bias"])
    outputs = dense_logprobs(logits, x["targets"], softcap=2.0, temperature=0.8)
    expected = (x["upstream"].double() * (outputs[0] + outputs[1])).sum()
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    inputs = [x[name] for name in exact]
    for a, b in zip(
        torch.autograd.grad(found, inputs), torch.autograd.grad(expected, list(exact.values())), strict=True
    ):
        assert relative_error(a, b) < 2e-6


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU looking at the gradient would stall it")
@pytest.mark.parametrize("backend", BACKENDS)
def test_another_gradient_than_the_promised_one_is_an_error_on_a_cpu(backend: str) -> None:
    x = {name: t.to("cpu").detach() for name, t in tensors(torch.device("cpu")).items()}
    x["hidden"].requires_grad_()
    main_grad = torch.zeros(V, D)
    loss, _ = ctrl_kernels.linear_policy_loss(
        x["hidden"], x["weight"], x["targets"], **grid(x), main_grad=main_grad, unit_gradient=True, backend=backend
    )
    with pytest.raises(RuntimeError, match=r"promised an upstream gradient of 1, it is 2\.0"):
        (2 * loss).backward()


def test_main_grad_takes_the_gradient_in_the_forward_pass(device: torch.device) -> None:
    x = tensors(device)
    main_grad = torch.full((V, D), 0.01, device=device)
    loss, _ = ctrl_kernels.linear_policy_loss(
        x["hidden"], x["weight"], x["targets"], **grid(x), main_grad=main_grad, unit_gradient=True, backend="triton"
    )
    expected, _ = ctrl_kernels.linear_policy_loss(x["hidden"], x["weight"], x["targets"], **grid(x), backend="triton")
    wanted = torch.autograd.grad(expected, (x["hidden"], x["weight"]))
    assert relative_error(main_grad - 0.01, wanted[1]) < 1e-5
    loss.backward()
    assert x["weight"].grad is None and torch.equal(x["hidden"].grad, wanted[0])
    assert relative_error(main_grad - 0.01, wanted[1]) < 1e-5
    with pytest.raises(ValueError, match="needs main_grad"):
        ctrl_kernels.linear_policy_loss(x["hidden"], x["weight"], x["targets"], **grid(x), unit_gradient=True)


def test_names_of_groups_and_unknown_options_are_explained() -> None:
    with pytest.raises(ValueError, match="number names first"):
        ctrl_kernels.group_advantages(torch.zeros(2), ["a", "b"])  # type: ignore[arg-type]
    x = tensors(torch.device("cpu"))
    with pytest.raises(TypeError, match=r"no option clip_hight; besides tensors it takes .*clip_high"):
        ctrl_kernels.policy_loss(x["logprobs"], x["old"], x["advantages"], x["mask"], clip_hight=0.3)
    with pytest.raises(ValueError, match="logit_scale"):
        ctrl_kernels.token_logprobs(x["logits"], x["targets"], logit_scale=0.0)
    with pytest.raises(ValueError, match="bias must have shape"):
        ctrl_kernels.linear_token_logprobs(x["hidden"], x["weight"], x["targets"], bias=x["bias"][:3])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_another_device_than_the_current_one() -> None:
    x = tensors(torch.device("cuda:1"))
    with torch.cuda.device(0):
        for function in FUNCTIONS:
            assert function(x, "triton").device == torch.device("cuda:1")


@pytest.mark.parametrize("current", [0, 1])
def test_launches_happen_on_the_tensors_device(current: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tensor on the second GPU, which this stands in for: whichever is the current one."""
    entered: list[Any] = []

    class Guard:
        def __init__(self, device: Any) -> None:
            self.device = device

        def __enter__(self) -> None:
            entered.append(self.device)

        def __exit__(self, *_: Any) -> None:
            entered.append("left")

    second = SimpleNamespace(is_cuda=True, device=torch.device("cuda:1"), get_device=lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", Guard)
    found = operators._run(lambda x: (x.device, list(entered)), (second,))
    assert found == (torch.device("cuda:1"), [] if current == 1 else [torch.device("cuda:1")])
    assert entered == ([] if current == 1 else [torch.device("cuda:1"), "left"])
