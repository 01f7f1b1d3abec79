"""The options of the clipped policy loss, shared by ``policy_loss`` and ``linear_policy_loss``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

KlEstimator = Literal["k1", "k2", "k3"]
Ratio = Literal["token", "sequence"]
Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]

LOG_RATIO_LIMIT = 20.0  # exp(20) is 5e8: beyond it a ratio is a fault of the rollout, not a signal
K3_LIMIT = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOptions:
    """The options of ``ctrl_kernels.policy_loss`` that are not tensors; see there for what they mean."""

    clip_low: float
    clip_high: float
    dual_clip: float | None
    kl_coef: float
    kl_estimator: KlEstimator
    ratio: Ratio
    aggregation: Aggregation
    entropy_coef: float

    def __post_init__(self) -> None:
        """Raise ValueError for a value outside its range."""
        for name, allowed in (("kl_estimator", KlEstimator), ("ratio", Ratio), ("aggregation", Aggregation)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(get_args(allowed))}"
                )
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low={self.clip_low} must lie between 0 and 1")
        if not self.clip_high >= 0:
            raise ValueError(f"clip_high={self.clip_high} must not be negative")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip={self.dual_clip} must be greater than 1, or None")


def check_shapes(shape: torch.Size, device: torch.device, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError, naming the tensor, unless every one that is given has this shape and device."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the other inputs on {device}")


def check_denominator(denominator: float | torch.Tensor | None) -> None:
    """Raise ValueError unless ``denominator`` is None, a positive number or a scalar tensor."""
    if isinstance(denominator, torch.Tensor):
        if denominator.numel() != 1:
            raise ValueError(f"denominator must be a scalar, got shape {tuple(denominator.shape)}")
    elif denominator is not None and not denominator > 0:
        raise ValueError(f"denominator={denominator} must be positive")
