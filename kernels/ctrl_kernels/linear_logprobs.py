"""``linear_token_logprobs``: log-probs and entropies of tokens from hidden states, never holding N x V logits.

Forward: chunks of tokens times segments of the vocabulary, each a cuBLAS product into an fp32 workspace and one
Triton pass over it: 2 N V D operations. Backward: the same products again, one Triton pass that turns logits into
their gradient in the factors' type, and two products that accumulate in fp32: 6 N V D operations. A chunk of the
backward pass is as long as a segment's gradient [n, segment] fits the workspace, and takes its fp32 logits in parts:
so at most sizes all tokens are one chunk, whose product is the whole gradient of a segment's weights, rounded once to
their type without an accumulator. With ``save_logits`` the forward pass also keeps, for each logit x, exp(x - the
largest of its tile) in the hidden states' type, which has the same relative precision for every probability; the
backward pass then takes 4 N V D operations. Tokens that are ignored leave before the first product, and tokens without
upstream gradient before the backward pass.

Legend: N tokens, M kept tokens, n tokens of a chunk, V columns of this rank's vocabulary shard, D hidden width, S
segments, K tiles.
"""

from typing import Any

import torch
import torch.distributed as dist

from ctrl_kernels import reference
from ctrl_kernels.operators import first_order, operator
from ctrl_kernels.options import (
    Backend,
    Shard,
    SoftmaxOptions,
    check_kernel_dtype,
    check_targets,
    compute_dtype,
    refuse,
    refuse_transforms,
    resolve_backend,
    softmax_options,
    with_options,
)
from ctrl_kernels.projection import (
    Projection,
    Rows,
    check_linear,
    check_main_grad,
    check_workspace,
    chosen_rows,
    count,
    matrix,
    propagate,
    spread,
    take,
)
from ctrl_kernels.softmax_gradient import logits_gradient, weights_gradient
from ctrl_kernels.softmax_statistics import combine_segments, gather_statistics


def _fake(hidden: torch.Tensor, weight: torch.Tensor, bias: Any, targets: torch.Tensor, save: bool, *rest: Any) -> Any:
    _, _, workspace_mb, backend, options = rest
    dtype = compute_dtype(hidden, weight)
    projection = Projection(weight=weight, options=options, workspace_mb=workspace_mb)
    saved = projection.saved(len(targets) if save else 0, hidden.dtype if backend == "triton" else dtype)
    return *(hidden.new_empty(len(targets), dtype=dtype) for _ in range(3)), *saved


@operator(
    "linear_token_logprobs(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, bool save_logits, bool padded, "
    "bool host_sync, int workspace_mb, str backend, OPTIONS) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    Shard,
)
def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    save_logits: bool,
    padded: bool,
    host_sync: bool,
    workspace_mb: int,
    backend: str,
    options: Shard,
) -> tuple[torch.Tensor, ...]:
    """Log-probs, entropies and log-sum-exps [N]; the softmax weights [M, V] and tile maxima [M, K] to save.

    With ``padded`` the latter have N rows, so that their shape does not depend on the targets. The PyTorch backend
    saves logits in their stead.
    """
    rows = chosen_rows(targets != options.ignore_index, host_sync)
    kept = count(rows, targets)
    projection = Projection(
        weight=weight.to(hidden.dtype).contiguous(), options=options, workspace_mb=workspace_mb, bias=bias
    )
    dtype = hidden.dtype if backend == "triton" else compute_dtype(hidden, weight)
    weights, tile_max = projection.saved((len(targets) if padded else kept) if save_logits else 0, dtype)
    if backend == "torch":
        saved = weights if save_logits else None
        return *reference.linear_forward(hidden, weight, bias, targets, options, saved), weights, tile_max
    targets_M = take(targets, rows)
    statistics = hidden.new_empty((projection.segment_count, kept, 4), dtype=torch.float32)
    chunks = projection.chunks(kept, 4 * projection.segment + hidden.element_size() * hidden.shape[1])
    workspace = projection.workspace(chunks, projection.segment, torch.float32)
    for chunk in chunks:
        projection.statistics(
            take(hidden, rows, chunk),
            targets_M[chunk],
            statistics[:, chunk],
            workspace,
            weights[chunk] if save_logits else None,
            tile_max[chunk] if save_logits else None,
        )
    outputs = combine(statistics, targets_M, options)
    return *(spread(x, rows, len(targets), fill) for x, fill in zip(outputs, _FILLS, strict=True)), weights, tile_max


_FILLS = (0.0, 0.0, float("inf"))
"""Log-prob, entropy and log-sum-exp of ignored tokens: the last makes every probability 0."""


def combine(statistics: torch.Tensor, targets: torch.Tensor, options: Shard) -> tuple[torch.Tensor, ...]:
    """``combine_segments`` over the group's ranks; nothing, on every rank, for no tokens."""
    if len(targets) == 0:
        return tuple(statistics.new_empty(0) for _ in range(3))
    return combine_segments(gather_statistics(statistics, options), targets, options)


def _fake_backward(hidden: torch.Tensor, weight: torch.Tensor, bias: Any, *rest: Any) -> Any:
    main_grad, d_hidden, d_weight, d_bias = rest[8:12]
    like = torch.contiguous_format
    return (
        torch.empty_like(hidden, memory_format=like) if d_hidden else hidden.new_empty(0),
        torch.empty_like(weight, memory_format=like) if d_weight and main_grad is None else weight.new_empty(0),
        torch.empty_like(bias, memory_format=like) if d_bias else weight.new_empty(0),
    )


@operator(
    "linear_token_logprobs_backward(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor logprob, "
    "Tensor entropy, Tensor lse, Tensor weights, Tensor tile_max, Tensor? d_logprob, Tensor? d_entropy, "
    "Tensor(a!)? main_grad, bool train_hidden, bool train_weight, bool train_bias, bool saved, bool host_sync, "
    "int workspace_mb, str backend, OPTIONS) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
    Shard,
)
def backward(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor,
    logprob: torch.Tensor, entropy: torch.Tensor, lse: torch.Tensor, weights: torch.Tensor, tile_max: torch.Tensor,
    d_logprob: torch.Tensor | None, d_entropy: torch.Tensor | None, main_grad: torch.Tensor | None,
    train_hidden: bool, train_weight: bool, train_bias: bool, saved: bool, host_sync: bool, workspace_mb: int,
    backend: str, options: Shard,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """The gradients of hidden states, weight and bias, nothing in place of those not asked for or added elsewhere."""
    nothing = (hidden.new_empty(0), weight.new_empty(0), weight.new_empty(0))
    asked = (train_hidden, train_weight, train_bias)
    if backend == "torch":
        kept_logits = weights if saved else None
        d_hidden, d_weight, d_bias = reference.linear_backward(
            hidden, weight, bias, targets, entropy, lse, kept_logits, d_logprob, d_entropy, options, asked
        )
        if d_weight is not None and main_grad is not None:
            main_grad += d_weight
            d_weight = None
        like = (hidden, weight, bias)
        return tuple(
            n if g is None or x is None else g.to(x.dtype)
            for g, x, n in zip((d_hidden, d_weight, d_bias), like, nothing, strict=True)
        )
    projection = Projection(
        weight=weight.to(hidden.dtype).contiguous(), options=options, workspace_mb=workspace_mb, bias=bias
    )
    active = targets != options.ignore_index
    if host_sync:
        slopes = [g != 0 for g in (d_logprob, d_entropy) if g is not None]
        active = active & (slopes[0] | slopes[-1])
    rows = chosen_rows(active, host_sync)
    scores = [take(x, rows) for x in (targets, logprob, lse, entropy)]
    slopes = [None if g is None else take(g, rows).contiguous() for g in (d_logprob, d_entropy)]
    kept = None
    if saved:
        kept = (weights, tile_max, None)
        if host_sync and count(rows, hidden) < len(weights):  # else those with a gradient are those that were saved
            position = (targets != options.ignore_index).cumsum(0) - 1
            kept = (weights, tile_max, take(position, rows))
    d_hidden, d_weight, d_bias = _propagate(
        projection, hidden, rows, scores, slopes, kept, asked, main_grad, weight.dtype
    )
    if d_hidden is not None:
        d_hidden = spread(d_hidden, rows, len(hidden))
        if options.ranks > 1:
            dist.all_reduce(d_hidden, group=options.process_group)
        d_hidden = d_hidden.to(hidden.dtype)
    if main_grad is not None:
        d_weight = None
    types = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
    found = zip((d_hidden, d_weight, d_bias), types, nothing, strict=True)
    return tuple(n if g is None else g.to(t) for g, t, n in found)


def _propagate(
    projection: Projection,
    hidden: torch.Tensor,
    rows: Rows,
    scores: list[torch.Tensor],
    slopes: list[torch.Tensor | None],
    saved: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None,
    asked: tuple[bool, bool, bool],
    main_grad: torch.Tensor | None,
    weight_dtype: torch.dtype,
) -> list[torch.Tensor | None]:
    """The gradients [M, D], [V, D] and [V] of the chosen tokens, as far as asked for.

    That of the weight is added to ``main_grad``, if given; in one product it comes in the weight's type, else in fp32.
    """
    valid, together = projection.options.valid, projection.together(count(rows, hidden))
    a_token, most_columns = projection.gradient_bytes(together), projection.columns(together)
    chunks = projection.chunks(count(rows, hidden), a_token, whole_waves=True)
    space = projection.workspace(chunks, most_columns, hidden.dtype)
    parts = [p for c in chunks for p in projection.parts(c, a_token, together)] if saved is None else []
    logits_space = projection.workspace(parts, most_columns, torch.float32)
    d_hidden = hidden.new_empty((count(rows, hidden), hidden.shape[1]), dtype=torch.float32) if asked[0] else None
    d_weight = main_grad
    if asked[1] and main_grad is None:
        dtype = weight_dtype if len(chunks) <= 1 else torch.float32
        d_weight = torch.empty_like(projection.weight, dtype=dtype)
    d_bias = torch.zeros_like(projection.weight[:, 0], dtype=torch.float32) if asked[2] else None
    for number, chunk in enumerate(chunks):
        hidden_n = take(hidden, rows, chunk)
        ones = hidden_n.new_ones((1, len(hidden_n)))
        scores_n = [x[chunk] for x in scores]
        slopes_n = [None if g is None else g[chunk] for g in slopes]
        for index, columns in projection.segments(together):
            d_logits = matrix(space, len(hidden_n), columns.stop - columns.start)
            if saved is None:
                parts = projection.parts(chunk, a_token, together)
                _from_products(projection, parts, hidden_n, columns, logits_space, d_logits, scores_n, slopes_n)
            else:
                tiles = slice(index * projection.segment_tiles, (index + together) * projection.segment_tiles)
                _from_weights(projection, saved, chunk, tiles, columns, d_logits, scores_n, slopes_n)
            to_hidden = None if d_hidden is None else d_hidden[chunk]
            to_weight = d_weight[columns] if asked[1] and d_weight is not None else None
            propagate(to_hidden, d_logits, projection.weight[columns], first=index == 0)
            propagate(to_weight, d_logits.T, hidden_n, first=number == 0 and main_grad is None)
            propagate(None if d_bias is None else d_bias[None, columns], ones, d_logits, first=number == 0)
    if d_hidden is not None and valid == 0:
        d_hidden.zero_()
    if d_weight is not None and main_grad is None:
        d_weight[valid if chunks else 0 :] = 0.0
    return [d_hidden, d_weight if asked[1] else None, d_bias]


def _from_products(
    projection: Projection,
    parts: list[slice],
    hidden_nD: torch.Tensor,
    columns: slice,
    logits_space: torch.Tensor,
    d_logits_nV: torch.Tensor,
    scores: list[torch.Tensor],
    slopes: list[torch.Tensor | None],
) -> None:
    """Fill the gradient of a few segments from logits that are formed again, part by part."""
    for part in parts:
        targets, _, lse, entropy = (x[part] for x in scores)
        d_logprob, d_entropy = (None if g is None else g[part] for g in slopes)
        logits_gradient(
            projection.logits(hidden_nD[part], columns, logits_space),
            d_logits_nV[part],
            targets,
            lse,
            entropy,
            d_logprob,
            d_entropy,
            projection.options,
            first_column=columns.start,
            bias_V=projection.bias_of(columns),
        )


def _from_weights(
    projection: Projection,
    saved: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    chunk: slice,
    tiles: slice,
    columns: slice,
    d_logits_nV: torch.Tensor,
    scores: list[torch.Tensor],
    slopes: list[torch.Tensor | None],
) -> None:
    """Fill the gradient of a few segments from the softmax weights that the forward pass kept."""
    weights, tile_max, position = saved
    d_logprob, d_entropy = slopes
    targets, logprob, lse, entropy = scores
    weights_gradient(
        take(weights[:, columns], position, chunk),
        d_logits_nV,
        take(tile_max[:, tiles], position, chunk),
        targets,
        logprob,
        lse,
        entropy,
        torch.zeros_like(lse) if d_logprob is None else d_logprob,
        d_entropy,
        projection.options,
        segment=projection.segment,
        first_column=columns.start,
    )


class _LinearTokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        main_grad: torch.Tensor | None,
        options: Shard,
        save_logits: bool,
        host_sync: bool,
        workspace_mb: int,
        backend: str,
    ) -> Any:
        save_logits = save_logits and any(ctx.needs_input_grad)
        padded = torch.compiler.is_compiling() or not host_sync
        common = (host_sync, workspace_mb, backend, options)
        logprob, entropy, lse, weights, tile_max = forward(hidden, weight, bias, targets, save_logits, padded, *common)
        ctx.save_for_backward(hidden, weight, bias, targets, logprob, entropy, lse, weights, tile_max)
        ctx.main_grad, ctx.save_logits, ctx.common = main_grad, save_logits, common
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    @first_order
    def backward(ctx: Any, d_logprob: torch.Tensor | None, d_entropy: torch.Tensor | None) -> Any:
        if d_logprob is None and d_entropy is None:
            return (None,) * 10
        wanted = ctx.needs_input_grad[:3]
        gradients = backward(
            *ctx.saved_tensors, d_logprob, d_entropy, ctx.main_grad, *wanted, ctx.save_logits, *ctx.common
        )
        given = (wanted[0], wanted[1] and ctx.main_grad is None, wanted[2])
        return *(g if w else None for g, w in zip(gradients, given, strict=True)), *(None,) * 7


@with_options(SoftmaxOptions)
def linear_token_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    return_entropy: bool = False,
    save_logits: bool | None = None,
    main_grad: torch.Tensor | None = None,
    host_sync: bool = True,
    workspace_mb: int | None = None,
    backend: Backend = "auto",
    **options: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``token_logprobs(hidden [N, D] @ weight [V, D].T + bias [V], targets [N])``, with its options and results.

    With a process ``group``, ``weight`` and ``bias`` hold this rank's rows of the output layer, and the gradient of
    ``hidden`` is summed over the group inside, exactly once. ``save_logits`` trades memory, N x V in the hidden states'
    type, for a quarter of the operations; None saves where the logits fit in a small buffer on the PyTorch backend and
    recomputes otherwise. ``main_grad``, fp32 [V, D]: the weight's gradient is added to it instead of being returned.
    ``workspace_mb`` bounds the Triton backend's memory beyond results and accumulators; None: a fortieth of the card's,
    2 GiB at most. ``host_sync=False`` never waits for the device, as CUDA graphs need: rows that are ignored then go
    through the products too, and must be finite.

    ``hidden`` and ``weight`` have one type; beside hidden states in half precision the weight may be fp32, and is
    rounded to theirs for each product, while its gradient is not. Autocast has no say.
    """
    softmax = softmax_options(options)
    refuse("linear_token_logprobs", options, SoftmaxOptions)
    refuse_transforms()
    check_linear(hidden, weight, bias)
    check_targets(targets, len(hidden), hidden.device)
    check_main_grad(main_grad, weight)
    workspace_mb = check_workspace(workspace_mb, hidden.device)
    shard = softmax.shard(len(weight))
    chosen = resolve_backend(backend, hidden)
    if chosen == "triton":
        check_kernel_dtype(hidden=hidden, weight=weight, bias=bias)
    elif save_logits is None:
        save_logits = len(targets) * shard.valid <= reference.CHUNK_ELEMENTS
    if not torch.is_grad_enabled():
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    logprobs, entropy = _LinearTokenLogprobs.apply(
        hidden.contiguous(),
        weight,
        bias,
        targets.contiguous(),
        main_grad,
        shard,
        bool(save_logits),
        host_sync,
        workspace_mb,
        chosen,
    )
    return (logprobs, entropy) if return_entropy else logprobs
