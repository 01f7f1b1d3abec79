"""Advantages: what each response token is worth, by comparison within a group or by a value network.

Shapes: S sequences, R response slots.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def estimate(
    experience: Experience,
    values_SR: Tensor | None,
    options: RLConfig,
    *,
    device: torch.device | str = "cpu",
    backend: Backend = "auto",
) -> Advantages:
    """Advantages within each draft's group, or from the values of a value network; on the CPU.

    Zero for critiques that left their group. ``device`` and ``backend``: where and how the kernels compute them.
    """
    mask_SR = experience.batch.mask_SR
    if values_SR is None:
        advantages_S = experience.advantages(options.estimator, device=device, backend=backend)
        return Advantages(advantages_SR=advantages_S[:, None] * mask_SR)
    mask_SR = mask_SR & experience.valid_S[:, None]
    advantages_SR, returns_SR = advantages_and_returns(
        experience.rewards_S, values_SR, mask_SR, options, device=device, backend=backend
    )
    return Advantages(advantages_SR=advantages_SR, values_SR=values_SR, returns_SR=returns_SR)


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
    tokens = advantages_SR[mask_SR]
    deviation = tokens.std() if len(tokens) > 1 else tokens.new_tensor(0.0)
    whitened_SR = (advantages_SR - tokens.mean()) / (deviation + 1e-8)
    return torch.where(mask_SR, whitened_SR, 0.0), returns_SR
