"""``linear_policy_loss``: the clipped policy loss straight from hidden states."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ctrl_kernels.backend import Backend
from ctrl_kernels.clipping import Aggregation, KlEstimator, Ratio, check_shapes
from ctrl_kernels.linear_logprobs import linear_token_logprobs
from ctrl_kernels.loss import policy_loss


def linear_policy_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    ref_logprobs: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: KlEstimator = "k3",
    ratio: Ratio = "token",
    aggregation: Aggregation = "token-mean",
    importance_weights: torch.Tensor | None = None,
    entropy_coef: float = 0.0,
    denominator: float | torch.Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The policy loss of ``hidden`` [N, D] or [B, T, D]."""
    check_shapes(
        targets.shape,
        hidden.device,
        old_logprobs=old_logprobs,
        advantages=advantages,
        mask=mask,
        ref_logprobs=ref_logprobs,
        importance_weights=importance_weights,
    )
    if hidden.shape[:-1] != targets.shape or targets.dim() not in (1, 2):
        raise ValueError(
            f"hidden must be (N, D) with targets (N,), or (B, T, D) with targets (B, T), "
            f"got {tuple(hidden.shape)} and {tuple(targets.shape)}"
        )
    if ratio == "sequence":
        raise ValueError(
            "ratio='sequence' needs every token's log-prob first: use linear_token_logprobs and policy_loss"
        )
    if targets.dim() == 1 and aggregation != "token-mean":
        raise ValueError(f"aggregation={aggregation!r} needs sequences: pass (B, T, D) hidden and (B, T) tensors")
    mask = (mask != 0) & (targets != ignore_index)
    rows = targets.shape if targets.dim() == 2 else (1, len(targets))

    def by_row(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.reshape(rows)

    logprobs, entropy = linear_token_logprobs(
        hidden.flatten(0, -2),
        weight,
        targets.where(mask, ignore_index).flatten(),
        temperature=temperature,
        group=group,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        return_entropy=True,
        softcap=softcap,
        backend=backend,
    )
    return policy_loss(
        logprobs.reshape(rows),
        old_logprobs.reshape(rows),
        advantages.reshape(rows),
        mask.reshape(rows),
        clip_low=clip_low,
        clip_high=clip_high,
        dual_clip=dual_clip,
        ref_logprobs=by_row(ref_logprobs),
        kl_coef=kl_coef,
        kl_estimator=kl_estimator,
        ratio=ratio,
        aggregation=aggregation,
        importance_weights=by_row(importance_weights),
        entropy=entropy.reshape(rows),
        entropy_coef=entropy_coef,
        denominator=denominator,
        backend=backend,
    )
