"""The losses of SFT and RL over one micro-batch, on the project's kernels.

A loss is made for a batch, with its global denominator, and called for each micro-batch (``policy.Loss``).
Shapes: N response tokens of the micro-batch, B its sequences, R their longest response; S sequences of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ctrl_kernels
import torch
from torch import Tensor

from ctrl_hpc.config import RLConfig
from ctrl_hpc.train.batch import Batch, MicroBatch
from ctrl_hpc.train.policy import Head, ValueHead


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
    that is improved, ``ratio``, ``entropy``, and ``rollout_kl``, the divergence of the trainer's old policy from the
    engine that sampled (k3 estimate).
    """

    options: RLConfig
    advantages_SR: Tensor
    rollout_SR: Tensor
    """Log-probabilities by the engine that sampled."""
    old_SR: Tensor | None
    """Log-probabilities before the update, by this trainer; None where the weights are still those of before it."""
    reference_SR: Tensor | None
    n_sequences: int
    n_tokens: int

    @classmethod
    def of(
        cls,
        batch: Batch,
        options: RLConfig,
        *,
        advantages_SR: Tensor,
        rollout_SR: Tensor,
        old_SR: Tensor | None = None,
        reference_SR: Tensor | None = None,
    ) -> RLLoss:
        """The loss of a batch, normalised by the batch's own tokens or sequences."""
        return cls(
            options=options,
            advantages_SR=advantages_SR,
            rollout_SR=rollout_SR,
            old_SR=old_SR,
            reference_SR=reference_SR,
            n_sequences=len(batch),
            n_tokens=batch.n_tokens,
        )

    def __call__(self, head: Head, micro: MicroBatch, hidden_ND: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's part of the loss."""
        options = self.options
        values = {
            "advantages": micro.pick(self.advantages_SR),
            "mask": torch.ones(len(micro.targets_N), device=hidden_ND.device),
        }
        rollout_N = micro.pick(self.rollout_SR)
        if self.reference_SR is not None:
            values["ref_logprobs"] = micro.pick(self.reference_SR)
        one_pass = self.old_SR is not None and options.ratio == "token" and options.aggregation == "token-mean"
        if one_pass:
            assert self.old_SR is not None
            old_N = micro.pick(self.old_SR)
            values |= self._behaviour(old_N, rollout_N)
            loss, metrics = ctrl_kernels.linear_policy_loss(
                hidden_ND,
                head.weight,
                micro.targets_N,
                **values,
                **self._options(),
                **head.options(options.temperature),
            )
        else:
            logprobs_N, entropy_N = head.logprobs_and_entropy(hidden_ND, micro.targets_N, options.temperature)
            old_N = micro.pick(self.old_SR) if self.old_SR is not None else logprobs_N.detach()
            values |= self._behaviour(old_N, rollout_N) | {"entropy": entropy_N}
            grids = {name: micro.grid(value_N) for name, value_N in values.items()}
            loss, metrics = ctrl_kernels.policy_loss(
                micro.grid(logprobs_N),
                **grids,
                **self._options(),
                ratio=options.ratio,
                aggregation=options.aggregation,
                backend=head.backend,
            )
        share = len(micro.targets_N) / self.n_tokens
        names = ["clip_fraction", "approx_kl", "ratio", "entropy"] + (["kl"] if self.reference_SR is not None else [])
        gap_N = (old_N - rollout_N).clamp(-20, 20)
        rollout_kl = (gap_N.expm1() - gap_N).sum() / self.n_tokens
        return loss, {name: metrics[name] * share for name in names} | {"rollout_kl": rollout_kl}

    def _behaviour(self, old_N: Tensor, rollout_N: Tensor) -> dict[str, Tensor]:
        """The old policy's log-probabilities and, where asked for, truncated importance weights towards it."""
        cap = self.options.importance_cap
        weights = {} if cap is None else {"importance_weights": (old_N - rollout_N).exp().clamp(max=cap)}
        return {"old_logprobs": old_N, **weights}

    def _options(self) -> dict[str, Any]:
        options = self.options
        return {
            "clip_low": options.clip_low,
            "clip_high": options.clip_high,
            "dual_clip": options.dual_clip,
            "kl_coef": options.kl_coef if self.reference_SR is not None else 0.0,
            "kl_estimator": options.kl_estimator,
            "entropy_coef": options.entropy_coef,
            "denominator": float(self.n_tokens if options.aggregation == "token-mean" else self.n_sequences),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueLoss:
    """The clipped squared error of PPO's value network (Schulman et al. 2017; as in their baselines' code).

    1/2 max((v - R)^2, (clip(v, v_old - c, v_old + c) - R)^2), a mean over the batch's tokens. Logged beside:
    ``value``, the mean value.
    """

    clip: float
    old_SR: Tensor
    """Values before the update."""
    returns_SR: Tensor
    n_tokens: int

    def __call__(self, head: ValueHead, micro: MicroBatch, hidden_ND: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's part of the mean."""
        values_N, old_N, returns_N = head.values(hidden_ND), micro.pick(self.old_SR), micro.pick(self.returns_SR)
        held_N = old_N + (values_N - old_N).clamp(-self.clip, self.clip)
        errors_N = torch.maximum((values_N - returns_N).square(), (held_N - returns_N).square())
        return 0.5 * errors_N.sum() / self.n_tokens, {"value": values_N.detach().sum() / self.n_tokens}
