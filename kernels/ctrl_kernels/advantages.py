"""``group_advantages``: advantages relative to the other samples of a group.

With n rewards r of a group, mean m and unbiased standard deviation s = sqrt(sum (r - m)^2 / (n - 1)):

    grpo     (r - m) / (s + eps)      Shao et al. 2024, arXiv 2402.03300
    dr_grpo  r - m                    Liu et al. 2025, arXiv 2503.20783
    rloo     (r - m) n / (n - 1)      Ahmadian et al. 2024, arXiv 2402.14740: r less the mean of the others

A group of one has nothing to compare with and gives 0 (verl gives the raw score), and so does one without variance.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch

from ctrl_kernels import reference
from ctrl_kernels.backend import Backend, resolve_backend

Estimator = Literal["grpo", "dr_grpo", "rloo"]


def group_advantages(
    rewards: torch.Tensor,
    group_ids: torch.Tensor,
    *,
    estimator: Estimator = "grpo",
    eps: float = 1e-6,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Advantages [B] in fp32 of ``rewards`` [B], relative to the rows with the same of the integer ``group_ids`` [B].

    Groups may be ragged and their rows in any order. No gradient flows to the rewards.
    """
    if estimator not in get_args(Estimator):
        raise ValueError(f"estimator={estimator!r} is unknown; choose one of {', '.join(get_args(Estimator))}")
    if rewards.dim() != 1 or group_ids.shape != rewards.shape:
        raise ValueError(
            f"rewards and group_ids must both have shape (B,), got {tuple(rewards.shape)} and {tuple(group_ids.shape)}"
        )
    if group_ids.is_floating_point() or group_ids.device != rewards.device:
        raise ValueError(f"group_ids must be integers on {rewards.device}, got {group_ids.dtype} on {group_ids.device}")
    if not eps > 0:
        raise ValueError(f"eps={eps} must be positive")
    resolve_backend(backend, rewards)
    return reference.group_advantages(rewards.detach(), group_ids, estimator=estimator, eps=eps).float()
