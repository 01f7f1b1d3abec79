"""``token_logprobs``: log-probs and entropies of tokens from (vocabulary-parallel) logits.

Legend: N tokens, V columns of this rank's vocabulary shard.
"""

from __future__ import annotations

from typing import Any

import torch

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
from ctrl_kernels.softmax_gradient import logits_gradient
from ctrl_kernels.softmax_statistics import (
    combine_segments,
    gather_statistics,
    segment_columns,
    segment_count,
    softmax_statistics,
)


def _fake(logits: torch.Tensor, targets: torch.Tensor, *_: Any) -> Any:
    return tuple(logits.new_empty(len(targets), dtype=compute_dtype(logits)) for _ in range(3))


@operator(
    "token_logprobs(Tensor logits, Tensor targets, str backend, OPTIONS) -> (Tensor, Tensor, Tensor)", _fake, Shard
)
def _forward(logits: torch.Tensor, targets: torch.Tensor, backend: str, options: Shard) -> tuple[torch.Tensor, ...]:
    """Log-probs, entropies and log-sum-exps [N]."""
    if backend == "torch":
        return reference.logprobs_forward(logits, targets, options)
    statistics = logits.new_empty((segment_count(options.ranks), logits.shape[0], 4), dtype=torch.float32)
    segment = segment_columns(logits.shape[1], options.ranks)
    softmax_statistics(logits, targets, statistics, options, segment=segment)
    return combine_segments(gather_statistics(statistics, options), targets, options)


def _fake_backward(logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@operator(
    "token_logprobs_backward(Tensor logits, Tensor targets, Tensor entropy, Tensor lse, Tensor? d_logprob, "
    "Tensor? d_entropy, str backend, OPTIONS) -> Tensor",
    _fake_backward,
    Shard,
)
def _backward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    entropy: torch.Tensor,
    lse: torch.Tensor,
    d_logprob: torch.Tensor | None,
    d_entropy: torch.Tensor | None,
    backend: str,
    options: Shard,
) -> torch.Tensor:
    """The gradient of the logits [N, V]."""
    if backend == "torch":
        return reference.logprobs_backward(logits, targets, entropy, lse, d_logprob, d_entropy, options)
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    logits_gradient(logits, gradient, targets, lse, entropy, d_logprob, d_entropy, options)
    return gradient


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, options: Shard, backend: str) -> Any:
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        targets = targets.contiguous()
        logprob, entropy, lse = _forward(logits, targets, backend, options)
        ctx.save_for_backward(logits, targets, entropy, lse)
        ctx.options, ctx.backend = options, backend
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    @first_order
    def backward(ctx: Any, d_logprob: torch.Tensor | None, d_entropy: torch.Tensor | None) -> Any:
        if d_logprob is None and d_entropy is None:
            return (None,) * 4
        gradient = _backward(*ctx.saved_tensors, d_logprob, d_entropy, ctx.backend, ctx.options)
        return gradient, None, None, None


@with_options(SoftmaxOptions)
def token_logprobs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    return_entropy: bool = False,
    backend: Backend = "auto",
    **options: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [N] of ``targets`` [N] under softmax(``logits`` [N, V] / ``temperature``).

    With ``return_entropy`` also the entropies [N] of these distributions. Both are fp32 (float64 for float64 logits),
    in nats, and zero, without gradient, where the target is ``ignore_index``: such rows are not read. With a process
    ``group`` the logits are this rank's columns of the vocabulary, from ``vocab_start`` on; shards may differ in
    width, targets are global and the same on every rank, and so must the upstream gradients be. Columns at or past
    ``vocab_size`` are padding: they take no part and get zero gradient. ``ctrl_kernels.SoftmaxOptions`` states all
    ``options``.

    A target outside the vocabulary gives NaN, in the gradient too (checking it would stall the device). A row of -inf
    alone gives log-prob -inf, entropy 0 and gradient 0. Raises ValueError for other arguments out of range.
    """
    softmax = softmax_options(options)
    refuse("token_logprobs", options, SoftmaxOptions)
    refuse_transforms()
    if logits.dim() != 2:
        raise ValueError(f"logits must have shape (N, V), got {tuple(logits.shape)}")
    check_targets(targets, logits.shape[0], logits.device)
    chosen = resolve_backend(backend, logits) if logits.shape[0] else "torch"
    if chosen == "triton":
        check_kernel_dtype(logits=logits)
    logprobs, entropy = _TokenLogprobs.apply(logits, targets, softmax.shard(logits.shape[1]), chosen)
    return (logprobs, entropy) if return_entropy else logprobs
