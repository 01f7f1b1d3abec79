"""``group_advantages``: advantages relative to the other samples of a group.

With n rewards r of a group, mean m and unbiased standard deviation s = sqrt(sum (r - m)^2 / (n - 1)):

    grpo     (r - m) / (s + eps)      Shao et al. 2024, arXiv 2402.03300
    dr_grpo  r - m                    Liu et al. 2025, arXiv 2503.20783
    rloo     (r - m) n / (n - 1)      Ahmadian et al. 2024, arXiv 2402.14740: r less the mean of the others

A group of one has nothing to compare with and gives 0 (verl gives the raw score), and so does one without variance: the
kernel sums differences from the row's own reward, which are exactly 0 then.

One launch without sorting: a program compares a few rows with all B, so that B^2 comparisons are made, each in a
fixed order. At the thousands of rows of a step that costs microseconds, less than a sort.

Legend: B rows, I rows of a program, J rows compared at a time.
"""
# mypy: disable-error-code="no-untyped-def"

from typing import Literal, get_args

import torch
import triton
import triton.language as tl

from ctrl_kernels import reference
from ctrl_kernels.backend import Backend, check_kernel_dtype, resolve_backend

BLOCK_I = 8
BLOCK_J = 512
ADVANTAGE_WARPS = 4


@triton.jit
def _group_advantages_kernel(
    rewards_ptr,
    groups_ptr,
    out_ptr,
    rows,
    eps,
    ESTIMATOR: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    reward = tl.load(rewards_ptr + i, mask=i < rows, other=0.0).to(tl.float32)
    group = tl.load(groups_ptr + i, mask=i < rows, other=0)
    counts = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    differences = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    for begin in range(0, rows, BLOCK_J):
        j = begin + tl.arange(0, BLOCK_J)
        other = tl.load(rewards_ptr + j, mask=j < rows, other=0.0).to(tl.float32)
        same = (group[:, None] == tl.load(groups_ptr + j, mask=j < rows, other=0)[None, :]) & (j < rows)[None, :]
        counts += tl.where(same, 1.0, 0.0)
        differences += tl.where(same, other[None, :] - reward[:, None], 0.0)
    count = tl.sum(counts, 1)
    mean = tl.sum(differences, 1) / tl.maximum(count, 1.0)  # of the group, less the row's own reward
    advantage = -mean
    others = tl.maximum(count - 1.0, 1.0)
    if ESTIMATOR == "grpo":
        squares = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
        for begin in range(0, rows, BLOCK_J):
            j = begin + tl.arange(0, BLOCK_J)
            other = tl.load(rewards_ptr + j, mask=j < rows, other=0.0).to(tl.float32)
            same = (group[:, None] == tl.load(groups_ptr + j, mask=j < rows, other=0)[None, :]) & (j < rows)[None, :]
            centred = other[None, :] - reward[:, None] - mean[:, None]
            squares += tl.where(same, centred * centred, 0.0)
        advantage = advantage / (tl.sqrt(tl.sum(squares, 1) / others) + eps)
    elif ESTIMATOR == "rloo":
        advantage = advantage * (count / others)
    tl.store(out_ptr + i, tl.where(count > 1.0, advantage, 0.0), mask=i < rows)


def _launch(rewards_B: torch.Tensor, groups_B: torch.Tensor, estimator: str, eps: float) -> torch.Tensor:
    out_B = torch.empty_like(rewards_B, dtype=torch.float32)
    _group_advantages_kernel[(triton.cdiv(len(rewards_B), BLOCK_I),)](
        rewards_B,
        groups_B,
        out_B,
        len(rewards_B),
        eps,
        ESTIMATOR=estimator,
        BLOCK_I=BLOCK_I,
        BLOCK_J=BLOCK_J,
        num_warps=ADVANTAGE_WARPS,
    )
    return out_B


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
    if resolve_backend(backend, rewards) == "triton" and len(rewards) > 0:
        check_kernel_dtype(rewards=rewards)
        return _launch(rewards.detach().contiguous(), group_ids.contiguous(), estimator, eps)
    return reference.group_advantages(rewards.detach(), group_ids, estimator=estimator, eps=eps).float()
