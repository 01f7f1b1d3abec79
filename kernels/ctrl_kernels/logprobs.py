"""``token_logprobs``: log-probs and entropies of tokens from (vocabulary-parallel) logits."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ctrl_kernels import reference
from ctrl_kernels.backend import Backend, resolve_backend
from ctrl_kernels.shard import check_targets, softmax_options


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
    """Log-probs [N] of ``targets`` [N] under softmax(``logits`` [N, V] / ``temperature``), and with ``return_entropy`` the entropies [N].

    Both are fp32 (float64 for float64 logits), in nats, and zero, without gradient, where the target is ``ignore_index``.
    With a process ``group`` the logits are this rank's columns of the vocabulary, from ``vocab_start`` on; shards may differ in
    width, targets are global and the same on every rank, and so must the upstream gradients be. Columns at or past
    ``vocab_size`` are padding: they take no part and get zero gradient. ``softcap`` c first maps a logit x to c tanh(x / c).

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
    resolve_backend(backend, logits)
    logprobs, entropy = reference.token_logprobs(logits, targets, options)
    return (logprobs, entropy) if return_entropy else logprobs
