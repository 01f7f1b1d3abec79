"""On which keys the records of a stage depend under a configuration.

What may change between two starts of a run follows: keys that are free, and those that no stage with records has read.
"""

from __future__ import annotations

from collections.abc import Collection

from ctrl_hpc.config.stages import COMPARED, PREPARED, QUICK_EVALUATION, STAGES, TRAINING
from ctrl_hpc.config.tree import Config


def reads(stage: str, config: Config) -> set[str]:
    """The sections and keys that a stage itself reads under a configuration, beside free ones."""
    keys = set(STAGES[stage].reads)
    if stage == "sample" and config.data.compared_names:
        keys |= set(COMPARED)
    if stage == "rl" and config.rl.eval_every:
        keys |= set(QUICK_EVALUATION)
    return keys


def depends(stage: str, config: Config) -> set[str]:
    """Those that the records of a stage depend on: what it reads, and what the stages before it have read."""
    trained = [name for name in config.eval.critics if name in STAGES] if stage == "eval" else []
    keys = reads(stage, config)
    for before in (*STAGES[stage].after, *trained):
        keys |= depends(before, config)
    return keys


def prepared(pattern: str, config: Config) -> set[str]:
    """Those that an entry of :data:`PREPARED` depends on under a configuration."""
    compared = config.data.compared_names and set(PREPARED[pattern]) >= set(TRAINING)
    return set(PREPARED[pattern]) | (set(COMPARED) if compared else set())


def concerns(key: str, names: Collection[str]) -> bool:
    """Whether a key is one of these, or stands in one of these sections."""
    return any(key == name or key.startswith(f"{name}.") for name in names)
