"""``gae``: generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438).

From the last step to the first, with v' and A' the value and advantage of the next unmasked step (0 past the last one):

    A = r + gamma v' - v + gamma lam A'      at an unmasked step;      A = A', v' unchanged      at a masked one.

Masked steps so carry the state through, as in verl; their advantage is the one they carry. Returns are A + v, where a
NaN value of a masked step counts as 0. Nothing is whitened.

A step is an affine map of the state (A, v'): A <- a A + b v' + c and v' <- e v' + f. Maps compose associatively, so
one program scans a sequence in blocks from its end, each in parallel, in one launch.

Legend: B sequences, T steps.
"""
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl

from ctrl_kernels import reference
from ctrl_kernels.backend import Backend, check_kernel_dtype, resolve_backend
from ctrl_kernels.clipping import check_shapes

BLOCK_T = 512  # few enough registers that a sequence a program keeps the whole GPU busy
GAE_WARPS = 4


@triton.jit
def _compose(a1, b1, c1, e1, f1, a2, b2, c2, e2, f2):
    """The second map after the first."""
    return a2 * a1, a2 * b1 + b2 * e1, a2 * c1 + b2 * f1 + c2, e2 * e1, e2 * f1 + f2


@triton.jit
def _gae_kernel(
    rewards_ptr, values_ptr, mask_ptr, advantages_ptr, returns_ptr, steps, gamma, gamma_lam, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * steps
    advantage_carry = 0.0
    value_carry = 0.0
    blocks = tl.cdiv(steps, BLOCK)
    for block in range(0, blocks):
        t = (blocks - 1 - block) * BLOCK + tl.arange(0, BLOCK)
        inside = t < steps
        active = inside & (tl.load(mask_ptr + row + t, mask=inside, other=0) != 0)
        reward = tl.load(rewards_ptr + row + t, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(values_ptr + row + t, mask=inside, other=0.0).to(tl.float32)
        a = tl.where(active, gamma_lam, 1.0)
        b = tl.where(active, gamma, 0.0)
        c = tl.where(active, reward - value, 0.0)
        e = tl.where(active, 0.0, 1.0)
        f = tl.where(active, value, 0.0)
        a, b, c, e, f = tl.associative_scan((a, b, c, e, f), 0, _compose, reverse=True)
        advantage = a * advantage_carry + b * value_carry + c
        next_value = e * value_carry + f
        value = tl.where(active | (value == value), value, 0.0)
        tl.store(advantages_ptr + row + t, advantage, mask=inside)
        tl.store(returns_ptr + row + t, advantage + value, mask=inside)
        first = tl.arange(0, BLOCK) == 0
        advantage_carry = tl.sum(tl.where(first, advantage, 0.0), 0)
        value_carry = tl.sum(tl.where(first, next_value, 0.0), 0)


def _launch(
    rewards_BT: torch.Tensor, values_BT: torch.Tensor, mask_BT: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    sequences, steps = rewards_BT.shape
    advantages_BT, returns_BT = rewards_BT.new_empty((2, sequences, steps), dtype=torch.float32).unbind(0)
    _gae_kernel[(sequences,)](
        rewards_BT,
        values_BT,
        mask_BT.view(torch.uint8) if mask_BT.dtype == torch.bool else mask_BT,
        advantages_BT,
        returns_BT,
        steps,
        gamma,
        gamma * lam,
        BLOCK=min(BLOCK_T, max(16, triton.next_power_of_2(steps))),
        num_warps=GAE_WARPS,
    )
    return advantages_BT, returns_BT


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float,
    lam: float,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns, both fp32 [B, T], of ``rewards`` and ``values`` [B, T].

    A step counts where ``mask`` [B, T] is not 0. What masked steps hold in ``rewards`` does not matter. No gradient
    flows.
    """
    if rewards.dim() != 2:
        raise ValueError(f"rewards must have shape (B, T), got {tuple(rewards.shape)}")
    check_shapes(rewards.shape, rewards.device, values=values, mask=mask)
    for name, factor in (("gamma", gamma), ("lam", lam)):
        if not 0 <= factor <= 1:
            raise ValueError(f"{name}={factor} must lie between 0 and 1")
    if resolve_backend(backend, rewards) == "triton" and rewards.numel() > 0:
        check_kernel_dtype(rewards=rewards, values=values)
        return _launch(rewards.detach().contiguous(), values.detach().contiguous(), mask.contiguous(), gamma, lam)
    advantages, returns = reference.gae(rewards.detach(), values.detach(), mask, gamma=gamma, lam=lam)
    return advantages.float(), returns.float()
