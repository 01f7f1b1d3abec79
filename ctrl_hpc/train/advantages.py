"""Advantages: what each response token is worth, by comparison with other critiques or by a value network.

``grpo``, ``dr_grpo`` and ``rloo`` are ``ctrl_kernels.group_advantages``. Beside them, with r the reward of a critique,
n its length in tokens, sums over its group, and M the highest reward of a k-subset of the group:

    opo                    r - sum(n r) / sum(n)                                     Hao et al. 2025, arXiv 2505.23585
    pass_k                 (mean of M with the critique - mean of M) / deviation of M
                                                                                    Chen et al. 2025, arXiv 2508.10751
    reinforce_pp           gamma^(tokens to the end) r, whitened over the step's tokens
                                                                                      Hu et al. 2025, arXiv 2501.03262
    reinforce_pp_baseline  r - mean of r, whitened over the step's tokens                                     the same

Shapes: V critiques that count, S sequences, R response slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import comb, sqrt

import ctrl_kernels
import torch
from ctrl_kernels import Backend
from torch import Tensor

from ctrl_hpc.config import RLConfig
from ctrl_hpc.train.rollouts import Experience


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """Advantages of response tokens; with a value network also its values and what they should have been."""

    advantages_SR: Tensor
    values_SR: Tensor | None = None
    returns_SR: Tensor | None = None


type Estimator = Callable[[Tensor, Tensor, Tensor, RLConfig], Tensor]
"""Advantages [V, R] from rewards [V], groups [V] and the mask [V, R] of the policy's tokens; 0 outside the mask."""


def estimate(
    experience: Experience,
    values_SR: Tensor | None,
    options: RLConfig,
    *,
    device: torch.device | str = "cpu",
    backend: Backend = "auto",
) -> Advantages:
    """Advantages within each draft's group, over the step, or from the values of a value network; on the CPU.

    Zero for critiques that left their group. ``device`` and ``backend``: where and how the kernels compute them.
    """
    mask_SR = experience.batch.mask_SR & experience.valid_S[:, None]
    if values_SR is not None:
        advantages_SR, returns_SR = advantages_and_returns(
            experience.rewards_S, values_SR, mask_SR, options, device=device, backend=backend
        )
        return Advantages(advantages_SR=advantages_SR, values_SR=values_SR, returns_SR=returns_SR)
    if options.estimator not in ESTIMATORS:
        advantages_S = experience.advantages(options.estimator, device=device, backend=backend)
        advantages_SR = advantages_S[:, None] * mask_SR
        if options.credit == "sentence" and experience.credit_SR is not None:
            advantages_SR = advantages_SR + experience.credit_SR * mask_SR
        return Advantages(advantages_SR=advantages_SR)
    valid_S, advantages_SR = experience.valid_S, torch.zeros(mask_SR.shape)
    if valid_S.any():
        rewards_V, groups_V = experience.rewards_S[valid_S].double(), experience.groups_S[valid_S]
        found_VR = ESTIMATORS[options.estimator](rewards_V, groups_V, mask_SR[valid_S], options)
        advantages_SR[valid_S] = found_VR.float()
    return Advantages(advantages_SR=advantages_SR)


def _by_group(
    rewards_V: Tensor, groups_V: Tensor, mask_VR: Tensor, compare: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """``compare`` of each group's rewards and lengths, spread over tokens."""
    out_V, lengths_V = torch.zeros_like(rewards_V), mask_VR.sum(1)
    for group in groups_V.unique():
        rows = groups_V == group
        out_V[rows] = compare(rewards_V[rows], lengths_V[rows])
    return out_V[:, None] * mask_VR


def opo(rewards_V: Tensor, groups_V: Tensor, mask_VR: Tensor, options: RLConfig) -> Tensor:
    """Less the mean reward weighted by length, the baseline of least variance."""

    def compare(rewards: Tensor, lengths: Tensor) -> Tensor:
        return rewards - (lengths * rewards).sum() / lengths.sum().clamp_min(1)

    return _by_group(rewards_V, groups_V, mask_VR, compare)


def pass_k(rewards_V: Tensor, groups_V: Tensor, mask_VR: Tensor, options: RLConfig) -> Tensor:
    """What a critique adds to the best of k, in deviations of the best of k; for rewards 0 and 1 the paper's."""

    def compare(rewards: Tensor, lengths: Tensor) -> Tensor:
        return rewards.new_tensor(_pass_k(rewards.tolist(), options))

    return _by_group(rewards_V, groups_V, mask_VR, compare)


def _pass_k(rewards: list[float], options: RLConfig) -> list[float]:
    """Every subset counted, by ranks; all 0 where every subset is as good, as where there are no more than k."""
    n, k = len(rewards), min(options.pass_k, len(rewards))
    order = sorted(range(n), key=rewards.__getitem__)
    best = [comb(rank, k - 1) / comb(n, k) for rank in range(n)]  # the share of subsets in which this rank is highest
    mean = sum(share * rewards[row] for share, row in zip(best, order, strict=True))
    deviation = sqrt(sum(share * (rewards[row] - mean) ** 2 for share, row in zip(best, order, strict=True)))
    if deviation < 1e-9:
        return [0.0] * n
    out, subsets = [0.0] * n, comb(n - 1, k - 1)
    for rank, row in enumerate(order):
        own = comb(rank, k - 1) / subsets * rewards[row]
        higher = [comb(other - 1, k - 2) / subsets * rewards[order[other]] for other in range(rank + 1, n)]
        out[row] = (own + sum(higher) - mean) / deviation
    return out


def reinforce_pp(rewards_V: Tensor, groups_V: Tensor, mask_VR: Tensor, options: RLConfig) -> Tensor:
    """The discounted reward, compared with all critiques of the step."""
    left_VR = mask_VR.flip(1).cumsum(1).flip(1) - 1  # tokens from here to the last
    return _whitened(rewards_V[:, None] * options.gae_gamma ** left_VR.clamp_min(0), mask_VR)


def reinforce_pp_baseline(rewards_V: Tensor, groups_V: Tensor, mask_VR: Tensor, options: RLConfig) -> Tensor:
    """Less the group's mean, scaled by the deviation of the step."""
    centred_VR = _by_group(rewards_V, groups_V, mask_VR, lambda rewards, _: rewards - rewards.mean())
    return _whitened(centred_VR, mask_VR)


def _whitened(values_VR: Tensor, mask_VR: Tensor) -> Tensor:
    """To mean 0 and deviation 1 over the tokens of the mask; 0 where all are the same."""
    tokens = values_VR[mask_VR]
    deviation = tokens.std() if len(tokens) > 1 else tokens.new_tensor(0.0)
    return torch.where(mask_VR, (values_VR - tokens.mean()) / (deviation + 1e-8), 0.0)


ESTIMATORS: dict[str, Estimator] = {
    "opo": opo,
    "pass_k": pass_k,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
}
"""Estimators beside the kernels' (``ctrl_kernels.ESTIMATORS``) and ``gae``."""
OVER_THE_STEP = frozenset({"gae", "reinforce_pp", "reinforce_pp_baseline"})
"""Those by which a group without spread has something to learn from."""


def advantages_and_returns(
    rewards_S: Tensor,
    values_SR: Tensor,
    mask_SR: Tensor,
    options: RLConfig,
    *,
    device: torch.device | str = "cpu",
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Generalised advantages, whitened over the tokens, and returns (not whitened), both [S, R].

    The reward comes with a response's last token (Schulman et al. 2016; whitening as is usual for PPO). Responses
    without a token in the mask count for nothing.
    """
    slots_R = torch.arange(mask_SR.shape[1])
    last_S = torch.where(mask_SR, slots_R, 0).amax(dim=1)
    rewards_SR = torch.zeros_like(values_SR)
    rewards_SR[torch.arange(len(rewards_S)), last_S] = rewards_S * mask_SR.any(dim=1)
    found = ctrl_kernels.gae(
        rewards_SR.to(device),
        values_SR.to(device),
        mask_SR.float().to(device),
        gamma=options.gae_gamma,
        lam=options.gae_lambda,
        backend=backend,
    )
    advantages_SR, returns_SR = (tensor.cpu() for tensor in found)
    return _whitened(advantages_SR, mask_SR), returns_SR
