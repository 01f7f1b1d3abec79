"""``gae``: generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438).

From the last step to the first, with v' and A' the value and advantage of the next unmasked step (0 past the last one):

    A = r + gamma v' - v + gamma lam A'      at an unmasked step;      A = A', v' unchanged      at a masked one.

Masked steps so carry the state through, as in verl; their advantage is the one they carry. Returns are A + v, where a NaN
value of a masked step counts as 0. Nothing is whitened.
"""

from __future__ import annotations

import torch

from ctrl_kernels import reference
from ctrl_kernels.backend import Backend, resolve_backend
from ctrl_kernels.clipping import check_shapes


def gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    *,
    gamma: float,
    lam: float,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns, both fp32 [B, T], of ``rewards``, ``values`` and ``mask`` [B, T] (nonzero: the step counts).

    What masked steps hold in ``rewards`` does not matter. No gradient flows.
    """
    if rewards.dim() != 2:
        raise ValueError(f"rewards must have shape (B, T), got {tuple(rewards.shape)}")
    check_shapes(rewards.shape, rewards.device, values=values, mask=mask)
    for name, factor in (("gamma", gamma), ("lam", lam)):
        if not 0 <= factor <= 1:
            raise ValueError(f"{name}={factor} must lie between 0 and 1")
    resolve_backend(backend, rewards)
    advantages, returns = reference.gae(rewards.detach(), values.detach(), mask, gamma=gamma, lam=lam)
    return advantages.float(), returns.float()
