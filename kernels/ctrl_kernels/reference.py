"""Plain PyTorch definitions of everything here: what the kernels are tested against, and the CPU backend.

They compute in float64 for float64 inputs and in float32 otherwise. The log-prob functions walk over the tokens in
chunks, so that N x V scores never exist in that precision at once (unless they fit in one chunk), and exchange 16
bytes a token and rank in one collective.

Legend: N tokens, n tokens of a chunk, V columns of this rank's vocabulary shard, D hidden width, B sequences, T
steps, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from ctrl_kernels.backend import compute_dtype
from ctrl_kernels.reference_loss import policy_loss
from ctrl_kernels.shard import FLOOR, SoftmaxOptions, combine_statistics, gather_statistics

__all__ = ["gae", "group_advantages", "linear_token_logprobs", "policy_loss", "token_logprobs"]

CHUNK_ELEMENTS = 1 << 22  # 16 MiB of float32: small models take one chunk, large ones stay in the cache's reach


def _chunks(tokens: int, columns: int) -> Iterator[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, columns))
    return (slice(begin, min(begin + step, tokens)) for begin in range(0, tokens, step))


def scores(logits: torch.Tensor, options: SoftmaxOptions) -> torch.Tensor:
    """``softcap * tanh(logits / softcap) / temperature``; returns ``logits`` itself where that is the identity."""
    if options.softcap is not None:
        logits = torch.tanh(logits / options.softcap) * options.softcap
    return logits if options.temperature == 1.0 else logits / options.temperature


def shard_statistics(scores_nV: torch.Tensor, targets_n: torch.Tensor, options: SoftmaxOptions) -> torch.Tensor:
    """(max, sum, weighted, target) of a chunk [1, n, 4], as ``ctrl_kernels.shard`` defines them."""
    statistics_n4 = scores_nV.new_empty((len(scores_nV), 4))
    if scores_nV.shape[1] == 0:
        return statistics_n4.copy_(scores_nV.new_tensor([-math.inf, 0.0, 0.0, math.nan])).unsqueeze(0)
    max_n1 = scores_nV.amax(1, keepdim=True)
    shifted_nV = scores_nV - torch.where(max_n1 == -math.inf, 0.0, max_n1)
    weights_nV = shifted_nV.exp()
    local_n = targets_n.to(torch.int64) - options.start
    held_n = (local_n >= 0) & (local_n < scores_nV.shape[1])
    target_n = scores_nV.gather(1, torch.where(held_n, local_n, 0).unsqueeze(1)).squeeze(1)
    statistics_n4[:, 0] = max_n1.squeeze(1)
    statistics_n4[:, 1] = weights_nV.sum(1)
    statistics_n4[:, 2] = weights_nV.mul_(shifted_nV.clamp_min_(FLOOR)).sum(1)
    statistics_n4[:, 3] = torch.where(held_n, target_n, math.nan)
    return statistics_n4.unsqueeze(0)


def logits_gradient(
    logits_nV: torch.Tensor,
    targets_n: torch.Tensor,
    lse_n: torch.Tensor,
    entropy_n: torch.Tensor,
    d_logprob_n: torch.Tensor | None,
    d_entropy_n: torch.Tensor | None,
    options: SoftmaxOptions,
) -> torch.Tensor:
    """The gradient of a chunk's logits [n, V]: ``(g (1[j = target] - p_j) - h p_j (log p_j + H)) / temperature``.

    g and h are the gradients of the log-prob and the entropy H; either may be absent. A row of -inf alone has no
    gradient.
    """
    if d_logprob_n is not None:
        d_logprob_n = torch.where(lse_n == math.inf, 0.0, d_logprob_n)
    scores_nV = scores(logits_nV, options)
    logp_nV = scores_nV - lse_n.unsqueeze(1)
    gradient_nV = logp_nV.exp()
    if d_entropy_n is not None:
        logp_nV = logp_nV.clamp_min_(FLOOR).add_(entropy_n.unsqueeze(1)).mul_(d_entropy_n.unsqueeze(1))
        if d_logprob_n is not None:
            logp_nV += d_logprob_n.unsqueeze(1)
        gradient_nV.mul_(logp_nV).neg_()
    elif d_logprob_n is not None:
        gradient_nV.mul_(-d_logprob_n.unsqueeze(1))
    if d_logprob_n is not None and gradient_nV.shape[1]:
        local_n = targets_n.to(torch.int64) - options.start
        held_n = (local_n >= 0) & (local_n < gradient_nV.shape[1])
        at_target_n = torch.where(held_n, d_logprob_n, 0.0)
        gradient_nV.scatter_add_(1, torch.where(held_n, local_n, 0).unsqueeze(1), at_target_n.unsqueeze(1))
    if options.softcap is not None:
        gradient_nV.mul_(1 - torch.tanh(logits_nV / options.softcap).square_())
    return gradient_nV if options.temperature == 1.0 else gradient_nV.div_(options.temperature)


def _upstream(gradient: torch.Tensor | None, kept: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """An upstream gradient at the kept tokens, zero elsewhere whatever it holds there."""
    return None if gradient is None else torch.where(kept, gradient.to(dtype), 0.0)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, options: SoftmaxOptions) -> Any:
        dtype = compute_dtype(logits)
        statistics = logits.new_empty((1, len(logits), 4), dtype=dtype)
        for rows in _chunks(*logits.shape):
            scores_nV = scores(logits[rows, : options.valid].to(dtype), options)
            statistics[:, rows] = shard_statistics(scores_nV, targets[rows], options)
        logprob, entropy, lse = combine_statistics(gather_statistics(statistics, options))
        kept = targets != options.ignore_index
        logprob, entropy = torch.where(kept, logprob, 0.0), torch.where(kept, entropy, 0.0)
        ctx.save_for_backward(logits, targets, lse, entropy)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, d_logprob: torch.Tensor | None, d_entropy: torch.Tensor | None) -> Any:
        logits, targets, lse, entropy = ctx.saved_tensors
        options: SoftmaxOptions = ctx.options
        if d_logprob is None and d_entropy is None:
            return None, None, None
        kept = targets != options.ignore_index
        lse = torch.where(kept, lse, math.inf)
        d_logprob, d_entropy = (_upstream(g, kept, lse.dtype) for g in (d_logprob, d_entropy))
        gradient = torch.zeros_like(logits, memory_format=torch.contiguous_format)
        for rows in _chunks(*logits.shape):
            gradient[rows, : options.valid] = logits_gradient(
                logits[rows, : options.valid].to(lse.dtype),
                targets[rows],
                lse[rows],
                entropy[rows],
                None if d_logprob is None else d_logprob[rows],
                None if d_entropy is None else d_entropy[rows],
                options,
            )
        return gradient.masked_fill_(~kept.unsqueeze(1), 0.0), None, None


def token_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, options: SoftmaxOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies [N] of ``targets`` [N] under ``logits`` [N, V]; both 0 at ignored targets."""
    return _TokenLogprobs.apply(logits, targets, options)


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        options: SoftmaxOptions,
        save_logits: bool | None,
        main_grad: torch.Tensor | None,
    ) -> Any:
        dtype = compute_dtype(hidden, weight)
        kept = (targets != options.ignore_index).nonzero().squeeze(1)
        hidden_ND = hidden.index_select(0, kept).to(dtype)
        weight_VD = weight[: options.valid].to(dtype)
        kept_targets = targets[kept]
        statistics = hidden_ND.new_empty((1, len(kept), 4))
        if save_logits is None:
            save_logits = len(kept) * options.valid <= CHUNK_ELEMENTS
        saved_logits = []
        for rows in _chunks(len(kept), options.valid):
            logits_nV = hidden_ND[rows] @ weight_VD.T
            statistics[:, rows] = shard_statistics(scores(logits_nV, options), kept_targets[rows], options)
            if save_logits and any(ctx.needs_input_grad):
                saved_logits.append(logits_nV)
        kept_logprob, kept_entropy, lse = combine_statistics(gather_statistics(statistics, options))
        logprob = statistics.new_zeros(len(targets)).index_copy_(0, kept, kept_logprob)
        entropy = statistics.new_zeros(len(targets)).index_copy_(0, kept, kept_entropy)
        ctx.save_for_backward(hidden, weight, targets, kept, lse, kept_entropy, *saved_logits)
        ctx.options, ctx.main_grad = options, main_grad
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, d_logprob: torch.Tensor | None, d_entropy: torch.Tensor | None) -> Any:
        hidden, weight, targets, kept, lse, entropy, *saved_logits = ctx.saved_tensors
        options: SoftmaxOptions = ctx.options
        if d_logprob is None and d_entropy is None:
            return (None,) * 6
        d_logprob, d_entropy = (None if g is None else g[kept].to(lse.dtype) for g in (d_logprob, d_entropy))
        hidden_ND, weight_VD = hidden.index_select(0, kept).to(lse.dtype), weight[: options.valid].to(lse.dtype)
        d_hidden_ND = torch.zeros_like(hidden_ND)
        d_weight = torch.zeros_like(weight, dtype=lse.dtype)
        for index, rows in enumerate(_chunks(len(kept), options.valid)):
            d_logits_nV = logits_gradient(
                saved_logits[index] if saved_logits else hidden_ND[rows] @ weight_VD.T,
                targets[kept[rows]],
                lse[rows],
                entropy[rows],
                None if d_logprob is None else d_logprob[rows],
                None if d_entropy is None else d_entropy[rows],
                options,
            )
            if ctx.needs_input_grad[0]:
                torch.mm(d_logits_nV, weight_VD, out=d_hidden_ND[rows])
            if ctx.needs_input_grad[1]:
                d_weight[: options.valid].addmm_(d_logits_nV.T, hidden_ND[rows])
        d_hidden = None
        if ctx.needs_input_grad[0]:
            if options.ranks > 1:
                dist.all_reduce(d_hidden_ND, group=options.group)
            d_hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
            d_hidden.index_copy_(0, kept, d_hidden_ND.to(hidden.dtype))
        if ctx.main_grad is not None:
            ctx.main_grad += d_weight
        returned = ctx.needs_input_grad[1] and ctx.main_grad is None
        return d_hidden, d_weight.to(weight.dtype) if returned else None, None, None, None, None


def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    options: SoftmaxOptions,
    save_logits: bool | None = None,
    main_grad: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies [N] of ``targets`` [N] under the logits ``hidden`` [N, D] @ ``weight`` [V, D].T.

    The gradient of ``hidden`` is summed over the group's ranks. ``save_logits`` None keeps the logits for the backward
    pass if they fit in one chunk. ``main_grad``, if given, takes the weight's gradient in addition to what it holds.
    """
    return _LinearTokenLogprobs.apply(hidden, weight, targets, options, save_logits, main_grad)


def group_advantages(
    rewards: torch.Tensor, group_ids: torch.Tensor, *, estimator: str = "grpo", eps: float = 1e-6
) -> torch.Tensor:
    """Group-relative advantages [B] of ``rewards`` [B]; formulas in ``ctrl_kernels.advantages``.

    Sums run in float64, where the mean of equal float32 rewards is exact: a group without variance gets exactly 0.
    """
    _, group_B = torch.unique(group_ids, return_inverse=True)
    rewards_B = rewards.double()
    count_B = torch.bincount(group_B).double()[group_B]
    zeros_G = rewards_B.new_zeros(len(rewards_B))
    mean_B = zeros_G.index_add(0, group_B, rewards_B)[group_B] / count_B
    centred_B = torch.where(count_B == 1, 0.0, rewards_B - mean_B)
    if estimator == "grpo":
        squares_B = zeros_G.index_add(0, group_B, centred_B.square())[group_B]
        centred_B = centred_B / ((squares_B / (count_B - 1).clamp_min(1)).sqrt() + eps)
    elif estimator == "rloo":
        centred_B = centred_B * count_B / (count_B - 1).clamp_min(1)
    return centred_B.to(compute_dtype(rewards))


def gae(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, *, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns [B, T] by the reverse recurrence that ``ctrl_kernels.generalized_advantage`` states."""
    dtype = compute_dtype(rewards, values)
    active_BT = mask != 0
    rewards_BT = torch.where(active_BT, rewards.to(dtype), 0.0)
    values_BT = torch.where(active_BT | ~values.isnan(), values.to(dtype), 0.0)
    advantages_BT = torch.empty_like(values_BT)
    carried_B = values_BT.new_zeros(len(values_BT))
    next_value_B = values_BT.new_zeros(len(values_BT))
    for t in range(values_BT.shape[1] - 1, -1, -1):
        active_B, value_B = active_BT[:, t], values_BT[:, t]
        advantage_B = rewards_BT[:, t] + gamma * next_value_B - value_B + gamma * lam * carried_B
        carried_B = torch.where(active_B, advantage_B, carried_B)
        next_value_B = torch.where(active_B, value_B, next_value_B)
        advantages_BT[:, t] = carried_B
    return advantages_BT, advantages_BT + values_BT
