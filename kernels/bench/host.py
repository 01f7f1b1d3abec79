"""The host's share of a call: Python and PyTorch around the launches, which are left out. Microseconds of the
processor (a loaded machine counts for less), the best of 9.

    python kernels/bench/host.py

Runs on a CPU as well as on a machine with a GPU; tensors are tiny and on the CPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # ctrl_kernels, where the project is not installed

import torch
from triton.runtime.jit import JITFunction

import ctrl_kernels


def microseconds(call: Callable[[], Any], repeats: int = 300) -> float:
    """The best mean of 9 series."""
    means = []
    for _ in range(9):
        began = time.thread_time()
        for _ in range(repeats):
            call()
        means.append((time.thread_time() - began) / repeats * 1e6)
    return min(means)


def main() -> int:
    """Measure and print."""
    JITFunction.run = lambda self, *_, **__: None
    ctrl_kernels.options.INTERPRETED = True  # lets CPU tensors through
    x = torch.randn(64, 64, requires_grad=True)
    targets, groups = torch.zeros(64, dtype=torch.int64), torch.arange(64) // 8
    old, advantages, mask = torch.randn(64, 64), torch.randn(64, 64), torch.ones(64, 64, dtype=torch.bool)
    k, loss_options = ctrl_kernels, {"denominator": 64.0, "clip_high": 0.28, "dual_clip": 3.0}
    calls: dict[str, Callable[[], Any]] = {
        "token_logprobs": lambda: k.token_logprobs(x, targets, return_entropy=True, backend="triton"),
        "policy_loss": lambda: k.policy_loss(x, old, advantages, mask, **loss_options, backend="triton"),
        "value_loss": lambda: k.value_loss(x, old, advantages, mask, denominator=64.0, backend="triton"),
        "gae": lambda: k.gae(advantages, old, mask, gamma=1.0, lam=0.95, backend="triton"),
        "group_advantages": lambda: k.group_advantages(advantages[0], groups, backend="triton"),
    }
    for name, call in calls.items():
        print(f"{name:20}{microseconds(call):8.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
