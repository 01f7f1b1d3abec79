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

from ctrl_kernels.options import flat, schema

_LIBRARY = torch.library.Library("ctrl_kernels", "DEF")
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _run(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    """Call without autocast and on the first argument's device."""
    first = arguments[0]
    kind = "cuda" if first.is_cuda else first.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return _run(function, arguments)
    if kind == "cuda" and first.get_device() != torch.cuda.current_device():
        with torch.cuda.device(first.device):
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


def _filled(found: Any, values: tuple[Any, ...]) -> Any:
    """What an operator returns where the function has nothing: an empty tensor."""
    if isinstance(found, tuple):
        return tuple(values[0].new_empty(0) if x is None else x for x in found)
    return found


def operator(
    signature: str, fake: Callable[..., Any], *kinds: Any
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the function below as the operator with this ``signature``; ``fake`` makes results without values.

    The function may return None for a tensor; the operator returns an empty one instead. ``kinds``: types of
    options, objects of which the function and ``fake`` take last; the operator takes their fields.
    """
    name, listed = signature.split("(")[0], ", ".join(map(schema, kinds))
    count = len(kinds)

    def packed(values: tuple[Any, ...]) -> tuple[Any, ...]:
        objects: list[Any] = []
        for kind in reversed(kinds):
            fields = len(kind.__dataclass_fields__)
            objects.insert(0, kind.of(values[-fields:]))
            values = values[:-fields]
        return *values, *objects

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        _LIBRARY.define(signature.replace("OPTIONS", listed), tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(
            name, lambda *values: _filled(_run(function, packed(values)), values), "CompositeExplicitAutograd"
        )
        torch.library.register_fake(f"ctrl_kernels::{name}", lambda *values: fake(*packed(values)), lib=_LIBRARY)
        traced = getattr(torch.ops.ctrl_kernels, name).default

        def call(*arguments: Any) -> Any:
            if torch.compiler.is_compiling() or type(arguments[0]) not in _PLAIN:
                plain = len(arguments) - count
                return traced(*arguments[:plain], *(value for x in arguments[plain:] for value in flat(x)))
            return _run(function, arguments)

        call.__doc__ = function.__doc__
        return call

    return decorate
