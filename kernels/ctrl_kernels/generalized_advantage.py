"""``gae``: generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438).

From the last step to the first, with v' and A' the value and advantage of the next unmasked step (0 past the last one):

    A = r + gamma v' - v + gamma lam A'      at an unmasked step;      A = A', v' unchanged      at a masked one.

Masked steps so carry the state through, as in verl; their advantage is the one they carry. Returns are A + v, where a
NaN value of a masked step counts as 0. Nothing is whitened.

A step is an affine map of the state (A, v'): A <- a A + b v' + c and v' <- e v' + f. Maps compose associatively, so
one program scans a sequence in blocks from its end, each in parallel, in one launch: a lane composes the maps of four
steps, the lanes' maps are scanned, and each lane then walks through its steps from the state that it starts from.

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
def _quarters(x, LANES: tl.constexpr):
    """Elements 0, 1, 2 and 3 of each lane's four."""
    even, odd = tl.split(tl.reshape(x, [LANES, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _whole(x0, x1, x2, x3, LANES: tl.constexpr):
    """What ``_quarters`` took apart."""
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [LANES * 4])


@triton.jit
def _steps(rewards_ptr, values_ptr, mask_ptr, row, t, end):
    """Rewards, values and whether they count; nothing counts at or past the end."""
    inside = t < end
    active = inside & (tl.load(mask_ptr + row + t, mask=inside, other=0) != 0)
    reward = tl.load(rewards_ptr + row + t, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(values_ptr + row + t, mask=inside, other=0.0).to(tl.float32)
    return reward, value, active


@triton.jit
def _lane_maps(reward, value, active, gamma, gamma_lam, LANES: tl.constexpr):
    """The map of each lane's four steps together."""
    a0, a1, a2, a3 = _quarters(tl.where(active, gamma_lam, 1.0), LANES)
    b0, b1, b2, b3 = _quarters(tl.where(active, gamma, 0.0), LANES)
    c0, c1, c2, c3 = _quarters(tl.where(active, reward - value, 0.0), LANES)
    e0, e1, e2, e3 = _quarters(tl.where(active, 0.0, 1.0), LANES)
    f0, f1, f2, f3 = _quarters(tl.where(active, value, 0.0), LANES)
    a, b, c, e, f = _compose(a3, b3, c3, e3, f3, a2, b2, c2, e2, f2)
    a, b, c, e, f = _compose(a, b, c, e, f, a1, b1, c1, e1, f1)
    return _compose(a, b, c, e, f, a0, b0, c0, e0, f0)


@triton.jit
def _step(reward, value, active, advantage, next_value, gamma, gamma_lam):
    """The state before a step, from that after it."""
    stepped = reward - value + gamma * next_value + gamma_lam * advantage
    return tl.where(active, stepped, advantage), tl.where(active, value, next_value)


@triton.jit
def _gae_kernel(
    rewards_ptr, values_ptr, mask_ptr, advantages_ptr, returns_ptr, steps, gamma, gamma_lam, LANES: tl.constexpr
):
    BLOCK: tl.constexpr = LANES * 4
    row = tl.program_id(0).to(tl.int64) * steps
    advantage_carry = 0.0
    value_carry = 0.0
    blocks = tl.cdiv(steps, BLOCK)
    for block in range(0, blocks):
        begin = (blocks - 1 - block) * BLOCK
        end = tl.minimum(begin + BLOCK, steps)
        t = begin + tl.arange(0, BLOCK)
        # The lane to the right, loaded once more: scanned, its map gives the state that this lane's steps start from.
        reward, value, active = _steps(rewards_ptr, values_ptr, mask_ptr, row, t + 4, end)
        maps = _lane_maps(reward, value, active, gamma, gamma_lam, LANES)
        a, b, c, e, f = tl.associative_scan(maps, 0, _compose, reverse=True)
        advantage = a * advantage_carry + b * value_carry + c
        next_value = e * value_carry + f
        reward, value, active = _steps(rewards_ptr, values_ptr, mask_ptr, row, t, end)
        r0, r1, r2, r3 = _quarters(reward, LANES)
        v0, v1, v2, v3 = _quarters(value, LANES)
        m0, m1, m2, m3 = _quarters(active.to(tl.int8), LANES)
        a3, next_value = _step(r3, v3, m3 != 0, advantage, next_value, gamma, gamma_lam)
        a2, next_value = _step(r2, v2, m2 != 0, a3, next_value, gamma, gamma_lam)
        a1, next_value = _step(r1, v1, m1 != 0, a2, next_value, gamma, gamma_lam)
        a0, next_value = _step(r0, v0, m0 != 0, a1, next_value, gamma, gamma_lam)
        advantage = _whole(a0, a1, a2, a3, LANES)
        value = tl.where(active | (value == value), value, 0.0)
        tl.store(advantages_ptr + row + t, advantage, mask=t < end)
        tl.store(returns_ptr + row + t, advantage + value, mask=t < end)
        first = tl.arange(0, LANES) == 0
        advantage_carry = tl.sum(tl.where(first, a0, 0.0), 0)
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
        LANES=min(BLOCK_T, max(16, triton.next_power_of_2(steps))) // 4,
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
