"""``policy_loss``: the clipped policy loss of PPO, GRPO, DAPO and GSPO, forward and backward in one pass.

With L = clamp(log pi - log pi_old, -20, 20) a token, r = exp(L) (``ratio="token"``) or exp(mean of L over the
sequence's unmasked tokens) (``"sequence"``, GSPO), advantage A and importance weight w (1 if absent), a token's
policy term is

    -w min(A r, A clip(r, 1 - clip_low, 1 + clip_high)),      and no more than -w A dual_clip where A < 0.

PPO: Schulman et al. 2017, arXiv 1707.06347; asymmetric clipping: DAPO, arXiv 2503.14476; dual clip: Ye et al. 2020,
arXiv 1912.09729; GSPO: arXiv 2507.18071. With D = clamp(log pi - log ref, -20, 20) a token's KL estimate (Schulman
2020) is

    k1: D        k2: D^2 / 2        k3: clamp(exp(-D) + D - 1, -10, 10).

The loss sums (policy + kl_coef KL - entropy_coef entropy) over tokens, each with weight 1 / denominator
(``token-mean`` and ``seq-mean-token-sum``) or 1 / (length denominator) (``seq-mean-token-mean``, length: the
sequence's unmasked tokens).

Legend: B sequences, T steps.
"""

from typing import Any

import torch

from ctrl_kernels import reference
from ctrl_kernels.backend import Backend, check_kernel_dtype, resolve_backend
from ctrl_kernels.clipping import (
    Aggregation,
    KlEstimator,
    PolicyOptions,
    Ratio,
    check_denominator,
    check_shapes,
)
from ctrl_kernels.policy_terms import named_metrics, policy_denominator, policy_terms, policy_totals
from ctrl_kernels.scaling import scale_


def _dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().contiguous()


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logprobs: torch.Tensor,
        entropy: torch.Tensor | None,
        constants: tuple[torch.Tensor | None, ...],
        denominator: torch.Tensor,
        options: PolicyOptions,
    ) -> Any:
        ctx.save_for_backward(logprobs, entropy, *constants)
        ctx.denominator, ctx.options = denominator, options
        sums, *ctx.gradients = _PolicyLoss.launch(ctx, logprobs, entropy, *constants)
        loss, metrics = policy_totals(sums, options)
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    def launch(ctx: Any, logprobs: torch.Tensor, entropy: torch.Tensor | None, *constants: torch.Tensor | None) -> Any:
        old_logprobs, advantages, mask, ref_logprobs, importance_weights = constants
        gradients = [
            torch.empty_like(x) if needed else None
            for x, needed in zip((logprobs, entropy), ctx.needs_input_grad, strict=False)
        ]
        assert old_logprobs is not None and advantages is not None and mask is not None
        sums = policy_terms(
            logprobs,
            old_logprobs,
            advantages,
            mask,
            ctx.denominator,
            ctx.options,
            ref_logprobs=ref_logprobs,
            importance_weights=importance_weights,
            entropy=entropy,
            d_logprobs=gradients[0],
            d_entropy=gradients[1],
        )
        return sums, *gradients

    @staticmethod
    def backward(ctx: Any, d_loss: torch.Tensor, d_metrics: torch.Tensor) -> Any:
        # The gradients are scaled in place and given away, so a second pass over a retained graph forms them again.
        if ctx.gradients is None:
            _, *ctx.gradients = _PolicyLoss.launch(ctx, *ctx.saved_tensors)
        d_logprobs, d_entropy = (None if x is None else scale_(x, d_loss) for x in ctx.gradients)
        ctx.gradients = None
        return d_logprobs, d_entropy, None, None, None


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
    """The clipped policy loss, an fp32 scalar, and its metrics, a dict of detached scalars.

    All tensors are [B, T] and on one device; a token counts where ``mask`` is not 0, and what the others hold, NaN
    included, does not matter. Gradients flow to ``logprobs`` and ``entropy``. The module's docstring states the
    formulas and their sources.

    ``denominator``: what the sum is divided by; pass the global one (unmasked tokens for ``token-mean``, sequences
    for the others) when micro-batches or data-parallel ranks share a batch. None counts this call's own: its unmasked
    tokens, or its sequences that have any. A fully masked batch has loss 0 and gradient 0.

    Metrics are means over this call's unmasked tokens: ``clip_fraction`` (tokens whose gradient clipping stopped),
    ``dual_clip_fraction``, ``approx_kl`` (mean of log pi_old - log pi), ``ratio``, ``kl`` (the estimate against the
    reference) and ``entropy``; besides ``policy_loss``, the loss without its KL and entropy terms, and ``tokens``,
    their number.
    """
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
    if resolve_backend(backend, logprobs) == "triton" and logprobs.numel() > 0:
        constants = tuple(map(_dense, (old_logprobs, advantages, mask, ref_logprobs, importance_weights)))
        entropy = None if entropy is None else entropy.contiguous()
        check_kernel_dtype(
            logprobs=logprobs,
            entropy=entropy,
            old_logprobs=old_logprobs,
            advantages=advantages,
            ref_logprobs=ref_logprobs,
            importance_weights=importance_weights,
        )
        scalar = policy_denominator(mask, denominator, options)
        loss, vector = _PolicyLoss.apply(logprobs.contiguous(), entropy, constants, scalar, options)
        return loss, named_metrics(vector)
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
