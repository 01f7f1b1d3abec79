"""Triton's interpreter cuts fp32 off at bf16; a GPU rounds to the nearest, and so does PyTorch."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def _round_to_nearest(convert: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def converted(data: np.ndarray, from_type: tl.dtype, to_type: tl.dtype, rounding_mode: Any) -> np.ndarray:
        if (from_type, to_type) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        if (from_type, to_type) == (tl.bfloat16, tl.float32):
            return data.astype(np.uint32) << 16
        return convert(data, from_type, to_type, rounding_mode)

    return converted


def install() -> None:
    """Make the interpreter of this process round."""
    interpreter._convert_float = _round_to_nearest(interpreter._convert_float)
