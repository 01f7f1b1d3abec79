"""``linear_policy_loss``: the policy loss straight from hidden states, forward and backward in one sweep.

Advantages, old log-probs and weights of tokens are known before the forward pass, so a chunk of tokens can form its
logits' gradient while its softmax is still at hand: 6 N V D operations in all, where a forward pass that forgets the
logits and a backward pass that recomputes them take 8. For each chunk: logits part by part and segment by segment in
fp32, of which the statistics and, in the hidden states' type, the softmax weights remain; the log-probs, with one
collective; the loss's slope at each token; the weights turned into the logits' gradient in place; two products that
accumulate the gradients of hidden states and weight in fp32. The backward pass only multiplies these by the upstream
gradient, if that is not 1.

Tokens that the mask drops leave before the first product. Where neither a KL nor an entropy term acts, tokens with
advantage 0 have no gradient and only go through the forward part.

Legend: N tokens, M unmasked tokens, n tokens of a chunk, V columns of this rank's vocabulary shard, D hidden width, B
sequences, T steps, K tiles.
"""

from typing import Any

import torch
import torch.distributed as dist

from ctrl_kernels import losses_reference
from ctrl_kernels.linear_logprobs import linear_token_logprobs
from ctrl_kernels.operators import first_order, operator
from ctrl_kernels.options import (
    Backend,
    PolicyOptions,
    Shard,
    SoftmaxOptions,
    check_denominator,
    check_kernel_dtype,
    check_shapes,
    check_targets,
    policy_options,
    refuse,
    resolve_backend,
    softmax_options,
    with_options,
)
from ctrl_kernels.policy_kernel import METRICS
from ctrl_kernels.policy_loss import named_metrics, policy_denominator, policy_totals
from ctrl_kernels.policy_tokens import PolicyTokens, in_fp16_range, select_tokens
from ctrl_kernels.projection import (
    Projection,
    check_linear,
    check_main_grad,
    check_workspace,
    matrix,
    propagate,
    scale_,
    spread,
    take,
)
from ctrl_kernels.softmax_gradient import weights_gradient
from ctrl_kernels.softmax_statistics import combine_segments, gather_statistics


def _fake(hidden: torch.Tensor, weight: torch.Tensor, bias: Any, *rest: Any) -> Any:
    train_hidden, train_weight, train_bias, wide, main_grad = rest[9:14]
    like = torch.contiguous_format
    half = hidden.dtype == torch.float16
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(len(METRICS), dtype=torch.float32),
        torch.empty_like(hidden, dtype=torch.float32 if half else hidden.dtype, memory_format=like)
        if train_hidden
        else hidden.new_empty(0),
        torch.empty_like(weight, dtype=torch.float32 if half or wide else weight.dtype, memory_format=like)
        if train_weight and main_grad is None
        else hidden.new_empty(0),
        torch.empty_like(bias, dtype=torch.float32) if train_bias else hidden.new_empty(0),
        hidden.new_empty((), dtype=torch.float32),
    )


@operator(
    "linear_policy_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor mask, Tensor old_logprobs, "
    "Tensor advantages, Tensor? ref_logprobs, Tensor? importance_weights, Tensor? drift_weights, Tensor? denominator, "
    "float constant, bool train_hidden, bool train_weight, bool train_bias, bool wide, Tensor(a!)? main_grad, "
    "bool host_sync, int workspace_mb, OPTIONS) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    Shard,
    PolicyOptions,
)
def one_pass(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, mask: torch.Tensor,
    old_logprobs: torch.Tensor, advantages: torch.Tensor, ref_logprobs: torch.Tensor | None,
    importance_weights: torch.Tensor | None, drift_weights: torch.Tensor | None, denominator: torch.Tensor | None,
    constant: float, train_hidden: bool, train_weight: bool, train_bias: bool, wide: bool,
    main_grad: torch.Tensor | None, host_sync: bool, workspace_mb: int, softmax: Shard,
    options: PolicyOptions,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """The loss, its metrics and, as far as asked for, the gradients of hidden states [N, D], weight [V, D], bias [V].

    In fp16 the gradients stay in fp32, in units of the last value returned, until the upstream gradient is known.
    ``wide``: the weight's is wanted in fp32. It is added to ``main_grad`` if that is given.
    """
    projection = Projection(
        weight=weight.to(hidden.dtype).contiguous(), options=softmax, workspace_mb=workspace_mb, bias=bias
    )
    tokens = select_tokens(
        mask,
        constant if denominator is None else denominator,
        options,
        host_sync,
        softmax.ignore_index,
        targets=targets,
        old_logprobs=old_logprobs,
        advantages=advantages,
        ref_logprobs=ref_logprobs,
        importance_weights=importance_weights,
        drift_weights=drift_weights,
    )
    asked = (train_hidden, train_weight, train_bias)
    n = tokens.with_gradient if any(asked) else 0
    weighted, unit = tokens, hidden.new_ones((), dtype=torch.float32)
    if hidden.dtype == torch.float16 and n:
        weighted, unit = in_fp16_range(tokens)
    final = torch.float32 if wide or hidden.dtype == torch.float16 else weight.dtype
    logprobs = hidden.new_empty(len(tokens.targets), dtype=torch.float32)
    entropy = torch.empty_like(logprobs)
    gradients = _sweep(hidden, weighted, projection, options, n, logprobs, entropy, asked, main_grad, final)
    loss, metrics = policy_totals(tokens.terms(slice(None), logprobs, entropy, options), options)
    d_hidden, d_weight, d_bias = gradients
    if d_hidden is not None:
        d_hidden = spread(d_hidden, None if tokens.rows is None else tokens.rows[:n], len(hidden))
        if softmax.ranks > 1:
            dist.all_reduce(d_hidden, group=softmax.process_group)
        d_hidden = d_hidden if hidden.dtype == torch.float16 else d_hidden.to(hidden.dtype)
    if d_weight is not None:
        d_weight = d_weight.to(final)
    found = (hidden.new_empty(0) if x is None else x for x in (d_hidden, d_weight, d_bias))
    return loss, metrics, *found, unit


def _sweep(
    hidden: torch.Tensor,
    tokens: PolicyTokens,
    projection: Projection,
    options: PolicyOptions,
    n: int,
    logprobs: torch.Tensor,
    entropy: torch.Tensor,
    asked: tuple[bool, bool, bool],
    main_grad: torch.Tensor | None,
    weight_dtype: torch.dtype,
) -> list[torch.Tensor | None]:
    """Fill log-probs and entropies [M]; from the first n tokens the gradients [n, D], [V, D] and [V]."""
    valid, width, segment = projection.options.valid, hidden.element_size(), projection.segment
    tiles = projection.segment_count * projection.segment_tiles
    a_token = width * (valid + hidden.shape[1]) + 4 * tiles
    chunks = projection.chunks(n, a_token, whole_waves=True)
    left = len(tokens.targets) - n
    rest = [slice(n + c.start, n + c.stop) for c in projection.chunks(left, 4 * segment + width * hidden.shape[1])]
    all_parts = [p for c in chunks for p in projection.parts(c, a_token)]
    lengths = [x.stop - x.start for x in (*rest, *all_parts)]
    logits_space = hidden.new_empty(max(lengths, default=0) * segment, dtype=torch.float32)
    spaces = (projection.workspace(chunks, valid, hidden.dtype), projection.workspace(chunks, tiles, torch.float32))
    d_hidden = hidden.new_empty((n, hidden.shape[1]), dtype=torch.float32) if asked[0] else None
    d_weight = main_grad
    if asked[1] and main_grad is None:
        dtype = weight_dtype if len(chunks) <= 1 else torch.float32
        d_weight = torch.empty_like(projection.weight, dtype=dtype)
    to_weight = d_weight[:valid] if asked[1] and d_weight is not None else None
    d_bias = torch.zeros_like(projection.weight[:, 0], dtype=torch.float32) if asked[2] else None
    for chunk in (*chunks, *rest):
        hidden_n = take(hidden, tokens.rows, chunk)
        parts = projection.parts(chunk, a_token) if chunk.start < n else [slice(0, len(hidden_n))]
        outputs = (logprobs[chunk], entropy[chunk])
        d_logits = _chunk(projection, tokens, chunk, parts, hidden_n, options, logits_space, spaces, outputs, n)
        if d_logits is None:
            continue
        propagate(None if d_hidden is None else d_hidden[chunk], d_logits, projection.weight[:valid], first=True)
        propagate(to_weight, d_logits.T, hidden_n, first=chunk.start == 0 and main_grad is None)
        to_bias = None if d_bias is None else d_bias[None, :valid]
        propagate(to_bias, hidden_n.new_ones((1, len(hidden_n))), d_logits, first=chunk.start == 0)
    if d_weight is not None and main_grad is None:
        d_weight[valid if chunks else 0 :] = 0.0
    return [d_hidden, d_weight if asked[1] and main_grad is None else None, d_bias]


def _chunk(
    projection: Projection,
    tokens: PolicyTokens,
    chunk: slice,
    parts: list[slice],
    hidden_nD: torch.Tensor,
    options: PolicyOptions,
    logits_space: torch.Tensor,
    spaces: tuple[torch.Tensor, torch.Tensor],
    outputs: tuple[torch.Tensor, torch.Tensor],
    with_gradient: int,
) -> torch.Tensor | None:
    """Fill a chunk's log-probs and entropies; the gradient of its logits [n, V], if it has one."""
    n = len(hidden_nD)
    weights = tile_max = None
    if chunk.start < with_gradient:
        weights = matrix(spaces[0], n, projection.options.valid)
        tile_max = matrix(spaces[1], n, projection.segment_count * projection.segment_tiles)
    statistics = hidden_nD.new_empty((projection.segment_count, n, 4), dtype=torch.float32)
    targets = tokens.targets[chunk]
    for part in parts:
        projection.statistics(
            hidden_nD[part],
            targets[part],
            statistics[:, part],
            logits_space,
            None if weights is None else weights[part],
            None if tile_max is None else tile_max[part],
        )
    gathered = gather_statistics(statistics, projection.options)
    logprob, entropy, lse = combine_segments(gathered, targets, projection.options)
    outputs[0].copy_(logprob)
    outputs[1].copy_(entropy)
    if weights is None or tile_max is None:
        return None
    d_logprob, d_entropy = torch.empty_like(lse), torch.empty_like(lse)
    tokens.terms(chunk, logprob, entropy, options, d_logprobs=d_logprob, d_entropy=d_entropy)
    weights_gradient(
        weights,
        weights,
        tile_max,
        targets,
        logprob,
        lse,
        entropy,
        d_logprob,
        d_entropy if options.entropy_coef != 0 else None,
        projection.options,
        segment=projection.segment,
    )
    return weights


def _check_unit(d_loss: torch.Tensor) -> None:
    """Raise RuntimeError unless the upstream gradient is 1, where looking at it does not stall a device."""
    if d_loss.device.type == "cpu" and not torch.compiler.is_compiling() and d_loss.item() != 1.0:
        raise RuntimeError(f"unit_gradient=True promised an upstream gradient of 1, it is {d_loss.item()}")


class _LinearPolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        inputs: tuple[Any, ...],
        main_grad: torch.Tensor | None,
        at_once: bool,
        common: tuple[Any, ...],
    ) -> Any:
        # With main_grad the weight's gradient waits, in fp32, for the upstream one, unless that is known to be 1.
        now = (main_grad is not None, main_grad if at_once else None)
        asked = ctx.needs_input_grad[:3]
        arguments = (hidden, weight, bias, *inputs, *asked, *now, *common)
        loss, metrics, *gradients = one_pass(*arguments)
        ctx.mark_non_differentiable(metrics)
        ctx.main_grad, ctx.at_once = main_grad, at_once
        ctx.types = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*gradients)
        else:
            ctx.save_for_backward(hidden, weight)
            ctx.arguments, ctx.gradients = arguments, gradients
        return loss, metrics

    @staticmethod
    @first_order
    def backward(ctx: Any, d_loss: torch.Tensor, d_metrics: torch.Tensor) -> Any:
        if ctx.at_once:
            _check_unit(d_loss)
        if torch.compiler.is_compiling():
            *gradients, unit = ctx.saved_tensors
            scaled = [x * (d_loss * unit) for x in gradients]
        else:
            # Scaled in place and given away, so a second pass over a retained graph forms the gradients again.
            ctx.saved_tensors  # noqa: B018  (raises if an input was changed in place since)
            *gradients, unit = ctx.gradients or one_pass(*ctx.arguments)[2:]
            ctx.gradients = None
            scaled = [scale_(x, d_loss * unit) for x in gradients]
        d_hidden, d_weight, d_bias = (
            x.to(dtype) if needed else None
            for x, dtype, needed in zip(scaled, ctx.types, ctx.needs_input_grad[:3], strict=True)
        )
        if ctx.main_grad is not None and ctx.needs_input_grad[1]:
            if not ctx.at_once:
                ctx.main_grad += scaled[1]
            d_weight = None
        return d_hidden, d_weight, d_bias, None, None, None, None


def _check_tokens(
    hidden: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor,
    constants: dict[str, torch.Tensor | None],
    options: PolicyOptions,
) -> None:
    """Raise ValueError unless the tensors have one shape, and one that the options can work with."""
    check_shapes(targets.shape, hidden.device, mask=mask, **constants)
    if hidden.shape[:-1] != targets.shape or targets.dim() not in (1, 2):
        raise ValueError(
            f"hidden must be (N, D) with targets (N,), or (B, T, D) with targets (B, T), "
            f"got {tuple(hidden.shape)} and {tuple(targets.shape)}"
        )
    if options.by_sequence:
        name = f"ratio={options.ratio!r}" if options.ratio != "token" else f"objective={options.objective!r}"
        raise ValueError(f"{name} needs all log-probs first: use linear_token_logprobs and policy_loss")
    if targets.dim() == 1 and options.aggregation != "token-mean":
        raise ValueError(
            f"aggregation={options.aggregation!r} needs sequences: pass hidden (B, T, D), the others (B, T)"
        )


def _composed(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor,
    constants: dict[str, torch.Tensor | None],
    denominator: float | torch.Tensor | None,
    softmax: SoftmaxOptions,
    options: PolicyOptions,
    layer: dict[str, torch.Tensor | None],
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The PyTorch backend: the two functions that this one unites, one after the other."""
    settings: Any = layer | {name: getattr(softmax, name) for name in SoftmaxOptions.__slots__}
    logprobs, entropy = linear_token_logprobs(
        hidden, weight, targets, return_entropy=True, backend="torch", **settings
    )  # fmt: skip
    return losses_reference.policy_loss(
        logprobs.view(mask.shape), mask=mask, options=options, entropy=entropy.view(mask.shape),
        denominator=denominator, **constants,
    )  # fmt: skip


@with_options(SoftmaxOptions, PolicyOptions)
def linear_policy_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, old_logprobs: torch.Tensor,
    advantages: torch.Tensor, mask: torch.Tensor, *, bias: torch.Tensor | None = None,
    ref_logprobs: torch.Tensor | None = None, importance_weights: torch.Tensor | None = None,
    drift_weights: torch.Tensor | None = None, denominator: float | torch.Tensor | None = None,
    main_grad: torch.Tensor | None = None, unit_gradient: bool = False, host_sync: bool = True,
    workspace_mb: int | None = None, backend: Backend = "auto", **options: Any,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:  # fmt: skip
    """``policy_loss`` of the log-probs and entropies that ``linear_token_logprobs`` gives, with the former's results.

    ``hidden`` is [N, D] with the other tensors [N], or [B, T, D] with [B, T], which aggregations over sequences need.
    A token counts where ``mask`` is not 0 and its target is not ``ignore_index``. The options are those of the two
    functions. What needs all log-probs of a sequence before the first gradient, and so two passes, is a ValueError:
    ratios over sequences, and ``objective="gmpo"``.

    The Triton backend forms the gradients in the forward pass and only scales them in the backward pass; in fp16 so
    that a loss scale, which comes as the upstream gradient, still finds what it is to save from underflow.
    ``unit_gradient`` promises that the upstream gradient is 1 and comes once: the weight's gradient then goes to
    ``main_grad`` in the forward pass, and no second [V, D] exists; another gradient is a RuntimeError on a CPU and
    not looked at on a GPU. The PyTorch backend composes the two functions,
    which is this one's definition.
    """
    softmax, policy = softmax_options(options), policy_options(options)
    refuse("linear_policy_loss", options, SoftmaxOptions, PolicyOptions)
    constants = {
        "old_logprobs": old_logprobs, "advantages": advantages, "ref_logprobs": ref_logprobs,
        "importance_weights": importance_weights, "drift_weights": drift_weights,
    }  # fmt: skip
    _check_tokens(hidden, targets, mask, constants, policy)
    policy.check_terms(ref_logprobs=ref_logprobs)
    if unit_gradient and main_grad is None:
        raise ValueError("unit_gradient=True needs main_grad")
    check_denominator(denominator)
    check_main_grad(main_grad, weight)
    workspace_mb = check_workspace(workspace_mb, hidden.device)
    hidden_ND, targets_N = hidden.flatten(0, -2), targets.flatten()
    check_linear(hidden_ND, weight, bias)
    check_targets(targets_N, len(hidden_ND), hidden.device)
    shape = targets.shape if targets.dim() == 2 else (1, len(targets))
    mask_BT = ((mask != 0) & (targets != softmax.ignore_index)).view(shape)
    by_row = {name: None if x is None else x.detach().reshape(shape) for name, x in constants.items()}
    if resolve_backend(backend, hidden) == "torch":
        kept_N = torch.where(mask_BT.flatten(), targets_N, softmax.ignore_index)
        layer = {"bias": bias, "main_grad": main_grad}
        loss, found = _composed(hidden_ND, weight, kept_N, mask_BT, by_row, denominator, softmax, policy, layer)
        if unit_gradient and loss.requires_grad and not torch.compiler.is_compiling():
            loss.register_hook(_check_unit)
        return loss, found
    check_kernel_dtype(hidden=hidden, weight=weight, bias=bias, **constants)
    if not torch.is_grad_enabled():
        hidden_ND, weight, bias = hidden_ND.detach(), weight.detach(), None if bias is None else bias.detach()
    scalar = policy_denominator(mask_BT, denominator, policy)
    on_device = isinstance(scalar, torch.Tensor)
    inputs = (targets_N, mask_BT, *by_row.values(), *((scalar, 1.0) if on_device else (None, scalar)))
    common = (host_sync, workspace_mb, softmax.shard(len(weight)), policy)
    loss, metrics = _LinearPolicyLoss.apply(
        hidden_ND.contiguous(), weight, bias, inputs, main_grad, unit_gradient, common
    )
    return loss, named_metrics(metrics)
