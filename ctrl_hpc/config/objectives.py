"""What RL maximises, by name: the losses, and coefficients that change over the steps. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ctrl_hpc.config.functions import is_function


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A policy loss: how it calls ``ctrl_kernels.policy_loss``, which states the formulas."""

    about: str
    """Its name in the field, and its source."""
    options: dict[str, Any] = field(default_factory=dict)
    """Options of the kernel that it sets itself."""
    keys: tuple[str, ...] = ()
    """Keys of ``rl`` that are options of the kernel and that it reads beside ``clip_low`` and ``clip_high``."""
    covariance: bool = False
    """Whether it treats the tokens apart whose log-probability and advantage vary together the most."""


LOSSES: dict[str, Objective] = {
    "clip": Objective(
        about="PPO's and GRPO's clipped ratio (1707.06347); with rl.ratio=sequence GSPO's (2507.18071)",
        keys=("dual_clip", "ratio"),
    ),
    "cispo": Objective(
        about="CISPO: bounded ratio, no token without gradient (2506.13585)", options={"objective": "cispo"}
    ),
    "dppo": Objective(
        about="DPPO, total variation: bounds the change of probability (2602.04879)",
        options={"objective": "dppo_tv"},
        keys=("ratio_cap",),
    ),
    "sapo": Objective(
        about="SAPO: a soft gate in place of clipping (2511.20347)",
        options={"objective": "sapo"},
        keys=("tau_positive", "tau_negative"),
    ),
    "gmpo": Objective(about="GMPO: geometric mean of clipped ratios (2507.20673)", options={"objective": "gmpo"}),
    "gspo_token": Objective(
        about="GSPO-token: the sequence's ratio, a token's gradient (2507.18071)",
        options={"ratio": "sequence-token"},
        keys=("dual_clip",),
    ),
    "clip_cov": Objective(
        about="Clip-Cov: a few tokens of high covariance get no gradient (2505.22617)",
        keys=("dual_clip", "ratio"),
        covariance=True,
    ),
    "kl_cov": Objective(
        about="KL-Cov: no clipping, but a penalty on tokens of the highest covariance (2505.22617)",
        options={"clip_low": 1.0, "clip_high": math.inf},
        covariance=True,
    ),
}
"""Every loss by the name that ``rl.loss`` takes, with the number of its paper on arXiv."""


def is_loss(name: str) -> bool:
    """Whether ``rl.loss`` may be this."""
    return name in LOSSES or is_function(name)


def stages(value: float | str) -> tuple[tuple[int, float], ...]:
    """The (step, value) from which on a coefficient has each value: one for a number, several for ``1.0@0, 0.0@50``.

    Raises ValueError where that is not what it is, the first step is not 0, or steps do not rise.
    """
    if not isinstance(value, str):
        return ((0, float(value)),)
    found = []
    for part in value.split(","):
        number, sign, step = part.partition("@")
        found.append((int(step) if sign else 0, float(number)))
    steps = [step for step, _ in found]
    if steps[0] != 0 or sorted(set(steps)) != steps or not all(math.isfinite(number) for _, number in found):
        raise ValueError(f"{value!r} is no schedule: VALUE@STEP, ... with rising steps from 0 on")
    return tuple(found)


def at_step(value: float | str, step: int) -> float:
    """What a coefficient is at a rollout step, counted from 0."""
    return next(number for start, number in reversed(stages(value)) if start <= step)


def is_schedule(value: float | str, low: float, high: float) -> bool:
    """Whether every value of a coefficient lies in [low, high]."""
    try:
        return all(low <= number <= high for _, number in stages(value))
    except ValueError:
        return False
