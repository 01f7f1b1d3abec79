"""The losses of SFT and RL over one micro-batch, on the project's kernels.

A loss is made for a batch, with its global denominator, and called for each micro-batch (``policy.Loss``).
Shapes: N response tokens of the micro-batch, B its sequences, R their longest response; S sequences of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import ctrl_kernels
import torch
from torch import Tensor

from ctrl_hpc.config import RLConfig
from ctrl_hpc.train.batch import Batch, MicroBatch
from ctrl_hpc.train.policy import Head


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTLoss:
    """Mean negative log-likelihood of the response tokens of a batch."""

    n_tokens: int
    """Response tokens of the whole batch."""

    def __call__(self, head: Head, micro: MicroBatch, hidden_ND: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's part of the mean."""
        logprobs_N = head.logprobs(hidden_ND, micro.targets_N, 1.0)
        return -logprobs_N.sum() / self.n_tokens, {}


@dataclass(frozen=True, slots=True, kw_only=True)
class RLLoss:
    """The clipped policy objective of GRPO with its KL and entropy terms (paper, section 3.3; Shao et al. 2024).

    Logged, as means over the batch's tokens: ``kl`` to the reference, ``clip_fraction``, ``approx_kl`` to the policy
    that is improved, ``ratio``, ``entropy``.
    """

    options: RLConfig
    advantages_S: Tensor
    old_SR: Tensor
    """Log-probabilities before the update, by this trainer."""
    reference_SR: Tensor | None
    importance_SR: Tensor | None
    """Truncated importance weights, where rollouts are not by the old policy."""
    n_sequences: int
    n_tokens: int

    @classmethod
    def of(
        cls,
        batch: Batch,
        options: RLConfig,
        *,
        advantages_S: Tensor,
        old_SR: Tensor,
        reference_SR: Tensor | None = None,
        importance_SR: Tensor | None = None,
    ) -> RLLoss:
        """The loss of a batch, normalised by the batch's own tokens or sequences."""
        return cls(
            options=options,
            advantages_S=advantages_S,
            old_SR=old_SR,
            reference_SR=reference_SR,
            importance_SR=importance_SR,
            n_sequences=len(batch),
            n_tokens=batch.n_tokens,
        )

    def __call__(self, head: Head, micro: MicroBatch, hidden_ND: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's part of the loss."""
        options = self.options
        if options.entropy_coef != 0.0:
            logprobs_N, entropy_N = head.logprobs_and_entropy(hidden_ND, micro.targets_N, options.temperature)
            entropy_BR: Tensor | None = micro.grid(entropy_N)
        else:
            logprobs_N, entropy_BR = head.logprobs(hidden_ND, micro.targets_N, options.temperature), None
        mask_BR = micro.grid(torch.ones_like(logprobs_N))
        advantages_B1 = _rows(self.advantages_S[:, None], micro, 1)
        assert advantages_B1 is not None
        loss, metrics = ctrl_kernels.policy_loss(
            micro.grid(logprobs_N),
            _rows(self.old_SR, micro, micro.n_slots),
            advantages_B1.expand_as(mask_BR).contiguous(),
            mask_BR,
            clip_low=options.clip_low,
            clip_high=options.clip_high,
            dual_clip=options.dual_clip,
            ref_logprobs=_rows(self.reference_SR, micro, micro.n_slots),
            kl_coef=options.kl_coef if self.reference_SR is not None else 0.0,
            kl_estimator=options.kl_estimator,
            ratio=options.ratio,
            aggregation=options.aggregation,
            importance_weights=_rows(self.importance_SR, micro, micro.n_slots),
            entropy=entropy_BR,
            entropy_coef=options.entropy_coef,
            denominator=float(self.n_tokens if options.aggregation == "token-mean" else self.n_sequences),
            backend=head.backend,
        )
        share = len(micro.targets_N) / self.n_tokens
        names = ["clip_fraction", "approx_kl", "ratio"] + (["kl"] if self.reference_SR is not None else [])
        return loss, {name: metrics[name] * share for name in names}


def _rows(values_SR: Tensor | None, micro: MicroBatch, n_slots: int) -> Tensor | None:
    """The rows of a micro-batch, on its device; zeros for one of padding."""
    if values_SR is None:
        return None
    if not len(micro.rows_B):
        return torch.zeros(micro.tokens_BT.shape[0], n_slots, device=micro.tokens_BT.device)
    return values_SR[micro.rows_B, :n_slots].to(micro.tokens_BT.device)
