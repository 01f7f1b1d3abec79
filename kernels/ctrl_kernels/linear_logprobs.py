"""``linear_token_logprobs``: log-probs and entropies of tokens from hidden states, never holding N x V logits."""

from __future__ import annotations

import torch
import torch.distributed as dist

from ctrl_kernels import reference
from ctrl_kernels.backend import Backend, resolve_backend
from ctrl_kernels.shard import check_targets, softmax_options


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
    backend: Backend = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """``token_logprobs(hidden [N, D] @ weight [V, D].T, targets [N])``, with the options and results of that function."""
    check_linear(hidden, weight)
    check_targets(targets, len(hidden), hidden.device)
    options = softmax_options(
        len(weight),
        temperature=temperature,
        group=group,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        softcap=softcap,
    )
    resolve_backend(backend, hidden)
    logprobs, entropy = reference.linear_token_logprobs(hidden, weight, targets, options, save_logits)
    return (logprobs, entropy) if return_entropy else logprobs
