"""Plain PyTorch definitions of the losses: what their kernels are tested against, and the CPU backend.

They compute in float64 for float64 inputs and in float32 otherwise, and autograd differentiates them.

Legend: B sequences, T steps.
"""

from __future__ import annotations

import math

import torch

from ctrl_kernels.options import K3_LIMIT, LEAST_LOGPROB, LOG_RATIO_LIMIT, Aggregation, PolicyOptions, compute_dtype


def _clamped(x: torch.Tensor, limit: float) -> torch.Tensor:
    """``x`` between -limit and limit, without gradient outside; NaN stays NaN, in the gradient too."""
    return torch.where(x.isnan(), x, x.clamp(-limit, limit))


def _kl(logprobs_BT: torch.Tensor, ref_BT: torch.Tensor, estimator: str) -> torch.Tensor:
    """An estimate of KL(policy || reference) a token (Schulman 2020, "Approximating KL divergence")."""
    log_ratio_BT = _clamped(logprobs_BT - ref_BT.clamp_min(LEAST_LOGPROB), LOG_RATIO_LIMIT)
    if estimator == "k1":
        return log_ratio_BT
    if estimator == "k2":
        return 0.5 * log_ratio_BT.square()
    return _clamped((-log_ratio_BT).exp() + log_ratio_BT - 1, K3_LIMIT)


def _token_weights(
    active_BT: torch.Tensor, count_B1: torch.Tensor, denominator: float | torch.Tensor | None, options: PolicyOptions
) -> torch.Tensor:
    """What each token counts for in the loss; zero at masked ones and, with nothing to count, everywhere."""
    weights_BT = active_BT.to(count_B1.dtype)
    if denominator is None:
        counted = count_B1 if options.aggregation == "token-mean" else (count_B1 > 0).to(count_B1.dtype)
        denominator = counted.sum().clamp_min(1)
    if options.aggregation == "seq-mean-token-mean":
        weights_BT = weights_BT / count_B1.clamp_min(1)
    if isinstance(denominator, torch.Tensor):
        denominator = denominator.detach().to(weights_BT.dtype).reshape(())
        return torch.where(denominator > 0, weights_BT / denominator, 0.0)
    return weights_BT / denominator


def _sequence_ratio(
    log_ratio_BT: torch.Tensor, advantages_BT: torch.Tensor, count_B1: torch.Tensor, options: PolicyOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each sequence's ratio, and where GMPO's clipping stopped the gradient."""
    clipped_BT = torch.zeros_like(log_ratio_BT, dtype=torch.bool)
    if options.objective == "gmpo":
        bounded_BT = log_ratio_BT.clamp(-options.clip_low, options.clip_high)
        sign_BT = advantages_BT.sign()
        clipped_BT = sign_BT * log_ratio_BT > sign_BT * bounded_BT
        log_ratio_BT = sign_BT * torch.where(clipped_BT, sign_BT * bounded_BT, sign_BT * log_ratio_BT)
    mean_B1 = log_ratio_BT.sum(1, keepdim=True) / count_B1.clamp_min(1)
    return mean_B1.exp().expand_as(log_ratio_BT), clipped_BT


def _surrogate(
    logprobs_BT: torch.Tensor,
    old_BT: torch.Tensor,
    advantages_BT: torch.Tensor,
    ratio_BT: torch.Tensor,
    options: PolicyOptions,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What multiplies -w A in a token's term, and where clipping and dual clipping act; for all but GMPO."""
    rises_BT, low, high = advantages_BT > 0, options.clip_low, options.clip_high
    none_BT = torch.zeros_like(rises_BT)
    if options.objective == "sapo":
        tau_BT = torch.where(rises_BT, options.tau_positive, options.tau_negative)
        return torch.sigmoid(tau_BT * (ratio_BT - 1)) * 4 / tau_BT, none_BT, none_BT
    logprobs_BT = torch.where(logprobs_BT == -math.inf, LEAST_LOGPROB, logprobs_BT)
    if options.objective == "cispo":
        bounded_BT = ratio_BT.detach().clamp(1 - low, 1 + high)
        return bounded_BT * logprobs_BT, bounded_BT != ratio_BT, none_BT
    if options.objective in ("dppo_tv", "dppo_kl"):
        p_BT, q_BT = logprobs_BT.detach().exp(), old_BT.exp()
        if options.objective == "dppo_tv":
            clipped_BT = torch.where(rises_BT, p_BT - q_BT > high, q_BT - p_BT > low)
        else:
            rest_BT = ((1 - q_BT + 1e-8) / (1 - p_BT + 1e-8)).log()
            divergence_BT = q_BT * (old_BT - logprobs_BT.detach()) + (1 - q_BT) * rest_BT
            up_BT, down_BT = (divergence_BT > high) & (p_BT > q_BT), (divergence_BT > low) & (p_BT < q_BT)
            clipped_BT = torch.where(rises_BT, up_BT, down_BT)
        capped_BT = ratio_BT.detach().clamp(max=options.ratio_cap) if options.ratio_cap else ratio_BT.detach()
        return torch.where(clipped_BT, 0.0, capped_BT * logprobs_BT), clipped_BT, none_BT
    # min(A r, A clip(r)) differs from A r exactly where the ratio left the interval in the direction A rewards.
    over_BT, under_BT = rises_BT & (ratio_BT > 1 + high), (advantages_BT < 0) & (ratio_BT < 1 - low)
    bounded_BT = torch.where(over_BT, 1 + high, torch.where(under_BT, 1 - low, ratio_BT))
    dual_BT = none_BT
    if options.dual_clip is not None:
        dual_BT = (advantages_BT < 0) & (ratio_BT > options.dual_clip)
        bounded_BT = torch.where(dual_BT, options.dual_clip, bounded_BT)
    return bounded_BT, over_BT | under_BT, dual_BT


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    options: PolicyOptions,
    *,
    ref_logprobs: torch.Tensor | None = None,
    importance_weights: torch.Tensor | None = None,
    drift_weights: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    denominator: float | torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and its metrics, as ``ctrl_kernels.policy_loss`` defines them: autograd differentiates it."""
    dtype = compute_dtype(logprobs, old_logprobs, advantages)
    active_BT = mask != 0

    def active(tensor: torch.Tensor, *, constant: bool = True) -> torch.Tensor:
        return torch.where(active_BT, (tensor.detach() if constant else tensor).to(dtype), 0.0)

    count_B1 = active_BT.sum(1, keepdim=True).to(dtype)
    logprobs_BT, advantages_BT = active(logprobs, constant=False), active(advantages)
    old_BT = active(old_logprobs).clamp_min(LEAST_LOGPROB)
    log_ratio_BT = _clamped(logprobs_BT - old_BT, LOG_RATIO_LIMIT)
    ratio_BT = log_ratio_BT.exp()
    geometric_BT = torch.zeros_like(active_BT)
    if options.by_sequence:
        ratio_BT, geometric_BT = _sequence_ratio(log_ratio_BT, advantages_BT, count_B1, options)
    if options.ratio == "sequence-token":
        ratio_BT = ratio_BT.detach() * (log_ratio_BT - log_ratio_BT.detach()).exp()
    if options.objective == "gmpo":
        factor_BT, clipped_BT, dual_BT = ratio_BT, geometric_BT, torch.zeros_like(geometric_BT)
    else:
        factor_BT, clipped_BT, dual_BT = _surrogate(logprobs_BT, old_BT, advantages_BT, ratio_BT, options)
    surrogate_BT = -advantages_BT * factor_BT
    if drift_weights is not None:
        surrogate_BT = surrogate_BT + active(drift_weights) * log_ratio_BT.abs()
    if importance_weights is not None:
        surrogate_BT = surrogate_BT * active(importance_weights)
    weights_BT = _token_weights(active_BT, count_B1, denominator, options)
    loss = policy_term = (surrogate_BT * weights_BT).sum()
    kl_BT = entropy_BT = torch.zeros_like(logprobs_BT)
    if ref_logprobs is not None:
        kl_BT = _kl(logprobs_BT, active(ref_logprobs), options.kl_estimator) * active_BT
        if options.kl_coef != 0:
            corrected_BT = kl_BT * ratio_BT if options.kl_correction else kl_BT
            loss = loss + options.kl_coef * (corrected_BT * weights_BT).sum()
    if entropy is not None:
        entropy_BT = active(entropy, constant=False)
        if options.entropy_coef != 0:
            loss = loss - options.entropy_coef * (entropy_BT * weights_BT).sum()
    with torch.no_grad():
        tokens = count_B1.sum()
        sums = [
            x.to(dtype).sum()
            for x in (clipped_BT & active_BT, dual_BT, -log_ratio_BT, ratio_BT * active_BT, kl_BT, entropy_BT)
        ]
        names = ("clip_fraction", "dual_clip_fraction", "approx_kl", "ratio", "kl", "entropy")
        metrics = {name: total / tokens.clamp_min(1) for name, total in zip(names, sums, strict=True)}
    return loss, {"policy_loss": policy_term.detach(), "tokens": tokens, **metrics}


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip: float | None,
    aggregation: Aggregation,
    denominator: float | torch.Tensor | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and its metrics, as ``ctrl_kernels.value_loss`` defines them: autograd differentiates it."""
    dtype = compute_dtype(values, old_values, returns)
    active_BT = mask != 0
    values_BT, old_BT, returns_BT = (torch.where(active_BT, x.to(dtype), 0.0) for x in (values, old_values, returns))
    square_BT = (values_BT - returns_BT.detach()).square()
    worse_BT = square_BT
    if clip is not None:
        bounded_BT = values_BT.clamp(old_BT.detach() - clip, old_BT.detach() + clip)
        bounded_square_BT = (bounded_BT - returns_BT.detach()).square()
        worse_BT = torch.where(bounded_square_BT > square_BT, bounded_square_BT, square_BT)
    count_B1 = active_BT.sum(1, keepdim=True).to(dtype)
    weights_BT = _token_weights(active_BT, count_B1, denominator, PolicyOptions(aggregation=aggregation))
    loss = 0.5 * (worse_BT * weights_BT).sum()
    tokens = count_B1.sum()
    means = [x.detach().to(dtype).sum() / tokens.clamp_min(1) for x in (worse_BT > square_BT, square_BT)]
    return loss, {"tokens": tokens, "clip_fraction": means[0], "error": means[1]}
