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
from ctrl_hpc.config.functions import load_function
from ctrl_hpc.config.objectives import LOSSES
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
    """A policy objective by name (``rl.loss``) with its KL and entropy terms (paper, section 3.3; Shao et al. 2024).

    Logged, as means over the batch's tokens: ``kl`` to the reference, ``clip_fraction``, ``approx_kl`` to the policy
    that is improved, ``ratio``, ``entropy``, and ``rollout_kl``, the divergence of the trainer's old policy from the
    engine that sampled (k3 estimate); with ``rl.importance_bounds``, ``rollout_masked``, the share of tokens outside.
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
    covariance_SR: Tensor | None = None
    """The tokens that ``clip_cov`` and ``kl_cov`` treat apart; bool."""

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
        seed: int = 0,
    ) -> RLLoss:
        """The loss of a batch, normalised by the batch's own tokens or sequences; ``seed`` of what is drawn."""
        covariance_SR = None
        if needs_old(options):
            assert old_SR is not None, f"{options.loss} needs the old policy's log-probabilities"
            covariance_SR = _covariance_tokens(old_SR, advantages_SR, batch.mask_SR, options, seed)
        return cls(
            options=options,
            advantages_SR=advantages_SR,
            rollout_SR=rollout_SR,
            old_SR=old_SR,
            reference_SR=reference_SR,
            n_sequences=len(batch),
            n_tokens=batch.n_tokens,
            covariance_SR=covariance_SR,
        )

    def __call__(self, head: Head, micro: MicroBatch, hidden_ND: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's part of the loss."""
        options, kernel = self.options, kernel_options(self.options)
        values = {
            "advantages": micro.pick(self.advantages_SR),
            "mask": torch.ones(len(micro.targets_N), device=hidden_ND.device),
        }
        rollout_N = micro.pick(self.rollout_SR)
        if self.reference_SR is not None:
            values["ref_logprobs"] = micro.pick(self.reference_SR)
        by_token = kernel.get("ratio", "token") == "token" and options.loss in LOSSES and options.loss != "gmpo"
        if self.old_SR is not None and by_token and options.aggregation == "token-mean":
            old_N = micro.pick(self.old_SR)
            rollout_N = _known(rollout_N, old_N)
            values |= self._behaviour(old_N, rollout_N, micro)
            loss, metrics = ctrl_kernels.linear_policy_loss(
                hidden_ND,
                head.weight,
                micro.targets_N,
                **values,
                **self._terms(),
                **{name: value for name, value in kernel.items() if name != "ratio"},
                **head.options(options.temperature),
                unit_gradient=head.main_grad is not None,
            )
        else:
            logprobs_N, entropy_N = head.logprobs_and_entropy(hidden_ND, micro.targets_N, options.temperature)
            old_N = micro.pick(self.old_SR) if self.old_SR is not None else logprobs_N.detach()
            rollout_N = _known(rollout_N, old_N)
            values |= self._behaviour(old_N, rollout_N, micro) | {"entropy": entropy_N}
            grids = {name: micro.grid(value_N) for name, value_N in values.items()}
            logprobs_BR, own = micro.grid(logprobs_N), 0.0
            if options.loss not in LOSSES:
                own = self._own(logprobs_BR, grids)
                grids |= {"advantages": torch.zeros_like(logprobs_BR)}
            loss, metrics = ctrl_kernels.policy_loss(
                logprobs_BR,
                **grids,
                **self._terms(),
                **kernel,
                aggregation=options.aggregation,
                backend=head.backend,
            )
            loss = loss + own
        share = len(micro.targets_N) / self.n_tokens
        names = ["clip_fraction", "approx_kl", "ratio", "entropy"] + (["kl"] if self.reference_SR is not None else [])
        gap_N = (old_N - rollout_N).clamp(-20, 20)
        logged = {"rollout_kl": (gap_N.expm1() - gap_N).sum() / self.n_tokens}
        if options.importance_bounds:
            logged["rollout_masked"] = _outside(self._ratios(old_N, rollout_N, micro), options).sum() / self.n_tokens
        return loss, {name: metrics[name] * share for name in names} | logged

    def _behaviour(self, old_N: Tensor, rollout_N: Tensor, micro: MicroBatch) -> dict[str, Tensor]:
        """The old policy's log-probabilities, the weights of tokens and, for ``kl_cov``, of their drift."""
        values, options = {"old_logprobs": old_N}, self.options
        weights_N = None
        if options.importance_cap is not None or options.importance_bounds:
            ratios_N = self._ratios(old_N, rollout_N, micro)
            weights_N = ratios_N if options.importance_cap is None else ratios_N.clamp(max=options.importance_cap)
            if options.importance_bounds:
                weights_N = weights_N.masked_fill(_outside(ratios_N, options), 0.0)
        if self.covariance_SR is not None:
            apart_N = micro.pick(self.covariance_SR).to(old_N.dtype)
            if options.loss == "kl_cov":
                values["drift_weights"] = options.cov_coef * apart_N
            else:
                weights_N = (1 - apart_N) * (1 if weights_N is None else weights_N)
        return values if weights_N is None else values | {"importance_weights": weights_N}

    def _ratios(self, old_N: Tensor, rollout_N: Tensor, micro: MicroBatch) -> Tensor:
        """The old policy's probability over the engine's, of ``rl.importance_level``, at each token.

        Token: Espeholt et al. 2018; sequence: the product over the critique; geometric: its root by the number of
        tokens (both as in verl's rollout correction). Log-ratios are held within 20.
        """
        gap_N = old_N - rollout_N
        if self.options.importance_level == "token":
            return gap_N.exp()
        rows = len(micro.rows_B)
        total_B = gap_N.new_zeros(rows).index_add(0, micro.rows_N, gap_N)
        if self.options.importance_level == "geometric":
            total_B = total_B / torch.bincount(micro.rows_N, minlength=rows).clamp_min(1)
        return total_B.clamp(-20, 20).exp()[micro.rows_N]

    def _own(self, logprobs_BR: Tensor, grids: dict[str, Tensor]) -> Tensor:
        """The sum of the terms that the user's own function gives, weighted and aggregated as any other's."""
        options, mask_BR = self.options, grids["mask"] != 0
        function = load_function("rl.loss", options.loss)
        terms_BR = function(logprobs_BR, grids["old_logprobs"], grids["advantages"], mask_BR, options)
        if not isinstance(terms_BR, Tensor) or terms_BR.shape != logprobs_BR.shape:
            raise ValueError(f"rl.loss: {options.loss} must give a tensor of shape {tuple(logprobs_BR.shape)}")
        terms_BR = torch.where(mask_BR, terms_BR, 0.0) * grids.get("importance_weights", 1.0)
        if options.aggregation == "seq-mean-token-mean":
            terms_BR = terms_BR / mask_BR.sum(1, keepdim=True).clamp_min(1)
        return terms_BR.sum() / self._terms()["denominator"]

    def _terms(self) -> dict[str, Any]:
        options = self.options
        return {
            "kl_coef": options.kl_coef if self.reference_SR is not None else 0.0,
            "kl_estimator": options.kl_estimator,
            "entropy_coef": options.entropy_coef,
            "denominator": float(self.n_tokens if options.aggregation == "token-mean" else self.n_sequences),
        }


def kernel_options(options: RLConfig) -> dict[str, Any]:
    """How ``rl.loss`` calls the kernel: its own options over those of its keys; nothing for one of the user's."""
    if options.loss not in LOSSES:
        return {}
    objective = LOSSES[options.loss]
    keys = ("clip_low", "clip_high", *objective.keys)
    return {key: getattr(options, key) for key in keys} | objective.options


def needs_old(options: RLConfig) -> bool:
    """Whether the loss needs log-probabilities of before the update for the first minibatch, too."""
    return options.loss in LOSSES and LOSSES[options.loss].covariance


def _known(rollout_N: Tensor, old_N: Tensor) -> Tensor:
    """The engine's log-probabilities, the old policy's where they tell of no drift: a ratio of 1 there."""
    return torch.where(rollout_N.isnan(), old_N, rollout_N)


def _outside(ratios_N: Tensor, options: RLConfig) -> Tensor:
    low, high = options.importance_bounds
    return (ratios_N < low) | (ratios_N > high)


def _covariance_tokens(old_SR: Tensor, advantages_SR: Tensor, mask_SR: Tensor, options: RLConfig, seed: int) -> Tensor:
    """The tokens that Clip-Cov leaves out (drawn by ``seed``) or KL-Cov holds, among all of the minibatch's.

    By log-probabilities of before the update, so that they do not depend on the division into micro-batches; the
    authors take those of the current weights, which are the same in a step's first update.
    """
    bounds = None if options.loss == "kl_cov" else (options.cov_bounds[0], options.cov_bounds[1])
    return ctrl_kernels.covariance_tokens(
        old_SR,
        advantages_SR,
        mask_SR,
        fraction=options.cov_fraction,
        bounds=bounds,
        generator=torch.Generator().manual_seed(seed),
    )


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
