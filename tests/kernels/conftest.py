"""Kernels run on a GPU where there is one and in Triton's interpreter elsewhere; fresh memory is poisoned with NaN."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from ctrl_kernels.backend import interpreted
from triton.runtime import interpreter

if not torch.cuda.is_available() and not interpreted():
    raise pytest.UsageError("tests/kernels need a GPU, or TRITON_INTERPRET=1 in the environment before Python starts")


def pytest_configure(config: pytest.Config) -> None:
    """The interpreter's numpy warns of overflows and NaN in lanes that kernels compute and mask."""
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def _round_to_nearest(convert: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """The interpreter cuts fp32 off at bf16; a GPU rounds to the nearest, and so does PyTorch."""

    def converted(data: np.ndarray, from_type: tl.dtype, to_type: tl.dtype, rounding_mode: Any) -> np.ndarray:
        if (from_type, to_type) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(np.ascontiguousarray(data)).bfloat16().view(torch.int16).numpy().view(np.uint16)
        if (from_type, to_type) == (tl.bfloat16, tl.float32):
            return data.astype(np.uint32) << 16
        return convert(data, from_type, to_type, rounding_mode)

    return converted


interpreter._convert_float = _round_to_nearest(interpreter._convert_float)


@pytest.fixture
def device() -> torch.device:
    """Where the Triton backend runs in this process."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def allocated(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return allocated


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a kernel leaves unwritten, or reads before it is written, shows as NaN."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
