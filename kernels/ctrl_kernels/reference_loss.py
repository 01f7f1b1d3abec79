"""The plain PyTorch definition of the clipped policy loss: autograd differentiates it as it stands.

Legend: B sequences, T steps.
"""

from __future__ import annotations

import torch

from ctrl_kernels.backend import compute_dtype
from ctrl_kernels.clipping import K3_LIMIT, LOG_RATIO_LIMIT, PolicyOptions


def _kl(logprobs_BT: torch.Tensor, ref_BT: torch.Tensor, estimator: str) -> torch.Tensor:
    """An estimate of KL(policy || reference) a token (Schulman 2020, "Approximating KL divergence")."""
    log_ratio_BT = (logprobs_BT - ref_BT).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if estimator == "k1":
        return log_ratio_BT
    if estimator == "k2":
        return 0.5 * log_ratio_BT.square()
    return ((-log_ratio_BT).exp() + log_ratio_BT - 1).clamp(-K3_LIMIT, K3_LIMIT)


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


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    options: PolicyOptions,
    *,
    ref_logprobs: torch.Tensor | None = None,
    importance_weights: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    denominator: float | torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss and its metrics, as ``ctrl_kernels.policy_loss`` defines them."""
    dtype = compute_dtype(logprobs, old_logprobs, advantages)
    active_BT = mask != 0

    def active(tensor: torch.Tensor, *, constant: bool = True) -> torch.Tensor:
        return torch.where(active_BT, (tensor.detach() if constant else tensor).to(dtype), 0.0)

    count_B1 = active_BT.sum(1, keepdim=True).to(dtype)
    logprobs_BT, advantages_BT = active(logprobs, constant=False), active(advantages)
    log_ratio_BT = (logprobs_BT - active(old_logprobs)).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if options.ratio == "sequence":
        ratio_BT = (log_ratio_BT.sum(1, keepdim=True) / count_B1.clamp_min(1)).exp().expand_as(log_ratio_BT)
    else:
        ratio_BT = log_ratio_BT.exp()
    # min(A r, A clip(r)) differs from A r exactly where the ratio left the interval in the direction A rewards.
    over_BT = (advantages_BT > 0) & (ratio_BT > 1 + options.clip_high)
    under_BT = (advantages_BT < 0) & (ratio_BT < 1 - options.clip_low)
    bounded_BT = torch.where(over_BT, 1 + options.clip_high, torch.where(under_BT, 1 - options.clip_low, ratio_BT))
    dual_BT = torch.zeros_like(active_BT)
    if options.dual_clip is not None:
        dual_BT = (advantages_BT < 0) & (ratio_BT > options.dual_clip)
        bounded_BT = torch.where(dual_BT, options.dual_clip, bounded_BT)
    surrogate_BT = -advantages_BT * bounded_BT
    if importance_weights is not None:
        surrogate_BT = surrogate_BT * active(importance_weights)
    weights_BT = _token_weights(active_BT, count_B1, denominator, options)
    policy_term = (surrogate_BT * weights_BT).sum()
    loss = policy_term
    kl_BT = entropy_BT = torch.zeros_like(logprobs_BT)
    if ref_logprobs is not None:
        kl_BT = _kl(logprobs_BT, active(ref_logprobs), options.kl_estimator) * active_BT
        if options.kl_coef != 0:
            loss = loss + options.kl_coef * (kl_BT * weights_BT).sum()
    if entropy is not None:
        entropy_BT = active(entropy, constant=False)
        if options.entropy_coef != 0:
            loss = loss - options.entropy_coef * (entropy_BT * weights_BT).sum()
    with torch.no_grad():
        tokens = count_B1.sum()
        sums = [
            x.to(dtype).sum()
            for x in (over_BT | under_BT, dual_BT, -log_ratio_BT, ratio_BT * active_BT, kl_BT, entropy_BT)
        ]
        names = ("clip_fraction", "dual_clip_fraction", "approx_kl", "ratio", "kl", "entropy")
        metrics = {name: total / tokens.clamp_min(1) for name, total in zip(names, sums, strict=True)}
    return loss, {"policy_loss": policy_term.detach(), "tokens": tokens} | metrics
