"""Plain PyTorch definitions of log-probs and advantages: what the kernels are tested against, and the CPU backend.

They compute in float64 for float64 inputs and in float32 otherwise. The log-prob functions walk over the tokens in
chunks, so that N x V scores never exist in that precision at once (unless they fit in one chunk), and exchange 16
bytes a token and rank in one collective.

Legend: N tokens, n tokens of a chunk, V columns of this rank's vocabulary shard, D hidden width, B sequences, T
steps, G groups.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.distributed as dist

from ctrl_kernels.options import FLOOR, Shard, compute_dtype
from ctrl_kernels.softmax_statistics import gather_statistics

CHUNK_ELEMENTS = 1 << 22  # 16 MiB of float32: small models take one chunk, large ones stay in the cache's reach
PRODUCT_ROWS = 256  # of a product with a large vocabulary's weights at least, which are read again for each chunk


def _chunks(tokens: int, columns: int, least: int = 1) -> Iterator[slice]:
    step = max(least, CHUNK_ELEMENTS // max(1, columns))
    return (slice(begin, min(begin + step, tokens)) for begin in range(0, tokens, step))


def scores(logits: torch.Tensor, options: Shard) -> torch.Tensor:
    """``softcap * tanh(logits / softcap) / temperature``; returns ``logits`` itself where that is the identity."""
    if options.softcap > 0:
        logits = torch.tanh(logits / options.softcap) * options.softcap
    return logits if options.temperature == 1.0 else logits / options.temperature


def _shard_statistics(scores_nV: torch.Tensor, targets_n: torch.Tensor, options: Shard) -> torch.Tensor:
    """(max, sum, weighted, target) of a chunk [1, n, 4], as ``ctrl_kernels.softmax_statistics`` defines them."""
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
    options: Shard,
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
    if options.softcap > 0:
        gradient_nV.mul_(1 - torch.tanh(logits_nV / options.softcap).square_())
    return gradient_nV if options.temperature == 1.0 else gradient_nV.div_(options.temperature)


def _upstream(gradient: torch.Tensor | None, kept: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """An upstream gradient at the kept tokens, zero elsewhere whatever it holds there."""
    return None if gradient is None else torch.where(kept, gradient.to(dtype), 0.0)


def combine_statistics(statistics_PN4: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs, entropies and log-sum-exps [N] of a whole vocabulary from the statistics of its parts.

    A target that no part holds gives a NaN log-prob and log-sum-exp, so that its gradient is NaN too: loud, and
    without waiting for the device. A row of -inf alone gives log-prob -inf, entropy 0 and log-sum-exp +inf, so that
    its gradient is 0.
    """
    max_PN, sum_PN, weighted_PN, target_PN = statistics_PN4.unbind(2)
    max_N = max_PN.amax(0)
    max_N = torch.where(max_N == -math.inf, 0.0, max_N)
    shift_PN = (max_PN - max_N).clamp_min(FLOOR)
    scale_PN = shift_PN.exp()
    sum_N = (sum_PN * scale_PN).sum(0)
    weighted_N = ((weighted_PN + sum_PN * shift_PN) * scale_PN).sum(0)
    held_PN = ~target_PN.isnan()
    held_N = held_PN.any(0)
    target_N = torch.where(held_PN, target_PN, 0.0).sum(0)
    empty_N = sum_N == 0
    log_sum_N = sum_N.log()
    lse_N = max_N + log_sum_N
    logprob_N = torch.where(held_N, torch.where(empty_N, -math.inf, (target_N - max_N) - log_sum_N), math.nan)
    entropy_N = torch.where(empty_N, 0.0, log_sum_N - weighted_N / sum_N)
    lse_N = torch.where(held_N, torch.where(empty_N, math.inf, lse_N), math.nan)
    return logprob_N, entropy_N, lse_N


def logprobs_forward(
    logits: torch.Tensor, targets: torch.Tensor, options: Shard
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs, entropies and log-sum-exps [N] of ``targets`` [N] under ``logits`` [N, V].

    At ignored targets, whose rows are not read, the first two are 0 and the third is +inf.
    """
    dtype = compute_dtype(logits)
    kept = (targets != options.ignore_index).nonzero().squeeze(1)
    targets_M = targets[kept]
    statistics = logits.new_empty((1, len(kept), 4), dtype=dtype)
    for rows in _chunks(len(kept), logits.shape[1]):
        scores_nV = scores(_rows(logits, kept, rows)[:, : options.valid].to(dtype), options)
        statistics[:, rows] = _shard_statistics(scores_nV, targets_M[rows], options)
    return _spread(combine_statistics(gather_statistics(statistics, options)), kept, len(targets))


def _rows(x: torch.Tensor, kept: torch.Tensor, chunk: slice) -> torch.Tensor:
    """A chunk of the rows that are kept: a view where these are all."""
    return x[chunk] if len(kept) == len(x) else x[kept[chunk]]


def _spread(outputs: tuple[torch.Tensor, ...], kept: torch.Tensor, tokens: int) -> tuple[torch.Tensor, ...]:
    """Log-probs, entropies and log-sum-exps of the kept tokens among all."""
    fills = (0.0, 0.0, math.inf)
    return tuple(x.new_full((tokens,), f).index_copy_(0, kept, x) for x, f in zip(outputs, fills, strict=True))


def _with_gradient(
    targets: torch.Tensor,
    lse: torch.Tensor,
    d_logprob: torch.Tensor | None,
    d_entropy: torch.Tensor | None,
    options: Shard,
) -> torch.Tensor:
    """Indices of the tokens that are not ignored and get an upstream gradient, or are to be loudly NaN."""
    asked = lse.isnan()
    for gradient in (d_logprob, d_entropy):
        if gradient is not None:
            asked |= gradient != 0
    return (asked & (targets != options.ignore_index)).nonzero().squeeze(1)


def logprobs_backward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    entropy: torch.Tensor,
    lse: torch.Tensor,
    d_logprob: torch.Tensor | None,
    d_entropy: torch.Tensor | None,
    options: Shard,
) -> torch.Tensor:
    """The gradient of ``logits`` [N, V] from those of the log-probs and entropies [N]."""
    active = _with_gradient(targets, lse, d_logprob, d_entropy, options)
    gradient = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    for rows in _chunks(len(active), logits.shape[1]):
        chosen = active[rows]
        d_logits_nV = logits_gradient(
            _rows(logits, active, rows)[:, : options.valid].to(lse.dtype),
            targets[chosen],
            lse[chosen],
            entropy[chosen],
            None if d_logprob is None else d_logprob[chosen].to(lse.dtype),
            None if d_entropy is None else d_entropy[chosen].to(lse.dtype),
            options,
        )
        gradient[:, : options.valid].index_copy_(0, chosen, d_logits_nV.to(gradient.dtype))
    return gradient


def linear_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    options: Shard,
    saved_MV: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``logprobs_forward`` of the logits ``hidden`` [N, D] @ ``weight`` [V, D].T + ``bias`` [V].

    The logits of the tokens that are not ignored go to ``saved_MV``, if given.
    """
    dtype = compute_dtype(hidden, weight)
    kept = (targets != options.ignore_index).nonzero().squeeze(1)
    targets_M, weight_VD = targets[kept], weight[: options.valid].to(dtype)
    statistics = hidden.new_empty((1, len(kept), 4), dtype=dtype)
    for rows in _chunks(len(kept), options.valid, PRODUCT_ROWS):
        logits_nV = _linear(_rows(hidden, kept, rows).to(dtype), weight_VD, bias, options)
        if saved_MV is not None:
            saved_MV[rows] = logits_nV
        statistics[:, rows] = _shard_statistics(scores(logits_nV, options), targets_M[rows], options)
    return _spread(combine_statistics(gather_statistics(statistics, options)), kept, len(targets))


def _linear(
    hidden_nD: torch.Tensor, weight_VD: torch.Tensor, bias: torch.Tensor | None, options: Shard
) -> torch.Tensor:
    logits_nV = hidden_nD @ weight_VD.T
    return logits_nV if bias is None else logits_nV.add_(bias[: options.valid].to(logits_nV.dtype))


def linear_backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    entropy: torch.Tensor,
    lse: torch.Tensor,
    saved_MV: torch.Tensor | None,
    d_logprob: torch.Tensor | None,
    d_entropy: torch.Tensor | None,
    options: Shard,
    asked: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of ``hidden``, summed over the group's ranks, ``weight`` and ``bias``, in what is computed in.

    None for one that is not ``asked`` for.
    """
    dtype = lse.dtype
    active = _with_gradient(targets, lse, d_logprob, d_entropy, options)
    position = (targets != options.ignore_index).cumsum(0) - 1
    weight_VD = weight[: options.valid].to(dtype)
    contiguous = torch.contiguous_format
    d_hidden = torch.zeros_like(hidden, dtype=dtype, memory_format=contiguous) if asked[0] else None
    d_weight = torch.zeros_like(weight, dtype=dtype, memory_format=contiguous) if asked[1] else None
    d_bias = weight.new_zeros(len(weight), dtype=dtype) if asked[2] else None
    for rows in _chunks(len(active), options.valid, PRODUCT_ROWS):
        chosen = active[rows]
        hidden_nD = _rows(hidden, active, rows).to(dtype)
        d_logits_nV = logits_gradient(
            _linear(hidden_nD, weight_VD, bias, options) if saved_MV is None else saved_MV[position[chosen]],
            targets[chosen],
            lse[chosen],
            entropy[chosen],
            None if d_logprob is None else d_logprob[chosen].to(dtype),
            None if d_entropy is None else d_entropy[chosen].to(dtype),
            options,
        )
        if d_hidden is not None:
            d_hidden.index_copy_(0, chosen, d_logits_nV @ weight_VD)
        if d_weight is not None:
            d_weight[: options.valid].addmm_(d_logits_nV.T, hidden_nD)
        if d_bias is not None:
            d_bias[: options.valid] += d_logits_nV.sum(0)
    if options.ranks > 1 and d_hidden is not None:
        dist.all_reduce(d_hidden, group=options.process_group)
    return d_hidden, d_weight, d_bias


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
    """Advantages and returns [B, T] by the reverse recurrence that ``ctrl_kernels.advantages`` states."""
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
