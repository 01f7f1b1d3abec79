"""Operators of PyTorch: what ``torch.compile``, ``torch.export`` and fake tensors see of a computation.

A function registered here runs as it stands in eager mode, without the dispatcher's detour. When it is traced, a call
is one opaque node, ``torch.ops.ctrl_kernels.NAME``, whose result a fake implementation describes: so loops over chunks,
selections of tokens and Triton launches never meet the tracer. Either way it runs without autocast (it chooses its
types itself) and on the device of its first argument.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("ctrl_kernels", "DEF")
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _run(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Call without autocast and on the first argument's device."""
    device = arguments[0].device
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        with torch.autocast(device.type, enabled=False):
            return _run(function, arguments)
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            return function(*arguments)
    return function(*arguments)


class _Refusal(torch.autograd.Function):
    """Hands gradients on as they are, and refuses to be differentiated against what they depend on."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[count:])

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        raise RuntimeError("ctrl_kernels: cannot differentiate twice; these functions have first derivatives only")


def first_order(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Make a second derivative through this backward pass an error: its results do not know what they depend on.

    Unlike PyTorch's ``once_differentiable`` also where the upstream gradient is a constant.
    """

    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # it is for create_graph=True
            return backward(ctx, *gradients)
        with torch.no_grad():
            found = backward(ctx, *gradients)
        causes = [x for x in (*ctx.saved_tensors, *gradients) if x is not None and x.requires_grad]
        outputs = iter(_Refusal.apply(len(causes), *causes, *(x for x in found if x is not None)))
        return tuple(None if x is None else next(outputs) for x in found)

    return checked


def operator(signature: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the function below as the operator with this ``signature``; ``fake`` makes results without values."""
    name = signature.split("(")[0]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        def implementation(*arguments: Any) -> Any:
            return _run(function, arguments)

        _LIBRARY.define(signature, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"ctrl_kernels::{name}", fake, lib=_LIBRARY)
        traced = getattr(torch.ops.ctrl_kernels, name).default

        def call(*arguments: Any) -> Any:
            if torch.compiler.is_compiling() or type(arguments[0]) not in _PLAIN:
                return traced(*arguments)
            return _run(function, arguments)

        call.__doc__ = function.__doc__
        return call

    return decorate
