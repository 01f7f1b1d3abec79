"""Kernels run on a GPU where there is one and in Triton's interpreter elsewhere; fresh memory is poisoned with NaN."""

from collections.abc import Callable
from typing import Any

import interpreter_rounding
import pytest
import torch
from ctrl_kernels.options import INTERPRETED

if not torch.cuda.is_available() and not INTERPRETED:
    raise pytest.UsageError("tests/kernels need a GPU, or TRITON_INTERPRET=1 in the environment before Python starts")


interpreter_rounding.install()


def pytest_configure(config: pytest.Config) -> None:
    """The interpreter's numpy warns of overflows and NaN in lanes that kernels compute and mask."""
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


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
