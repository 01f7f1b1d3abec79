"""``linear_token_logprobs``: log-probs and entropies of tokens from hidden states, never holding N x V logits.

Forward: chunks of tokens times segments of the vocabulary, each a cuBLAS product into an fp32 workspace and one
Triton pass over it: 2 N V D operations. Backward: the same products again, one Triton pass that turns logits into
their gradient in the factors' type, and two products that accumulate in fp32: 6 N V D operations. With
``save_logits`` the forward pass also keeps, for each logit x, exp(x - the largest of its tile) in the hidden states'
type, which has the same relative precision for every probability; the backward pass then takes 4 N V D operations.
Tokens that are ignored leave before the first product, and tokens without upstream gradient before the backward pass.

Legend: N tokens, M kept tokens, n tokens of a chunk, V columns of this rank's vocabulary shard, D hidden width, S
segments, K tiles.
"""

from typing import Any

import torch
import torch.distributed as dist

from ctrl_kernels import reference
from ctrl_kernels.backend import Backend, check_kernel_dtype, resolve_backend
from ctrl_kernels.projection import WORKSPACE_MB, Projection, matrix, propagate
from ctrl_kernels.shard import check_targets, gather_statistics, softmax_options
from ctrl_kernels.softmax_gradient import logits_gradient, weights_gradient
from ctrl_kernels.softmax_statistics import combine_segments


def check_linear(hidden: torch.Tensor, weight: torch.Tensor) -> None:
    """Raise ValueError unless ``hidden`` [N, D] and ``weight`` [V, D] can be multiplied."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden (N, D) and weight (V, D) must share D, got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if hidden.dtype != weight.dtype or hidden.device != weight.device:
        raise ValueError(
            f"hidden and weight must share dtype and device, got {hidden.dtype} on {hidden.device} "
            f"and {weight.dtype} on {weight.device}"
        )


def check_main_grad(main_grad: torch.Tensor | None, weight: torch.Tensor) -> None:
    """Raise ValueError unless ``main_grad`` is None or a dense fp32 tensor shaped like ``weight``."""
    if main_grad is None:
        return
    if main_grad.shape != weight.shape or main_grad.dtype != torch.float32 or not main_grad.is_contiguous():
        raise ValueError(
            f"main_grad must be dense float32 of shape {tuple(weight.shape)}, "
            f"got {main_grad.dtype} of shape {tuple(main_grad.shape)}"
        )


def take(x: torch.Tensor, rows: torch.Tensor | slice) -> torch.Tensor:
    """The rows of ``x`` at distinct increasing indices; a view of ``x`` if those are all or a slice."""
    if isinstance(rows, slice):
        return x[rows]
    return x if len(rows) == len(x) else x.index_select(0, rows)


def part(rows: torch.Tensor, chunk: slice, length: int) -> torch.Tensor | slice:
    """A chunk of distinct increasing indices below ``length``: as a slice if they are all of them."""
    return chunk if len(rows) == length else rows[chunk]


def spread(x: torch.Tensor, rows: torch.Tensor, length: int, dtype: torch.dtype) -> torch.Tensor:
    """``x`` at the given rows of a tensor of this length and type that is 0 elsewhere."""
    if len(rows) == length:
        return x.to(dtype)
    return x.new_zeros((length, *x.shape[1:]), dtype=dtype).index_copy_(0, rows, x.to(dtype))


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        main_grad: torch.Tensor | None,
        projection: Projection,
        save_logits: bool,
    ) -> Any:
        options = projection.options
        kept = (targets != options.ignore_index).nonzero().squeeze(1)
        targets_M = take(targets, kept)
        statistics = hidden.new_empty((projection.segment_count, len(kept), 4), dtype=torch.float32)
        weights = tile_max = None
        if save_logits:
            weights = hidden.new_empty((len(kept), options.valid))
            tiles = projection.segment_count * projection.segment_tiles
            tile_max = hidden.new_empty((len(kept), tiles), dtype=torch.float32)
        chunks = projection.chunks(len(kept), 4 * projection.segment + hidden.element_size() * hidden.shape[1])
        workspace = projection.workspace(chunks, projection.segment, torch.float32)
        for rows in chunks:
            projection.statistics(
                take(hidden, part(kept, rows, len(hidden))),
                targets_M[rows],
                statistics[:, rows],
                workspace,
                None if weights is None else weights[rows],
                None if tile_max is None else tile_max[rows],
            )
        kept_logprob, kept_entropy, lse = _combine(statistics, targets_M, projection)
        ctx.save_for_backward(hidden, weight, targets_M, kept, kept_logprob, kept_entropy, lse, weights, tile_max)
        ctx.projection, ctx.main_grad = projection, main_grad
        ctx.set_materialize_grads(False)
        return tuple(spread(x, kept, len(targets), torch.float32) for x in (kept_logprob, kept_entropy))

    @staticmethod
    def backward(ctx: Any, d_logprob: torch.Tensor | None, d_entropy: torch.Tensor | None) -> Any:
        hidden, weight, _, kept, *_ = ctx.saved_tensors
        if d_logprob is None and d_entropy is None:
            return (None,) * 6
        d_logprob_M, d_entropy_M = (None if g is None else take(g, kept).contiguous() for g in (d_logprob, d_entropy))
        active = sum((g != 0 for g in (d_logprob_M, d_entropy_M) if g is not None), torch.zeros_like(kept))
        active = active.nonzero().squeeze(1)
        d_hidden = d_weight = None
        if ctx.needs_input_grad[0]:
            d_hidden = hidden.new_empty((len(active), hidden.shape[1]), dtype=torch.float32)
        if ctx.needs_input_grad[1]:
            d_weight = weight.new_empty(weight.shape, dtype=torch.float32) if ctx.main_grad is None else ctx.main_grad
        _backpropagate(ctx, d_logprob_M, d_entropy_M, active, d_hidden, d_weight)
        if d_hidden is not None:
            d_hidden = spread(d_hidden, active, len(kept), torch.float32)
            if ctx.projection.options.ranks > 1:
                dist.all_reduce(d_hidden, group=ctx.projection.options.group)
            d_hidden = spread(d_hidden, kept, len(hidden), hidden.dtype)
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype) if ctx.main_grad is None else None
        return d_hidden, d_weight, None, None, None, None


def _combine(statistics: torch.Tensor, targets: torch.Tensor, projection: Projection) -> tuple[torch.Tensor, ...]:
    """``combine_segments`` over the group's ranks; nothing, on every rank, for no tokens."""
    if len(targets) == 0:
        return tuple(statistics.new_empty((3, 0)).unbind(0))
    return combine_segments(gather_statistics(statistics, projection.options), targets, projection.options)


def _backpropagate(
    ctx: Any,
    d_logprob_M: torch.Tensor | None,
    d_entropy_M: torch.Tensor | None,
    active: torch.Tensor,
    d_hidden: torch.Tensor | None,
    d_weight: torch.Tensor | None,
) -> None:
    """Fill ``d_hidden`` [active, D] and ``d_weight`` [V, D], or add to the latter if it is ``main_grad``; both fp32."""
    hidden, weight, targets_M, kept, logprob, entropy, lse, weights, tile_max = ctx.saved_tensors
    projection: Projection = ctx.projection
    width = hidden.element_size()
    narrow = 0 if weights is None and hidden.dtype == torch.float32 else width
    wide = 4 if weights is None else 0
    chunks = projection.chunks(len(active), projection.segment * (wide + narrow) + width * hidden.shape[1])
    logits_space = projection.workspace(chunks, projection.segment, torch.float32) if wide else None
    gradient_space = projection.workspace(chunks, projection.segment, hidden.dtype) if narrow else logits_space
    assert gradient_space is not None
    for number, rows in enumerate(chunks):
        chosen = part(active, rows, len(kept))
        everything = isinstance(chosen, slice) and len(kept) == len(hidden)
        hidden_n = take(hidden, chosen if everything else kept[chosen])
        targets_n, logprob_n, entropy_n, lse_n = (x[chosen] for x in (targets_M, logprob, entropy, lse))
        d_logprob_n, d_entropy_n = (None if g is None else g[chosen] for g in (d_logprob_M, d_entropy_M))
        for index, columns in projection.segments():
            d_logits = matrix(gradient_space, len(hidden_n), columns.stop - columns.start)
            if weights is None:
                assert logits_space is not None
                logits = projection.logits(hidden_n, columns, logits_space)
                scores = (targets_n, lse_n, entropy_n, d_logprob_n, d_entropy_n)
                logits_gradient(logits, d_logits, *scores, projection.options, first_column=columns.start)
            else:
                tiles = slice(index * projection.segment_tiles, (index + 1) * projection.segment_tiles)
                weights_gradient(
                    take(weights[:, columns], chosen),
                    d_logits,
                    take(tile_max[:, tiles], chosen),
                    targets_n,
                    logprob_n,
                    lse_n,
                    entropy_n,
                    torch.zeros_like(lse_n) if d_logprob_n is None else d_logprob_n,
                    d_entropy_n,
                    projection.options,
                    segment=projection.segment,
                    first_column=columns.start,
                )
            propagate(
                d_logits,
                hidden_n,
                weight[columns],
                None if d_hidden is None else d_hidden[rows],
                None if d_weight is None else d_weight[columns],
                first_hidden=index == 0,
                first_weight=number == 0 and ctx.main_grad is None,
            )
    if d_hidden is not None and projection.options.valid == 0:
        d_hidden.zero_()
    if d_weight is not None and ctx.main_grad is None:
        d_weight[projection.options.valid if chunks else 0 :] = 0.0


def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    softcap: float | None = None,
    save_logits: bool | None = None,
    main_grad: torch.Tensor | None = None,
    workspace_mb: int = WORKSPACE_MB,
    backend: Backend = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``token_logprobs(hidden [N, D] @ weight [V, D].T, targets [N])``, with that function's options and results.

    With a process ``group``, ``weight`` holds this rank's rows of the output layer, and the gradient of ``hidden`` is
    summed over the group inside, exactly once. ``save_logits`` trades memory, N x V in the hidden states' type, for a
    quarter of the operations; None saves where the logits fit in a small buffer on the PyTorch backend and recomputes
    otherwise. ``main_grad``, fp32 [V, D]: the weight's gradient is added to it instead of being returned.
    ``workspace_mb`` bounds the Triton backend's memory beyond results and accumulators.
    """
    check_linear(hidden, weight)
    check_targets(targets, len(hidden), hidden.device)
    check_main_grad(main_grad, weight)
    if workspace_mb < 1:
        raise ValueError(f"workspace_mb={workspace_mb} must be at least 1")
    options = softmax_options(
        len(weight),
        temperature=temperature,
        group=group,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        softcap=softcap,
    )
    if resolve_backend(backend, hidden) == "triton":
        check_kernel_dtype(hidden=hidden, weight=weight)
        trained = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        projection = Projection(weight=weight.detach().contiguous(), options=options, workspace_mb=workspace_mb)
        logprobs, entropy = _LinearTokenLogprobs.apply(
            hidden.contiguous(), weight, targets.contiguous(), main_grad, projection, bool(save_logits) and trained
        )
    else:
        logprobs, entropy = reference.linear_token_logprobs(hidden, weight, targets, options, save_logits, main_grad)
    return (logprobs, entropy) if return_entropy else logprobs
