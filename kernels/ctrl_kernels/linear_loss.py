"""``linear_policy_loss``: the clipped policy loss straight from hidden states, forward and backward in one sweep.

Advantages, old log-probs and weights of tokens are known before the forward pass, so a chunk of tokens can form its
logits' gradient while its softmax is still at hand: 6 N V D operations in all, where a forward pass that forgets the
logits and a backward pass that recomputes them take 8. For each chunk: logits segment by segment in fp32, of which
the statistics and, in the hidden states' type, the softmax weights remain; the log-probs, with one collective; the
loss's slope at each token; the weights turned into the logits' gradient in place; two products that accumulate the
gradients of hidden states and weight in fp32. The backward pass only multiplies these by the upstream gradient, if
that is not 1.

Tokens that the mask drops leave before the first product. Where neither a KL nor an entropy term acts, tokens with
advantage 0 have no gradient and only go through the forward part.

Legend: N tokens, M unmasked tokens, n tokens of a chunk, V columns of this rank's vocabulary shard, D hidden width, B
sequences, T steps.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from ctrl_kernels import reference
from ctrl_kernels.backend import Backend, check_kernel_dtype, resolve_backend
from ctrl_kernels.clipping import Aggregation, KlEstimator, PolicyOptions, Ratio, check_denominator, check_shapes
from ctrl_kernels.linear_logprobs import check_linear, check_main_grad, spread
from ctrl_kernels.policy_terms import named_metrics, policy_denominator, policy_terms, policy_totals
from ctrl_kernels.projection import WORKSPACE_MB, Projection, matrix, propagate
from ctrl_kernels.scaling import scale_
from ctrl_kernels.shard import check_targets, gather_statistics, softmax_options
from ctrl_kernels.softmax_gradient import weights_gradient
from ctrl_kernels.softmax_statistics import combine_segments


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tokens:
    """What the loss takes for each of M unmasked tokens, those with a gradient first, and their ``weights`` in it."""

    rows: torch.Tensor
    targets: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    ref_logprobs: torch.Tensor | None
    importance_weights: torch.Tensor | None
    with_gradient: int

    def terms(
        self, chunk: slice, logprobs: torch.Tensor, entropy: torch.Tensor, options: PolicyOptions, **out: Any
    ) -> torch.Tensor:
        """``policy_terms`` of a chunk of these tokens."""
        return policy_terms(
            logprobs,
            self.old_logprobs[chunk],
            self.advantages[chunk],
            torch.ones_like(self.targets[chunk], dtype=torch.uint8),
            torch.ones((), dtype=torch.float32, device=logprobs.device),
            options,
            ref_logprobs=None if self.ref_logprobs is None else self.ref_logprobs[chunk],
            importance_weights=None if self.importance_weights is None else self.importance_weights[chunk],
            entropy=entropy,
            token_weights=self.weights[chunk],
            **out,
        )


def _select(
    mask: torch.Tensor,
    denominator: float | torch.Tensor | None,
    options: PolicyOptions,
    *,
    targets: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
    importance_weights: torch.Tensor | None,
) -> _Tokens:
    """The unmasked tokens of [B, T] tensors."""
    scalar = policy_denominator(mask, denominator, options)
    weights = torch.where(scalar > 0, 1 / scalar, 0.0).expand(mask.shape)
    if options.aggregation == "seq-mean-token-mean":
        weights = weights / mask.sum(1, keepdim=True).clamp_min(1)
    active = mask
    if options.kl_coef == 0 and options.entropy_coef == 0:
        active = mask & (advantages != 0)
    rows_with_gradient = active.flatten().nonzero().squeeze(1)
    rows = torch.cat((rows_with_gradient, (mask & ~active).flatten().nonzero().squeeze(1)))

    def take(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x.detach().flatten()[rows]

    return _Tokens(
        rows=rows,
        targets=targets.flatten()[rows],
        old_logprobs=old_logprobs.detach().flatten()[rows],
        advantages=advantages.detach().flatten()[rows],
        weights=weights.flatten()[rows],
        ref_logprobs=take(ref_logprobs),
        importance_weights=take(importance_weights),
        with_gradient=len(rows_with_gradient),
    )


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        main_grad: torch.Tensor | None,
        tokens: _Tokens,
        projection: Projection,
        options: PolicyOptions,
        trained: bool,
    ) -> Any:
        wanted = tuple(trained and needed for needed in ctx.needs_input_grad[:2])
        ctx.save_for_backward(hidden, weight)
        ctx.arguments = tokens, projection, options, wanted, weight.dtype if main_grad is None else main_grad.dtype
        ctx.main_grad = main_grad
        loss, metrics, ctx.gradients = _fused(hidden, weight, *ctx.arguments)
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, d_loss: torch.Tensor, d_metrics: torch.Tensor) -> Any:
        # The gradients are scaled in place and given away, so a second pass over a retained graph forms them again.
        if ctx.gradients is None:
            _, _, ctx.gradients = _fused(*ctx.saved_tensors, *ctx.arguments)
        *gradients, unit = ctx.gradients
        dtypes = (ctx.saved_tensors[0].dtype, ctx.arguments[-1])
        factor = d_loss if unit is None else d_loss * unit
        d_hidden, d_weight = (
            None if x is None else scale_(x, factor).to(dtype) for x, dtype in zip(gradients, dtypes, strict=True)
        )
        ctx.gradients = None
        if d_weight is not None and ctx.main_grad is not None:
            ctx.main_grad += d_weight
            d_weight = None
        return d_hidden, d_weight, None, None, None, None, None


def _fused(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: _Tokens,
    projection: Projection,
    options: PolicyOptions,
    wanted: tuple[bool, bool],
    weight_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]:
    """The loss, its metrics and, where wanted, the gradients of ``hidden`` [N, D] and ``weight`` [V, D].

    In fp16 the gradients stay in fp32, in units of the last value returned, until the upstream gradient is known.
    """
    count = tokens.with_gradient if any(wanted) else 0
    d_hidden = hidden.new_empty((count, hidden.shape[1]), dtype=torch.float32) if wanted[0] else None
    d_weight = hidden.new_empty(weight.shape, dtype=torch.float32) if wanted[1] else None
    logprobs = hidden.new_empty(len(tokens.rows), dtype=torch.float32)
    entropy = torch.empty_like(logprobs)
    weighted, unit = tokens, None
    if hidden.dtype == torch.float16 and count:
        weighted, unit = _in_fp16_range(tokens)
    _sweep(hidden, weighted, projection, options, count, logprobs, entropy, d_hidden, d_weight)
    loss, metrics = policy_totals(tokens.terms(slice(None), logprobs, entropy, options), options)
    if d_weight is not None and unit is None:
        d_weight = d_weight.to(weight_dtype)
    if d_hidden is not None:
        d_hidden = spread(d_hidden, tokens.rows[:count], len(hidden), torch.float32)
        if projection.options.ranks > 1:
            dist.all_reduce(d_hidden, group=projection.options.group)
        d_hidden = d_hidden.to(hidden.dtype) if unit is None else d_hidden
    return loss, metrics, (d_hidden, d_weight, unit)


def _in_fp16_range(tokens: _Tokens) -> tuple[_Tokens, torch.Tensor]:
    """The tokens with weights near 1, whose slopes fp16 can hold, and the power of 2 that was taken out of them."""
    largest = tokens.weights.amax()
    unit = torch.where(largest > 0, torch.exp2(torch.ceil(torch.log2(largest))), 1.0)
    return replace(tokens, weights=tokens.weights / unit), unit


def _sweep(
    hidden: torch.Tensor,
    tokens: _Tokens,
    projection: Projection,
    options: PolicyOptions,
    count: int,
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    d_hidden: torch.Tensor | None,
    d_weight: torch.Tensor | None,
) -> None:
    """Fill log-probs and entropies [M] and, from the first ``count`` tokens, the gradients [count, D] and [V, D]."""
    valid, width = projection.options.valid, hidden.element_size()
    tiles = projection.segment_count * projection.segment_tiles
    per_token = 4 * projection.segment + width * hidden.shape[1]
    chunks = projection.chunks(count, per_token + width * valid + 4 * tiles, whole_waves=True)
    rest = [slice(count + c.start, count + c.stop) for c in projection.chunks(len(tokens.rows) - count, per_token)]
    longest = max((c.stop - c.start for c in (*chunks, *rest)), default=0)
    logits_space = hidden.new_empty(longest * projection.segment, dtype=torch.float32)
    weights_space = projection.workspace(chunks, valid, hidden.dtype)
    tile_max_space = projection.workspace(chunks, tiles, torch.float32)
    for rows in (*chunks, *rest):
        hidden_n = hidden.index_select(0, tokens.rows[rows])
        n = len(hidden_n)
        in_gradient = rows.start < count
        weights = matrix(weights_space, n, valid) if in_gradient else None
        tile_max = matrix(tile_max_space, n, tiles) if in_gradient else None
        statistics = hidden.new_empty((projection.segment_count, n, 4), dtype=torch.float32)
        projection.statistics(hidden_n, tokens.targets[rows], statistics, logits_space, weights, tile_max)
        gathered = gather_statistics(statistics, projection.options)
        logprobs[rows], entropy[rows], lse_n = combine_segments(gathered, tokens.targets[rows], projection.options)
        if weights is None or tile_max is None:
            continue
        d_logprob_n, d_entropy_n = torch.empty_like(lse_n), torch.empty_like(lse_n)
        tokens.terms(rows, logprobs[rows], entropy[rows], options, d_logprobs=d_logprob_n, d_entropy=d_entropy_n)
        weights_gradient(
            weights,
            weights,
            tile_max,
            tokens.targets[rows],
            logprobs[rows],
            lse_n,
            entropy[rows],
            d_logprob_n,
            d_entropy_n if options.entropy_coef != 0 else None,
            projection.options,
            segment=projection.segment,
        )
        propagate(
            weights,
            hidden_n,
            projection.weight[:valid],
            None if d_hidden is None else d_hidden[rows],
            None if d_weight is None else d_weight[:valid],
            first_hidden=True,
            first_weight=rows.start == 0,
        )
    if d_weight is not None:
        d_weight[valid if chunks else 0 :] = 0.0


def _check_tokens(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor,
    constants: dict[str, torch.Tensor | None],
    ratio: str,
    aggregation: str,
) -> None:
    """Raise ValueError unless the tensors have one shape, and one that ratio and aggregation can work with."""
    check_shapes(targets.shape, hidden.device, mask=mask, **constants)
    if hidden.shape[:-1] != targets.shape or targets.dim() not in (1, 2):
        raise ValueError(
            f"hidden must be (N, D) with targets (N,), or (B, T, D) with targets (B, T), "
            f"got {tuple(hidden.shape)} and {tuple(targets.shape)}"
        )
    if ratio == "sequence":
        raise ValueError("ratio='sequence' needs all log-probs first: use linear_token_logprobs and policy_loss")
    if targets.dim() == 1 and aggregation != "token-mean":
        raise ValueError(f"aggregation={aggregation!r} needs sequences: pass hidden (B, T, D), the others (B, T)")


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
    main_grad: torch.Tensor | None = None,
    workspace_mb: int = WORKSPACE_MB,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """``policy_loss`` of the log-probs and entropies that ``linear_token_logprobs`` gives, with the former's results.

    ``hidden`` is [N, D] with the other tensors [N], or [B, T, D] with [B, T], which aggregations over sequences need.
    A token counts where ``mask`` is not 0 and its target is not ``ignore_index``. The options are those of the two
    functions. ``ratio="sequence"`` is a ValueError: it needs all log-probs of a sequence before the first gradient,
    so two passes.

    The Triton backend forms the gradients in the forward pass and only scales them in the backward pass; in fp16 so
    that a loss scale, which comes as the upstream gradient, still finds what it is to save from underflow. The PyTorch
    backend composes the two functions, which is this one's definition.
    """
    constants = {
        "old_logprobs": old_logprobs,
        "advantages": advantages,
        "ref_logprobs": ref_logprobs,
        "importance_weights": importance_weights,
    }
    _check_tokens(hidden, targets, mask, constants, ratio, aggregation)
    if kl_coef != 0 and ref_logprobs is None:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logprobs")
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
    check_denominator(denominator)
    check_main_grad(main_grad, weight)
    if workspace_mb < 1:
        raise ValueError(f"workspace_mb={workspace_mb} must be at least 1")
    hidden_ND, targets_N = hidden.flatten(0, -2), targets.flatten()
    check_linear(hidden_ND, weight)
    check_targets(targets_N, len(hidden_ND), hidden.device)
    shape = targets.shape if targets.dim() == 2 else (1, len(targets))
    mask_BT = ((mask != 0) & (targets != ignore_index)).view(shape)
    by_row = {name: None if x is None else x.reshape(shape) for name, x in constants.items()}
    softmax = softmax_options(
        len(weight),
        temperature=temperature,
        group=group,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        softcap=softcap,
    )
    if resolve_backend(backend, hidden) == "torch":
        kept_N = torch.where(mask_BT.flatten(), targets_N, ignore_index)
        outputs = reference.linear_token_logprobs(hidden_ND, weight, kept_N, softmax, main_grad=main_grad)
        logprobs, entropy = (x.view(shape) for x in outputs)
        return reference.policy_loss(
            logprobs, mask=mask_BT, options=options, entropy=entropy, denominator=denominator, **by_row
        )
    check_kernel_dtype(hidden=hidden, weight=weight, **constants)
    projection = Projection(weight=weight.detach().contiguous(), options=softmax, workspace_mb=workspace_mb)
    tokens = _select(mask_BT, denominator, options, targets=targets_N, **by_row)
    trained = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    arguments = (hidden_ND.contiguous(), weight, main_grad, tokens, projection, options, trained)
    loss, metrics = _LinearPolicyLoss.apply(*arguments)
    return loss, named_metrics(metrics)
