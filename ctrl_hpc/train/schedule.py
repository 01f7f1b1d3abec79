"""The learning rate as a pure function of the step, so that a resumed run continues the same schedule."""

from __future__ import annotations

import math

from ctrl_hpc.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total: int) -> float:
    """The rate of optimizer step ``step`` (from 0) of ``total``: linear warm-up, then the decay towards ``min_lr``."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, total - config.warmup_steps))
    share = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[config.schedule]
    return config.min_lr + (config.lr - config.min_lr) * share
