"""Whether the kernels are right on this machine: every function against PyTorch in float64, in a minute.

    python -m ctrl_kernels.check

Compiles each kernel for the first CUDA GPU. Without one it interprets them on the CPU, which shows whether their
mathematics is right with this torch and this triton, and not whether they compile; so it says. Prints an error for each
function, of values in units of 5e-6 (1 + the largest logit) and of gradients relative to what rounding their type
costs, and exits with 1 if one is above 1.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import triton

import ctrl_kernels
from ctrl_kernels.options import INTERPRETED

_ROUNDING = {torch.float32: 3e-6, torch.bfloat16: 4e-3}  # of gradients


def _inputs(device: torch.device, dtype: torch.dtype, tokens: int, columns: int, width: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    targets = torch.randint(columns, (tokens,), generator=generator)
    targets[::7] = -100
    found = {
        "hidden": normal(tokens, width).to(dtype),
        "weight": (3 * normal(columns, width) / width**0.5).to(dtype),
        "logits": (3 * normal(tokens, columns)).to(dtype),
        "targets": targets,
        "old": normal(4, tokens // 4) * 0.3 - 2,
        "logprobs": normal(4, tokens // 4) * 0.3 - 2,
        "advantages": normal(4, tokens // 4),
        "mask": torch.rand(4, tokens // 4, generator=generator) < 0.8,
        "rewards": normal(tokens),
        "groups": torch.arange(tokens) % 5,
    }
    return {name: x.to(device) for name, x in found.items()}


_LEAVES = {"token": ("logits",), "linear": ("hidden", "weight"), "policy": ("logprobs",), "value": ("logprobs",)}
"""What gets gradients, by the first word of a function's name."""


def _calls(x: dict[str, Any], backend: Any) -> dict[str, Callable[[], Any]]:
    """Every function with these inputs, and its main variants."""
    k, constants = ctrl_kernels, [x[name] for name in ("old", "advantages", "mask")]
    softmax: dict[str, Any] = {"temperature": 0.9, "return_entropy": True, "backend": backend}
    output_layer = (x["hidden"], x["weight"], x["targets"])
    vectors = [tensor.flatten() for tensor in constants]
    calls: dict[str, Callable[[], Any]] = {
        "token_logprobs": lambda: k.token_logprobs(x["logits"], x["targets"], **softmax),
        "linear_token_logprobs": lambda: k.linear_token_logprobs(*output_layer, **softmax),
        "linear_token_logprobs, saved": lambda: k.linear_token_logprobs(*output_layer, save_logits=True, **softmax),
        "linear_policy_loss": lambda: k.linear_policy_loss(*output_layer, *vectors, backend=backend)[:1],
        "policy_loss, GSPO": lambda: k.policy_loss(x["logprobs"], *constants, ratio="sequence", backend=backend)[:1],
        "value_loss": lambda: k.value_loss(x["logprobs"], *constants, backend=backend)[:1],
        "gae": lambda: k.gae(x["advantages"], x["old"], x["mask"], gamma=0.99, lam=0.95, backend=backend),
    }

    def policy(objective: Any) -> Callable[[], Any]:
        return lambda: k.policy_loss(x["logprobs"], *constants, objective=objective, backend=backend)[:1]

    def group(estimator: Any) -> Callable[[], Any]:
        return lambda: (k.group_advantages(x["rewards"], x["groups"], estimator=estimator, backend=backend),)

    calls |= {f"policy_loss, {name}": policy(name) for name in k.OBJECTIVES}
    calls |= {f"group_advantages, {name}": group(name) for name in k.ESTIMATORS}
    return calls


def _run(name: str, inputs: dict[str, Any], backend: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A function's outputs, and the gradients of their sum."""
    leaves = _LEAVES.get(name.split("_")[0], ())
    given = inputs | {leaf: inputs[leaf].detach().requires_grad_() for leaf in leaves}
    outputs = _calls(given, backend)[name]()
    total = sum(x.sum() for x in outputs)
    gradients = torch.autograd.grad(total, [given[leaf] for leaf in leaves]) if leaves else ()
    return [x.detach() for x in outputs], list(gradients)


def errors(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> Iterator[tuple[str, float, float]]:
    """Each function's name, the error of its values and that of its gradients, in units of what is allowed."""
    inputs = _inputs(device, dtype, *shape)
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    for name in _calls(inputs, "triton"):
        found, gradients = _run(name, inputs, "triton")
        expected, wanted = _run(name, exact, "torch")
        limit = 5e-6 * (1 + 20)
        values = max((a.double() - b).abs().max().item() for a, b in zip(found, expected, strict=True)) / limit
        slopes = [
            ((a.double() - b).norm() / b.norm()).item() / _ROUNDING[a.dtype]
            for a, b in zip(gradients, wanted, strict=True)
        ]
        yield name, values, max(slopes, default=0.0)


def main() -> int:
    """Check and print."""
    if not torch.cuda.is_available() and not INTERPRETED:
        # The interpreter is chosen when triton is imported, which has happened.
        interpreted = os.environ | {"TRITON_INTERPRET": "1"}
        command = [sys.executable, "-W", "ignore::RuntimeWarning", "-m", "ctrl_kernels.check"]
        return subprocess.call(command, env=interpreted)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    place = torch.cuda.get_device_name(device) if device.type == "cuda" else "no CUDA GPU"
    print(f"ctrl_kernels {ctrl_kernels.__version__}, torch {torch.__version__}, triton {triton.__version__}, {place}")
    if device.type != "cuda":
        print("interpreted on the CPU: checks the kernels' mathematics, not that they compile for a GPU")
    began, failed = time.monotonic(), 0
    runs = [(torch.float32, (48, 700, 32))]
    if device.type == "cuda":
        runs += [(torch.float32, (512, 5003, 256)), (torch.bfloat16, (512, 32_000, 512))]
    for dtype, shape in runs:
        print(f"N, V, D = {shape}, {dtype}")
        for name, values, gradients in errors(device, dtype, shape):
            wrong = not (values <= 1 and gradients <= 1)
            failed += wrong
            print(f"  {name:42} values {values:7.3f}  gradients {gradients:7.3f}{'  WRONG' if wrong else ''}")
    print(f"{'all right' if not failed else f'{failed} wrong'}, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
