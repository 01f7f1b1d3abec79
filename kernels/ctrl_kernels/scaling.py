"""Multiply a gradient that a forward pass already formed by the upstream scalar: free where that is 1."""
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl

SCALE_BLOCK = 4096


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, count, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + index, mask=index < count, other=0.0)
        tl.store(x_ptr + index, (x * factor).to(x_ptr.dtype.element_ty), mask=index < count)


def scale_(x: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``x *= factor`` for a dense ``x`` and a scalar tensor, without a wait for the device; idle if the factor is 1."""
    if x.numel():
        _scale_kernel[(triton.cdiv(x.numel(), SCALE_BLOCK),)](
            x, factor.float(), x.numel(), BLOCK=SCALE_BLOCK, num_warps=8
        )
    return x
