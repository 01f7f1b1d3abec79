"""Matrix products with a result or an accumulator of higher precision than the factors: cuBLAS, as PyTorch calls it.

On CUDA the factors stay as they are (``out_dtype``, which takes fp32 accumulators from PyTorch 2.10 on). On a CPU,
where the kernels are only interpreted, they are widened first.
"""

import torch


def multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """``out = a @ b``, rounded once, to the type of ``out``: that of the factors or float32."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def accumulate(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """``total += a @ b`` in the type of ``total``: that of the factors or float32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
