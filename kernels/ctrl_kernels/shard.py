"""This rank's part of a vocabulary, and the statistics that ranks exchange about a softmax over all of it.

Legend: N tokens, V columns of this rank's shard, P parts (of one rank or of all) with statistics of their own.

The statistics of one part of the vocabulary, for scaled logits z, are four numbers a token:

    max m = max z;  sum s = sum exp(z - m);  weighted w = sum exp(z - m) (z - m);  target t = z[target], NaN if
    elsewhere.

Parts combine exactly: with M the largest m, S = sum s exp(m - M) and W = sum (w + s (m - M)) exp(m - M), the
log-sum-exp is M + log S, the log-prob is t - (M + log S), and the entropy is log S - W / S. Shifting by the maximum
keeps every number small, so that neither logits near +-500 nor -inf lose anything.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

FLOOR = -800.0  # exp(FLOOR) is 0 in float64 too: stands in for -inf where -inf * 0 would be NaN
MIN_TEMPERATURE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftmaxOptions:
    """What defines the distribution over the vocabulary: this rank's shard of it, and the map from logits to scores.

    ``valid`` counts the shard's columns that belong to the true vocabulary; those after them are padding.
    Scores are ``softcap * tanh(logit / softcap) / temperature``, without the first step if ``softcap`` is None.
    """

    start: int
    valid: int
    ignore_index: int
    temperature: float
    softcap: float | None
    group: dist.ProcessGroup | None

    @property
    def ranks(self) -> int:
        """How many ranks share the vocabulary."""
        return 1 if self.group is None else dist.get_world_size(self.group)


def softmax_options(
    columns: int,
    *,
    temperature: float,
    group: dist.ProcessGroup | None,
    vocab_start: int,
    vocab_size: int | None,
    ignore_index: int,
    softcap: float | None,
) -> SoftmaxOptions:
    """Check the options that all log-prob functions share; ``columns`` is the width of this rank's shard."""
    if not (math.isfinite(temperature) and temperature >= MIN_TEMPERATURE):
        raise ValueError(f"temperature={temperature} must be finite and at least {MIN_TEMPERATURE}")
    if vocab_start < 0:
        raise ValueError(f"vocab_start={vocab_start} must not be negative")
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"vocab_size={vocab_size} must be positive")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap={softcap} must be positive and finite, or None")
    valid = columns if vocab_size is None else min(max(vocab_size - vocab_start, 0), columns)
    return SoftmaxOptions(
        start=vocab_start,
        valid=valid,
        ignore_index=ignore_index,
        temperature=float(temperature),
        softcap=None if softcap is None else float(softcap),
        group=group,
    )


def check_targets(targets: torch.Tensor, tokens: int, device: torch.device) -> None:
    """Raise ValueError unless ``targets`` is an integer vector with an entry a token, on ``device``."""
    if targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"targets must be int32 or int64, got {targets.dtype}")
    if targets.shape != (tokens,):
        raise ValueError(f"targets must have shape ({tokens},), one for each row, got {tuple(targets.shape)}")
    if targets.device != device:
        raise ValueError(f"targets are on {targets.device}, the other inputs on {device}")


def gather_statistics(statistics_PN4: torch.Tensor, options: SoftmaxOptions) -> torch.Tensor:
    """The statistics of every rank's parts, in rank order: the one collective of a forward pass."""
    if options.ranks == 1:
        return statistics_PN4
    parts, tokens, four = statistics_PN4.shape
    gathered = statistics_PN4.new_empty((options.ranks * parts, tokens, four))
    dist.all_gather_into_tensor(gathered, statistics_PN4.contiguous(), group=options.group)
    return gathered


def combine_statistics(statistics_PN4: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs, entropies and log-sum-exps [N] of a whole vocabulary from the statistics of its parts.

    A target that no part holds gives a NaN log-prob and log-sum-exp, so that its gradient is NaN too: loud, and
    without waiting for the device. A row of -inf alone gives log-prob -inf, entropy 0 and log-sum-exp +inf, so that
    its gradient is 0.
    """
    max_PN, sum_PN, weighted_PN, target_PN = statistics_PN4.unbind(2)
    max_N = max_PN.amax(0)
    max_N = torch.where(max_N == -math.inf, 0.0, max_N)
    shift_PN = (max_PN - max_N).clamp_min(FLOOR)
    scale_PN = shift_PN.exp()
    sum_N = (sum_PN * scale_PN).sum(0)
    weighted_N = ((weighted_PN + sum_PN * shift_PN) * scale_PN).sum(0)
    held_PN = ~target_PN.isnan()
    held_N = held_PN.any(0)
    target_N = torch.where(held_PN, target_PN, 0.0).sum(0)
    empty_N = sum_N == 0
    lse_N = max_N + sum_N.log()
    logprob_N = torch.where(held_N, torch.where(empty_N, -math.inf, target_N - lse_N), math.nan)
    entropy_N = torch.where(empty_N, 0.0, sum_N.log() - weighted_N / sum_N)
    lse_N = torch.where(held_N, torch.where(empty_N, math.inf, lse_N), math.nan)
    return logprob_N, entropy_N, lse_N
