"""``token_logprobs``: log-probs and entropies of tokens from (vocabulary-parallel) logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from ctrl_kernels import reference
from ctrl_kernels.backend import Backend, check_kernel_dtype, resolve_backend
from ctrl_kernels.shard import SoftmaxOptions, check_targets, gather_statistics, softmax_options
from ctrl_kernels.softmax_gradient import logits_gradient
from ctrl_kernels.softmax_statistics import combine_segments, segment_columns, segment_count, softmax_statistics


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, options: SoftmaxOptions) -> Any:
        logits = logits if logits.stride(1) == 1 else logits.contiguous()
        targets = targets.contiguous()
        statistics = logits.new_empty((segment_count(options.ranks), len(logits), 4), dtype=torch.float32)
        segment = segment_columns(logits.shape[1], options.ranks)
        softmax_statistics(logits, targets, statistics, options, segment=segment)
        logprob, entropy, lse = combine_segments(gather_statistics(statistics, options), targets, options)
        ctx.save_for_backward(logits, targets, lse, entropy)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return logprob, entropy

    @staticmethod
    def backward(ctx: Any, d_logprob: torch.Tensor | None, d_entropy: torch.Tensor | None) -> Any:
        logits, targets, lse, entropy = ctx.saved_tensors
        if d_logprob is None and d_entropy is None:
            return None, None, None
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        logits_gradient(logits, gradient, targets, lse, entropy, d_logprob, d_entropy, ctx.options)
        return gradient, None, None


def token_logprobs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    vocab_start: int = 0,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    softcap: float | None = None,
    backend: Backend = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [N] of ``targets`` [N] under softmax(``logits`` [N, V] / ``temperature``).

    With ``return_entropy`` also the entropies [N] of these distributions. Both are fp32 (float64 for float64 logits),
    in nats, and zero, without gradient, where the target is ``ignore_index``. With a process ``group`` the logits are
    this rank's columns of the vocabulary, from ``vocab_start`` on; shards may differ in width, targets are global and
    the same on every rank, and so must the upstream gradients be. Columns at or past ``vocab_size`` are padding: they
    take no part and get zero gradient. ``softcap`` c first maps a logit x to c tanh(x / c).

    A target outside the vocabulary gives NaN, in the gradient too (checking it would stall the device). A row of -inf
    alone gives log-prob -inf, entropy 0 and gradient 0. Raises ValueError for other arguments out of range.
    """
    if logits.dim() != 2:
        raise ValueError(f"logits must have shape (N, V), got {tuple(logits.shape)}")
    check_targets(targets, len(logits), logits.device)
    options = softmax_options(
        logits.shape[1],
        temperature=temperature,
        group=group,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        softcap=softcap,
    )
    if resolve_backend(backend, logits) == "triton" and len(logits) > 0:
        check_kernel_dtype(logits=logits)
        logprobs, entropy = _TokenLogprobs.apply(logits, targets, options)
    else:
        logprobs, entropy = reference.token_logprobs(logits, targets, options)
    return (logprobs, entropy) if return_entropy else logprobs
