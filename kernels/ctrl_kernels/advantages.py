"""``group_advantages`` and ``gae``: how much better an action was than expected.

``group_advantages`` compares a sample with the others of its group. With n rewards r of a group, mean m and unbiased
standard deviation s = sqrt(sum (r - m)^2 / (n - 1)):

    grpo     (r - m) / (s + eps)      Shao et al. 2024, arXiv 2402.03300
    dr_grpo  r - m                    Liu et al. 2025, arXiv 2503.20783
    rloo     (r - m) n / (n - 1)      Ahmadian et al. 2024, arXiv 2402.14740: r less the mean of the others

A group of one has nothing to compare with and gives 0 (verl gives the raw score), and so does one without variance: the
kernel sums differences from the row's own reward, which are exactly 0 then. A program compares a few rows with all B in
a fixed order, without sorting: at the thousands of rows of a step that costs microseconds, less than a sort. From
``_SORT_FROM`` rows on they are sorted by group first, and a program only looks at the groups of its own rows.

``gae`` is generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438). From the last step to the first,
with v' and A' the value and advantage of the next unmasked step (0 past the last one):

    A = r + gamma v' - v + gamma lam A'      at an unmasked step;      A = A', v' unchanged      at a masked one.

Masked steps so carry the state through, as in verl; their advantage is the one they carry. Returns are A + v, where a
NaN value of a masked step counts as 0. Nothing is whitened. A step is an affine map of the state (A, v'):
A <- a A + b v' + c and v' <- e v' + f. Maps compose associatively, so one program scans a sequence in blocks from its
end, each in parallel, in one launch: a lane composes the maps of four steps, the lanes' maps are scanned, and each lane
then walks through its steps from the state that it starts from. A block is asked for before the one after it is
worked on.

Legend: B rows or sequences, T steps, I rows of a program, J rows compared at a time.
"""
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl

from ctrl_kernels import reference
from ctrl_kernels.operators import operator
from ctrl_kernels.options import (
    ESTIMATORS,
    Backend,
    Estimator,
    ceil_div,
    check_kernel_dtype,
    check_shapes,
    choose,
    next_power_of_2,
    resolve_backend,
)

BLOCK_I = 8
BLOCK_J = 512
SORTED_BLOCK_J = 64
_SORT_FROM = 4097
ADVANTAGE_WARPS = 4
BLOCK_T = 512  # few enough registers that a sequence a program keeps the whole GPU busy
GAE_WARPS = 4
_HAS_GATHER = tl.constexpr(hasattr(tl, "gather"))


@triton.jit
def _bound(groups_ptr, rows, group, ABOVE: tl.constexpr):
    """How many of the sorted groups are less than this one, or with ABOVE no greater."""
    low = rows * 0
    high = rows
    while low < high:
        middle = (low + high) // 2
        found = tl.load(groups_ptr + middle)
        before = found <= group if ABOVE else found < group
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def group_advantages_kernel(
    rewards_ptr,
    groups_ptr,
    order_ptr,
    out_ptr,
    rows,
    eps,
    ESTIMATOR: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    group = tl.load(groups_ptr + i, mask=i < rows, other=0)
    begin = 0
    end = rows
    target = i
    if order_ptr is not None:  # sorted: rows[order] have the groups as they stand
        begin = _bound(groups_ptr, rows, tl.load(groups_ptr + tl.program_id(0) * BLOCK_I), False)
        last = tl.minimum(tl.program_id(0) * BLOCK_I + BLOCK_I, rows) - 1
        end = _bound(groups_ptr, rows, tl.load(groups_ptr + last), True)
        target = tl.load(order_ptr + i, mask=i < rows, other=0)
    reward = tl.load(rewards_ptr + target, mask=i < rows, other=0.0).to(tl.float32)
    counts = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    differences = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    for block in range(begin, end, BLOCK_J):
        other, same = _others(rewards_ptr, groups_ptr, order_ptr, group, block, end, BLOCK_J)
        counts += tl.where(same, 1.0, 0.0)
        differences += tl.where(same, other[None, :] - reward[:, None], 0.0)
    count = tl.sum(counts, 1)
    mean = tl.sum(differences, 1) / tl.maximum(count, 1.0)  # of the group, less the row's own reward
    advantage = -mean
    others = tl.maximum(count - 1.0, 1.0)
    if ESTIMATOR == "grpo":
        squares = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
        for block in range(begin, end, BLOCK_J):
            other, same = _others(rewards_ptr, groups_ptr, order_ptr, group, block, end, BLOCK_J)
            centred = other[None, :] - reward[:, None] - mean[:, None]
            squares += tl.where(same, centred * centred, 0.0)
        advantage = advantage / (tl.sqrt(tl.sum(squares, 1) / others) + eps)
    elif ESTIMATOR == "rloo":
        advantage = advantage * (count / others)
    tl.store(out_ptr + target, tl.where(count > 1.0, advantage, 0.0), mask=i < rows)


@triton.jit
def _others(rewards_ptr, groups_ptr, order_ptr, group, block, end, BLOCK_J: tl.constexpr):
    """Rewards [J] of a block, and which of them belong to which row's group [I, J]."""
    j = block + tl.arange(0, BLOCK_J)
    source = j
    if order_ptr is not None:
        source = tl.load(order_ptr + j, mask=j < end, other=0)
    other = tl.load(rewards_ptr + source, mask=j < end, other=0.0).to(tl.float32)
    same = (group[:, None] == tl.load(groups_ptr + j, mask=j < end, other=0)[None, :]) & (j < end)[None, :]
    return other, same


def _fake_group_advantages(rewards: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(rewards, dtype=torch.float32)


@operator(
    "group_advantages(Tensor rewards, Tensor group_ids, str estimator, float eps, str backend) -> Tensor",
    _fake_group_advantages,
)
def _group_advantages(
    rewards_B: torch.Tensor, groups_B: torch.Tensor, estimator: str, eps: float, backend: str
) -> torch.Tensor:
    """Advantages [B] in fp32."""
    if backend == "torch":
        return reference.group_advantages(rewards_B, groups_B, estimator=estimator, eps=eps).float()
    order_B, block_j = None, BLOCK_J
    if len(rewards_B) >= _SORT_FROM:
        groups_B, order_B = groups_B.sort(stable=True)
        block_j = SORTED_BLOCK_J
    out_B = torch.empty_like(rewards_B, dtype=torch.float32)
    group_advantages_kernel[(ceil_div(len(rewards_B), BLOCK_I),)](
        rewards_B,
        groups_B,
        order_B,
        out_B,
        len(rewards_B),
        eps,
        ESTIMATOR=estimator,
        BLOCK_I=BLOCK_I,
        BLOCK_J=block_j,
        num_warps=ADVANTAGE_WARPS,
    )
    return out_B


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
    choose("estimator", estimator, ESTIMATORS)
    if not isinstance(group_ids, torch.Tensor):
        raise ValueError(
            f"group_ids must be an integer tensor, got {type(group_ids).__name__}; number names first, for example: "
            "names = {uid: n for n, uid in enumerate(dict.fromkeys(uids))}; torch.tensor([names[uid] for uid in uids])"
        )
    if rewards.dim() != 1 or group_ids.shape != rewards.shape:
        raise ValueError(
            f"rewards and group_ids must both have shape (B,), got {tuple(rewards.shape)} and {tuple(group_ids.shape)}"
        )
    if group_ids.is_floating_point() or group_ids.device != rewards.device:
        raise ValueError(f"group_ids must be integers on {rewards.device}, got {group_ids.dtype} on {group_ids.device}")
    if not eps > 0:
        raise ValueError(f"eps={eps} must be positive")
    if not rewards.is_floating_point():
        rewards = rewards.float()
    chosen = resolve_backend(backend, rewards) if len(rewards) else "torch"
    if chosen == "triton":
        check_kernel_dtype(rewards=rewards)
    return _group_advantages(rewards.detach().contiguous(), group_ids.contiguous(), estimator, eps, chosen)


@triton.jit
def _taken(x, index, lane):
    """x[index]; before triton 3.3, which has an instruction for it, by comparison of all with all."""
    if _HAS_GATHER:
        return tl.gather(x, index, 0)
    return tl.sum(tl.where(index[:, None] == lane[None, :], x[None, :], 0.0), 1)


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
    return tl.reshape(tl.join(tl.join(x0, x2), tl.join(x1, x3)), [LANES, 4])


@triton.jit
def _four_steps(begin, end, LANES: tl.constexpr, EVEN: tl.constexpr):
    """Each lane's four steps from ``begin`` on, and which lie before ``end``; EVEN: all of a lane's or none."""
    lane = begin + tl.arange(0, LANES) * 4
    t = lane[:, None] + tl.arange(0, 4)[None, :]
    inside = t < end
    if EVEN:
        inside = tl.broadcast_to((lane < end)[:, None], [LANES, 4])
    return t, inside


@triton.jit
def _steps(rewards_ptr, values_ptr, mask_ptr, row, begin, end, LANES: tl.constexpr, EVEN: tl.constexpr):
    """Rewards, values and what is not 0 where they count; nothing counts at or past the end."""
    t, inside = _four_steps(begin, end, LANES, EVEN)
    active = (tl.load(mask_ptr + row + t, mask=inside, other=0) != 0).to(tl.int8)
    reward = tl.load(rewards_ptr + row + t, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(values_ptr + row + t, mask=inside, other=0.0).to(tl.float32)
    return reward, value, active


@triton.jit
def _extended(a, b, c, e, f, reward, value, active, gamma, gamma_lam):
    """The map (a, b, c, e, f), and then an earlier step."""
    stepped = gamma_lam * c + (gamma * f + (reward - value))
    b = tl.where(active, gamma_lam * b + gamma * e, b)
    return (
        tl.where(active, gamma_lam * a, a),
        b,
        tl.where(active, stepped, c),
        tl.where(active, 0.0, e),
        tl.where(active, value, f),
    )


@triton.jit
def _lane_maps(reward, value, active, gamma, gamma_lam, LANES: tl.constexpr):
    """The map of each lane's four steps together."""
    r0, r1, r2, r3 = _quarters(reward, LANES)
    v0, v1, v2, v3 = _quarters(value, LANES)
    m0, m1, m2, m3 = _quarters(active, LANES)
    last = m3 != 0
    a, b = tl.where(last, gamma_lam, 1.0), tl.where(last, gamma, 0.0)
    c, e, f = tl.where(last, r3 - v3, 0.0), tl.where(last, 0.0, 1.0), tl.where(last, v3, 0.0)
    a, b, c, e, f = _extended(a, b, c, e, f, r2, v2, m2 != 0, gamma, gamma_lam)
    a, b, c, e, f = _extended(a, b, c, e, f, r1, v1, m1 != 0, gamma, gamma_lam)
    return _extended(a, b, c, e, f, r0, v0, m0 != 0, gamma, gamma_lam)


@triton.jit
def _step(reward, value, active, advantage, next_value, gamma, gamma_lam):
    """The state before a step, from that after it."""
    stepped = reward - value + gamma * next_value + gamma_lam * advantage
    return tl.where(active, stepped, advantage), tl.where(active, value, next_value)


@triton.jit
def gae_kernel(
    rewards_ptr,
    values_ptr,
    mask_ptr,
    advantages_ptr,
    returns_ptr,
    steps,
    gamma,
    gamma_lam,
    LANES: tl.constexpr,
    EVEN: tl.constexpr,
):
    BLOCK: tl.constexpr = LANES * 4
    row = tl.program_id(0).to(tl.int64) * steps
    lane = tl.arange(0, LANES)
    right = tl.minimum(lane + 1, LANES - 1)
    advantage_carry = tl.zeros([LANES], tl.float32)
    value_carry = tl.zeros([LANES], tl.float32)
    blocks = tl.cdiv(steps, BLOCK)
    following = (blocks - 1) * BLOCK
    next_reward, next_step_value, next_active = _steps(
        rewards_ptr, values_ptr, mask_ptr, row, following, steps, LANES, EVEN
    )
    for block in range(0, blocks):
        begin = (blocks - 1 - block) * BLOCK
        reward, value, active = next_reward, next_step_value, next_active
        following = tl.maximum(begin - BLOCK, 0)  # nothing lies before the first block's begin
        next_reward, next_step_value, next_active = _steps(
            rewards_ptr, values_ptr, mask_ptr, row, following, begin, LANES, EVEN
        )
        maps = _lane_maps(reward, value, active, gamma, gamma_lam, LANES)
        a, b, c, e, f = tl.associative_scan(maps, 0, _compose, reverse=True)
        # The state before each lane's steps is that after the steps of the lane to the right.
        advantage_left = a * advantage_carry + b * value_carry + c
        value_left = e * value_carry + f
        advantage = tl.where(lane == LANES - 1, advantage_carry, _taken(advantage_left, right, lane))
        next_value = tl.where(lane == LANES - 1, value_carry, _taken(value_left, right, lane))
        advantage_carry = _taken(advantage_left, lane * 0, lane)
        value_carry = _taken(value_left, lane * 0, lane)
        r0, r1, r2, r3 = _quarters(reward, LANES)
        v0, v1, v2, v3 = _quarters(value, LANES)
        m0, m1, m2, m3 = _quarters(active, LANES)
        a3, next_value = _step(r3, v3, m3 != 0, advantage, next_value, gamma, gamma_lam)
        a2, next_value = _step(r2, v2, m2 != 0, a3, next_value, gamma, gamma_lam)
        a1, next_value = _step(r1, v1, m1 != 0, a2, next_value, gamma, gamma_lam)
        a0, next_value = _step(r0, v0, m0 != 0, a1, next_value, gamma, gamma_lam)
        advantage = _whole(a0, a1, a2, a3, LANES)
        value = tl.where((active != 0) | (value == value), value, 0.0)
        t, inside = _four_steps(begin, steps, LANES, EVEN)
        tl.store(advantages_ptr + row + t, advantage, mask=inside)
        tl.store(returns_ptr + row + t, advantage + value, mask=inside)


def _fake_gae(rewards: torch.Tensor, values: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.float32
    return torch.empty_like(rewards, dtype=dtype), torch.empty_like(rewards, dtype=dtype)


@operator(
    "gae(Tensor rewards, Tensor values, Tensor mask, float gamma, float lam, str backend) -> (Tensor, Tensor)",
    _fake_gae,
)
def _gae(
    rewards_BT: torch.Tensor, values_BT: torch.Tensor, mask_BT: torch.Tensor, gamma: float, lam: float, backend: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns [B, T] in fp32."""
    if backend == "torch":
        outputs = reference.gae(rewards_BT, values_BT, mask_BT, gamma=gamma, lam=lam)
        return outputs[0].float(), outputs[1].float()
    sequences, steps = rewards_BT.shape
    advantages_BT = torch.empty_like(rewards_BT, dtype=torch.float32)
    returns_BT = torch.empty_like(advantages_BT)
    gae_kernel[(sequences,)](
        rewards_BT,
        values_BT,
        mask_BT.view(torch.uint8) if mask_BT.dtype == torch.bool else mask_BT,
        advantages_BT,
        returns_BT,
        steps,
        gamma,
        gamma * lam,
        LANES=min(BLOCK_T, max(16, next_power_of_2(steps))) // 4,
        EVEN=steps % 4 == 0,
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
    chosen = resolve_backend(backend, rewards) if rewards.numel() else "torch"
    if chosen == "triton":
        check_kernel_dtype(rewards=rewards, values=values)
    dense = (x.detach().contiguous() for x in (rewards, values, mask))
    return _gae(*dense, gamma, lam, chosen)
