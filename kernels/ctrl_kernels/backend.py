"""The backend of a call: Triton kernels on a GPU, plain PyTorch on a CPU."""

from __future__ import annotations

from typing import Literal, get_args

import torch

Backend = Literal["auto", "triton", "torch"]


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter: ``TRITON_INTERPRET=1`` before triton's first import."""
    from triton import language as tl
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(tl.max, InterpretedFunction)


def resolve_backend(backend: str, tensor: torch.Tensor) -> Literal["triton", "torch"]:
    """The backend that a call with ``backend`` uses for ``tensor``: ``auto`` is Triton on CUDA and PyTorch elsewhere.

    Raises ValueError for an unknown name, and for Triton on what it cannot run: CPU tensors outside the interpreter.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(get_args(Backend))}")
    if backend == "auto":
        return "triton" if tensor.is_cuda else "torch"
    if backend == "triton" and not tensor.is_cuda and not interpreted():
        raise ValueError(
            f"backend='triton' needs CUDA tensors, got {tensor.device}; on a CPU set TRITON_INTERPRET=1 "
            "before Python starts, or use backend='torch' or 'auto'"
        )
    return "triton" if backend == "triton" else "torch"


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """What plain PyTorch computes in: float64 if any tensor is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def check_kernel_dtype(**tensors: torch.Tensor | None) -> None:
    """Raise ValueError, naming the tensor, unless every one that is given has a type that the kernels compute with."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"backend='triton' takes float32, bfloat16 or float16, got {name} in {tensor.dtype}")
