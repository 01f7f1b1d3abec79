"""Rotary position embedding in few passes over memory, where Transformer Engine's kernel is absent.

Megatron's plain version concatenates four times a call; this one writes each half of the result once, forward and
backward. Shapes: T positions, B sequences, H heads, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from torch import Tensor


class _Rotate(torch.autograd.Function):
    """Rotation of the pairs (x[i], x[i + D/2]) by the angle of their position; its gradient rotates back."""

    @staticmethod
    def forward(ctx: Any, x_TBHD: Tensor, angles_T11D: Tensor) -> Tensor:
        """Rotate by the angles."""
        half = angles_T11D[..., : x_TBHD.shape[-1] // 2]
        cos, sin = half.cos().to(x_TBHD.dtype), half.sin().to(x_TBHD.dtype)
        ctx.save_for_backward(cos, sin)
        return _rotate(x_TBHD, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Rotate the gradient by the opposite angles."""
        cos, sin = ctx.saved_tensors
        return _rotate(gradients[0], cos, -sin), None


def _rotate(x_TBHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out_TBHD = torch.empty_like(x_TBHD, memory_format=torch.contiguous_format)
    (a, b), (rotated_a, rotated_b) = x_TBHD.chunk(2, -1), out_TBHD.chunk(2, -1)
    torch.mul(a, cos, out=rotated_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=rotated_b).addcmul_(a, sin)
    return out_TBHD


def rotate(x_TBHD: Tensor, angles_T11D: Tensor, *, interleaved: bool = False, **_unused: Any) -> Tensor:
    """What Megatron calls for ``apply_rope_fusion``: rotary embedding over the whole head dimension."""
    assert not interleaved and angles_T11D.shape[-1] == x_TBHD.shape[-1]
    return _Rotate.apply(x_TBHD, angles_T11D)


def install() -> None:
    """Make this Megatron's fused rotary embedding unless Transformer Engine has one."""
    if rope_utils.fused_apply_rotary_pos_emb is None:
        rope_utils.fused_apply_rotary_pos_emb = rotate
