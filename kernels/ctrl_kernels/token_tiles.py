"""How the losses over tokens [B, T] walk through them: tiles of lanes, each with four neighbouring tokens.

A lane reads none of its tokens if all are masked. A program takes a whole sequence where a loss needs its length or
its ratio, and a run of tokens otherwise, as many as keep a Hopper GPU busy once.
"""
# mypy: disable-error-code="no-untyped-def"

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from ctrl_kernels.options import ceil_div, next_power_of_2

VECTOR = 4  # tokens of a lane: 16 bytes of fp32
LANES = 128
_RUNS = 1024  # programs that share all tokens: one wave on the 132 processors of an H100 or H200


@triton.jit
def clamped(x, low, high):
    """x between low and high; NaN stays NaN."""
    return tl.minimum(tl.maximum(x, low, tl.PropagateNan.ALL), high, tl.PropagateNan.ALL)


@triton.jit
def token_tile(mask_ptr, begin, end, LANES: tl.constexpr, VECTOR: tl.constexpr, EVEN: tl.constexpr):
    """Indices of a tile, which lie inside, which count, and which are read: every vector with a token that counts.

    EVEN: vectors lie inside or outside as a whole.
    """
    lane = begin + tl.arange(0, LANES) * VECTOR
    index = lane[:, None] + tl.arange(0, VECTOR)[None, :]
    inside = index < end
    if EVEN:
        inside = tl.broadcast_to((lane < end)[:, None], [LANES, VECTOR])
    active = inside & (tl.load(mask_ptr + index, mask=inside, other=0) != 0)
    some = tl.max(active.to(tl.int32), 1) != 0
    return index, inside, active, inside & some[:, None]


@triton.jit
def load_fp32(ptr, index, read):
    """What stands at the indices that are read, and 0 at others."""
    return tl.load(ptr + index, mask=read, other=0.0).to(tl.float32)


@triton.jit
def inverse_denominator(denominator_ptr, constant):
    """1 / the denominator on the device, 0 where that is 0; without one, the constant that the host knows."""
    inverse = constant
    if denominator_ptr is not None:
        denominator = tl.load(denominator_ptr).to(tl.float32)
        inverse = tl.where(denominator > 0.0, 1.0 / denominator, 0.0)
    return inverse


@lru_cache(maxsize=64)
def token_runs(total: int, sequence: int | None) -> tuple[int, int, dict[str, Any]]:
    """Tokens of a program, how many programs, and the constants of their tiles.

    ``sequence``: the length of one, where a program is to take a whole one.
    """
    tile = LANES * VECTOR
    length = max(1, ceil_div(ceil_div(total, tile), _RUNS)) * tile if sequence is None else sequence
    constants = {
        "LANES": min(LANES, max(16, next_power_of_2(ceil_div(max(1, min(length, total)), VECTOR)))),
        "VECTOR": VECTOR,
        "EVEN": total % VECTOR == 0 and length % VECTOR == 0,
    }
    return length, ceil_div(total, length) if total else 0, constants


def bytes_of(mask: torch.Tensor) -> torch.Tensor:
    """A mask as numbers that Triton reads in whole vectors."""
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask


def dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A constant of a loss, contiguous and without gradient."""
    if tensor is None or (tensor.is_contiguous() and not tensor.requires_grad):
        return tensor
    return tensor.detach().contiguous()
