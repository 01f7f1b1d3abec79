"""What Megatron-core needs to run on a CPU: everything that pretends, in one file, used only there.

Megatron-core allocates with ``device="cuda"``, reads the current CUDA device and stream, and compares
``Tensor.type()`` with CUDA's names. On a machine, or in a process, that trains on the CPU, ``install`` makes each of
these mean the CPU. On a GPU this file is never imported.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._device import _device_constructors

_FACTORIES = ("empty", "ones", "tensor", "zeros")
_installed = False


class _Stream:
    """A CUDA stream on a machine without streams: everything is already in order."""

    def wait_stream(self, _stream: object) -> None:
        """Nothing to wait for."""

    def synchronize(self) -> None:
        """Nothing to wait for."""


def install() -> None:
    """Make ``cuda`` mean ``cpu`` for the rest of this process; before Megatron-core is imported where that is possible.

    (Where a GPU is there but not used it comes later, and Megatron's compiled functions, none of them called on a CPU,
    stay compiled.)
    """
    global _installed
    if _installed:
        return
    assert not torch.cuda.is_initialized(), "this process already uses a GPU"
    _device_constructors()  # remembers the functions as they are, so that `with torch.device(...)` still knows them
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign,assignment]
    torch.Tensor.type = _cuda_type_name(torch.Tensor.type)  # type: ignore[method-assign,assignment]
    stream = _Stream()
    nothing: Mapping[str, Callable[..., Any]] = {
        "current_device": lambda: torch.device("cpu"),
        "set_device": lambda _device: None,
        "synchronize": lambda _device=None: None,
        "empty_cache": lambda: None,
        "current_stream": lambda _device=None: stream,
        "default_stream": lambda _device=None: stream,
        "manual_seed": lambda _seed: None,
    }
    for name, function in nothing.items():
        setattr(torch.cuda, name, function)
    _keep_memory()
    # Megatron decorates small functions with torch.compile when it is imported: on a CPU that costs a second of
    # imports and, when they are called, minutes of C++ compilation that a small model never earns back.
    torch.compile = _no_compile  # type: ignore[assignment]
    # It orders CUDA streams and means nothing here, but Megatron warns of its absence.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    _installed = True


def start_random_tracker() -> None:
    """Megatron's random tracker without CUDA generators; nothing random happens inside the model (no dropout)."""
    from megatron.core.tensor_parallel import random as tensor_random

    tensor_random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)
    # Recomputation of activations saves and restores the CUDA generator around a layer.
    tensor_random._get_cuda_rng_state = lambda *_, **__: torch.empty(0)
    tensor_random._set_cuda_rng_state = lambda *_, **__: None


def _keep_memory() -> None:
    """Let glibc keep freed memory: by default every large tensor is mapped anew, and its pages zeroed, each time."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            libc.mallopt(parameter, 1 << 30)


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    cpu = torch.device("cpu")

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs["device"] = cpu
        return function(*(cpu if _is_cuda(arg) else arg for arg in args), **kwargs)

    return call


def _cuda_type_name(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = function(self, *args, **kwargs)
        return name.replace("torch.", "torch.cuda.", 1) if isinstance(name, str) else name

    return call


def _no_compile(function: Callable[..., Any] | None = None, **_options: Any) -> Callable[..., Any]:
    return function if function is not None else lambda wrapped: wrapped
