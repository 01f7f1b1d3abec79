"""``policy_loss``: the clipped policy loss of PPO, GRPO, DAPO and GSPO."""

from __future__ import annotations

import torch

from ctrl_kernels import reference
from ctrl_kernels.backend import Backend, resolve_backend
from ctrl_kernels.clipping import (
    Aggregation,
    KlEstimator,
    PolicyOptions,
    Ratio,
    check_denominator,
    check_shapes,
)


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ref_logprobs: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KlEstimator = "k3",
    ratio: Ratio = "token",
    aggregation: Aggregation = "token-mean",
    importance_weights: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    entropy_coef: float = 0.0,
    denominator: float | torch.Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped policy loss, an fp32 scalar, and its metrics, detached scalars."""
    if logprobs.dim() != 2:
        raise ValueError(f"logprobs must have shape (B, T), got {tuple(logprobs.shape)}")
    check_shapes(
        logprobs.shape,
        logprobs.device,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        ref_logprobs=ref_logprobs,
        importance_weights=importance_weights,
        entropy=entropy,
    )
    check_denominator(denominator)
    if kl_coef != 0 and ref_logprobs is None:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logprobs")
    if entropy_coef != 0 and entropy is None:
        raise ValueError(f"entropy_coef={entropy_coef} needs entropy")
    options = PolicyOptions(
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        ratio=ratio,
        aggregation=aggregation,
        entropy_coef=entropy_coef,
    )
    resolve_backend(backend, logprobs)
    return reference.policy_loss(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        options,
        ref_logprobs=ref_logprobs,
        importance_weights=importance_weights,
        entropy=entropy,
        denominator=denominator,
    )
