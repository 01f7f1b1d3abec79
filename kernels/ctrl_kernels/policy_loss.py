"""``policy_loss``: the policy losses of PPO, GRPO, DAPO, GSPO and their kin, forward and backward in one pass.

With L = clamp(log pi - log pi_old, -20, 20) a token, r = exp(L) (``ratio="token"``) or exp(mean of L over the
sequence's unmasked tokens) (``"sequence"``, GSPO; ``"sequence-token"``: the same value, but its gradient is that of
r = r_sequence pi / sg(pi) at each token, GSPO-token), advantage A and importance weight w (1 if absent), a token's
policy term is, by ``objective``,

    clip      -w min(A r, A clip(r, 1 - clip_low, 1 + clip_high)), and no more than -w A dual_clip where A < 0
    cispo     -w A sg(clip(r, 1 - clip_low, 1 + clip_high)) log pi
    dppo_tv   -w A sg(min(r, ratio_cap)) log pi, and 0 where A > 0 and pi - pi_old > clip_high, or A <= 0 and
              pi_old - pi > clip_low
    dppo_kl   the same, and 0 where A > 0, pi > pi_old and d > clip_high, or A <= 0, pi < pi_old and d > clip_low,
              with d = pi_old log(pi_old / pi) + (1 - pi_old) log((1 - pi_old + 1e-8) / (1 - pi + 1e-8))
    sapo      -w A (4 / tau) sigmoid(tau (r - 1)), with tau = tau_positive where A > 0 and tau_negative elsewhere
    gmpo      -w A exp(mean of sign(A) min(sign(A) L, sign(A) clip(L, -clip_low, clip_high)) over the sequence)

PPO: Schulman et al. 2017, arXiv 1707.06347; asymmetric clipping: DAPO, arXiv 2503.14476; dual clip: Ye et al. 2020,
arXiv 1912.09729; GSPO: arXiv 2507.18071; CISPO: MiniMax-M1, arXiv 2506.13585; DPPO: arXiv 2602.04879; SAPO: arXiv
2511.20347; GMPO: arXiv 2507.20673. With ``drift_weights`` c a token's term also holds w c |L|: KL-Cov (arXiv
2505.22617), where ``covariance_tokens`` says which tokens; Clip-Cov sets their importance weights to 0.

With D = clamp(log pi - log ref, -20, 20) a token's KL estimate (Schulman 2020) is

    k1: D        k2: D^2 / 2        k3: clamp(exp(-D) + D - 1, -10, 10),

times r with ``kl_correction`` (DeepSeek-V3.2, arXiv 2512.02556). A token whose log pi is -inf has L = D = -20 whatever
the others are, and no gradient.

The loss sums (policy + kl_coef KL - entropy_coef entropy) over tokens, each with weight 1 / denominator
(``token-mean`` and ``seq-mean-token-sum``) or 1 / (length denominator) (``seq-mean-token-mean``, length: the
sequence's unmasked tokens).

The forward pass makes the gradients, too; the backward pass scales them, if the upstream gradient is not 1.
``ctrl_kernels.policy_kernel`` holds the kernel, ``ctrl_kernels.losses_reference`` the definition in plain PyTorch.

Legend: B sequences, T steps.
"""

from typing import Any

import torch

from ctrl_kernels import losses_reference
from ctrl_kernels.operators import first_order, operator
from ctrl_kernels.options import (
    Backend,
    PolicyOptions,
    check_denominator,
    check_kernel_dtype,
    check_shapes,
    policy_options,
    refuse,
    resolve_backend,
    with_options,
)
from ctrl_kernels.policy_kernel import METRICS, SUMS, finish_kernel, policy_kernel
from ctrl_kernels.projection import scale_
from ctrl_kernels.token_tiles import bytes_of, dense, token_runs

POLICY_WARPS = 4
FINISH_ROWS = 512


def _bounds(options: PolicyOptions) -> tuple[float, float, float, float]:
    """What the kernel takes as low and high, and the objective's two further numbers."""
    low, high = -options.clip_low, options.clip_high
    if options.objective in ("clip", "cispo"):
        low, high = 1 + low, 1 + high
    elif options.objective in ("dppo_tv", "dppo_kl"):
        low = -low
    if options.objective == "sapo":
        return low, high, options.tau_positive, options.tau_negative
    if options.objective in ("dppo_tv", "dppo_kl"):
        return low, high, float("inf") if options.ratio_cap is None else options.ratio_cap, 0.0
    return low, high, options.dual_clip or 0.0, 0.0


def policy_terms(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    denominator: float | torch.Tensor,
    options: PolicyOptions,
    *,
    ref_logprobs: torch.Tensor | None = None,
    importance_weights: torch.Tensor | None = None,
    drift_weights: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    d_logprobs: torch.Tensor | None = None,
    d_entropy: torch.Tensor | None = None,
) -> torch.Tensor:
    """The partial sums of the loss [programs, SUMS]; fills ``d_logprobs`` and ``d_entropy`` where given.

    All tensors are dense and of one shape, [B, T], but ``denominator``, a scalar. ``token_weights``, if given, multiply
    what 1 / ``denominator`` gives; the aggregation then has no further say.
    """
    by_length = options.aggregation == "seq-mean-token-mean" and token_weights is None
    sequence = logprobs.shape[-1] if by_length or options.by_sequence else None
    run, programs, tiles = token_runs(logprobs.numel(), sequence)
    sums = logprobs.new_empty(programs, SUMS, dtype=torch.float32)
    if programs == 0:
        return sums
    on_device = isinstance(denominator, torch.Tensor)
    policy_kernel[(programs,)](
        logprobs,
        old_logprobs,
        advantages,
        bytes_of(mask),
        ref_logprobs,
        importance_weights,
        drift_weights,
        entropy,
        token_weights,
        denominator if on_device else None,
        d_logprobs,
        d_entropy,
        sums,
        run,
        logprobs.numel(),
        1.0 if on_device else 1.0 / denominator,
        *_bounds(options),
        options.kl_coef,
        options.entropy_coef,
        OBJECTIVE=options.objective,
        RATIO=options.ratio,
        HAS_DUAL=options.dual_clip is not None,
        BY_LENGTH=by_length,
        KL=options.kl_estimator,
        KL_CORRECTION=options.kl_correction,
        SUMS=SUMS,
        **tiles,
        num_warps=POLICY_WARPS,
    )
    return sums


def policy_totals(sums: torch.Tensor, options: PolicyOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, a scalar, and its metrics from partial sums."""
    return finish(sums, len(METRICS), len(METRICS) + 2, options.kl_coef, options.entropy_coef)


def finish(
    sums: torch.Tensor, metrics: int, used: int, kl_coef: float = 0.0, entropy_coef: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss, a scalar, and so many metrics from the columns in use of partial sums."""
    loss, found = sums.new_empty(()), sums.new_empty(metrics)
    rows, columns = sums.shape
    finish_kernel[(1,)](
        sums,
        loss,
        found,
        rows,
        kl_coef,
        entropy_coef,
        SUMS=columns,
        METRICS=metrics,
        USED=used,
        BLOCK=FINISH_ROWS,
        num_warps=8,
    )
    return loss, found


def named_metrics(metrics: torch.Tensor) -> dict[str, torch.Tensor]:
    """The metrics that users see, as scalars."""
    return dict(zip(METRICS, metrics.unbind(), strict=True))


def policy_denominator(
    mask: torch.Tensor, denominator: float | torch.Tensor | None, options: PolicyOptions
) -> float | torch.Tensor:
    """The denominator as a number, or as a scalar on the device: where None, the unmasked tokens or sequences."""
    if isinstance(denominator, torch.Tensor):
        return denominator.detach().to(mask.device).reshape(())
    if denominator is not None:
        return float(denominator)
    return torch.count_nonzero(mask if options.aggregation == "token-mean" else (mask != 0).any(1))


def _fake(logprobs: torch.Tensor, *arguments: Any) -> Any:
    entropy, d_logprobs, d_entropy = arguments[6], arguments[9], arguments[10]
    scalar, nothing = logprobs.new_empty((), dtype=torch.float32), logprobs.new_empty(0)
    return (
        scalar,
        logprobs.new_empty(len(METRICS), dtype=torch.float32),
        torch.empty_like(logprobs) if d_logprobs else nothing,
        torch.empty_like(entropy) if d_entropy else nothing.clone(),
    )


@operator(
    "policy_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, Tensor? ref_logprobs, "
    "Tensor? importance_weights, Tensor? drift_weights, Tensor? entropy, Tensor? denominator, float constant, "
    "bool train_logprobs, bool train_entropy, OPTIONS) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
    PolicyOptions,
)
def _policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
    importance_weights: torch.Tensor | None,
    drift_weights: torch.Tensor | None,
    entropy: torch.Tensor | None,
    denominator: torch.Tensor | None,
    constant: float,
    train_logprobs: bool,
    train_entropy: bool,
    options: PolicyOptions,
) -> tuple[torch.Tensor | None, ...]:
    """Loss, metrics and the gradients that are asked for, else nothing in their place."""
    d_logprobs = torch.empty_like(logprobs) if train_logprobs else None
    d_entropy = torch.empty_like(entropy) if train_entropy and entropy is not None else None
    sums = policy_terms(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        constant if denominator is None else denominator,
        options,
        ref_logprobs=ref_logprobs,
        importance_weights=importance_weights,
        drift_weights=drift_weights,
        entropy=entropy,
        d_logprobs=d_logprobs,
        d_entropy=d_entropy,
    )
    loss, metrics = policy_totals(sums, options)
    return loss, metrics, d_logprobs, d_entropy


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logprobs: torch.Tensor,
        entropy: torch.Tensor | None,
        constants: tuple[torch.Tensor | None, ...],
        denominator: float | torch.Tensor,
        options: PolicyOptions,
    ) -> Any:
        on_device = isinstance(denominator, torch.Tensor)
        scalar = (denominator, 1.0) if on_device else (None, denominator)
        arguments = (logprobs, *constants, entropy, *scalar, *ctx.needs_input_grad[:2], options)
        loss, metrics, *gradients = _policy_loss(*arguments)
        ctx.mark_non_differentiable(metrics)
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*gradients)
        else:
            ctx.save_for_backward(logprobs, entropy)
            ctx.arguments, ctx.gradients = arguments, gradients
        return loss, metrics

    @staticmethod
    @first_order
    def backward(ctx: Any, d_loss: torch.Tensor, d_metrics: torch.Tensor) -> Any:
        if torch.compiler.is_compiling():
            scaled = [(d_loss * x).to(x.dtype) for x in ctx.saved_tensors]
        else:
            # Scaled in place and given away, so a second pass over a retained graph forms the gradients again.
            ctx.saved_tensors  # noqa: B018  (raises if an input was changed in place since)
            gradients = ctx.gradients or _policy_loss(*ctx.arguments)[2:]
            ctx.gradients = None
            scaled = [None if x is None else scale_(x, d_loss) for x in gradients]
        returned = (x if needed else None for x, needed in zip(scaled, ctx.needs_input_grad[:2], strict=True))
        return *returned, None, None, None


@with_options(PolicyOptions)
def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    ref_logprobs: torch.Tensor | None = None,
    importance_weights: torch.Tensor | None = None,
    drift_weights: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    denominator: float | torch.Tensor | None = None,
    backend: Backend = "auto",
    **options: Any,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The policy loss, an fp32 scalar, and its metrics, a dict of detached scalars.

    All tensors are [B, T] and on one device; a token counts where ``mask`` is not 0, and what the others hold, NaN
    included, does not matter. ``advantages`` may be [B] or [B, 1]: one a sequence. Gradients flow to ``logprobs`` and
    ``entropy``. The module's docstring states the formulas and their sources, ``ctrl_kernels.PolicyOptions`` the
    ``options``.

    ``denominator``: what the sum is divided by; pass the global one (unmasked tokens for ``token-mean``, sequences
    for the others) when micro-batches or data-parallel ranks share a batch. None counts this call's own: its unmasked
    tokens, or its sequences that have any. A fully masked batch has loss 0 and gradient 0.

    Metrics are means over this call's unmasked tokens: ``clip_fraction`` (tokens whose gradient clipping stopped, or
    for ``cispo`` bounded), ``dual_clip_fraction``, ``approx_kl`` (mean of log pi_old - log pi), ``ratio``, ``kl`` (the
    estimate against the reference) and ``entropy``; besides ``policy_loss``, the loss without its KL and entropy
    terms, and ``tokens``, their number.
    """
    chosen = policy_options(options)
    refuse("policy_loss", options, PolicyOptions)
    if logprobs.dim() != 2:
        raise ValueError(f"logprobs must have shape (B, T), got {tuple(logprobs.shape)}")
    if advantages.shape != logprobs.shape and advantages.shape in ((len(logprobs),), (len(logprobs), 1)):
        advantages = advantages.reshape(-1, 1).expand(logprobs.shape)
    tensors = {
        "old_logprobs": old_logprobs,
        "advantages": advantages,
        "ref_logprobs": ref_logprobs,
        "importance_weights": importance_weights,
        "drift_weights": drift_weights,
        "entropy": entropy,
    }
    check_shapes(logprobs.shape, logprobs.device, mask=mask, **tensors)
    check_denominator(denominator)
    chosen.check_terms(ref_logprobs=ref_logprobs, entropy=entropy)
    if resolve_backend(backend, logprobs) == "triton" and logprobs.numel() > 0:
        check_kernel_dtype(logprobs=logprobs, **tensors)
        constants = (old_logprobs, advantages, mask, ref_logprobs, importance_weights, drift_weights)
        loss, vector = _PolicyLoss.apply(
            logprobs.contiguous(),
            None if entropy is None else entropy.contiguous(),
            tuple(map(dense, constants)),
            policy_denominator(mask, denominator, chosen),
            chosen,
        )
        return loss, named_metrics(vector)
    return losses_reference.policy_loss(logprobs, mask=mask, options=chosen, denominator=denominator, **tensors)


def covariance_tokens(
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    fraction: float,
    bounds: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Tokens [B, T], as bool, whose log-prob and advantage vary together the most (Cui et al. 2025, arXiv 2505.22617).

    A token's covariance is (A - mean A) (log pi - mean log pi), means over the tokens where ``mask`` is not 0. KL-Cov
    takes the largest ``fraction`` of them, at least one; pass ``coefficient * tokens`` as ``drift_weights`` with
    ``clip_low=1, clip_high=inf``. Clip-Cov takes as many at random of those strictly within ``bounds``; leave tokens
    that clipping stops anyway out of ``mask``, and pass ``~tokens`` as ``importance_weights``. Waits for the device.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} must lie between 0 and 1")
    check_shapes(logprobs.shape, logprobs.device, advantages=advantages, mask=mask)
    kept = (mask != 0).flatten().nonzero().squeeze(1)
    chosen = torch.zeros(mask.numel(), dtype=torch.bool, device=mask.device)
    if len(kept) == 0:
        return chosen.view(mask.shape)
    logp, advantage = logprobs.detach().float().flatten()[kept], advantages.detach().float().flatten()[kept]
    covariance = (advantage - advantage.mean()) * (logp - logp.mean())
    wanted = max(1, int(fraction * len(kept)))
    if bounds is None:
        picked = covariance.topk(wanted).indices
    else:
        picked = ((covariance > bounds[0]) & (covariance < bounds[1])).nonzero().squeeze(1)
        order = torch.randperm(len(picked), generator=generator, device=None if generator is None else generator.device)
        picked = picked[order[:wanted].to(picked.device)]
    chosen[kept[picked]] = True
    return chosen.view(mask.shape)
