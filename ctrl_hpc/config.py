"""The configuration: one tree of frozen dataclasses, read from YAML with ``a.b=c`` overrides.

``load`` merges, later ones winning: the defaults of the dataclasses, the cluster profile, the YAML file, the overrides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ctrl_hpc.config_sections import (
    CriticConfig,
    DataConfig,
    EvalConfig,
    ExecutorConfig,
    JobConfig,
    LaunchConfig,
    LimitsConfig,
    OptimizerConfig,
    ParallelConfig,
    PromptConfig,
    RLConfig,
    RolloutConfig,
    SampleConfig,
    SFTConfig,
    SynthesizeConfig,
    TinyConfig,
    TrainerConfig,
    WandbConfig,
)

__all__ = [
    "Config",
    "CriticConfig",
    "DataConfig",
    "EvalConfig",
    "ExecutorConfig",
    "JobConfig",
    "LaunchConfig",
    "LimitsConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PromptConfig",
    "RLConfig",
    "RolloutConfig",
    "SFTConfig",
    "SampleConfig",
    "SynthesizeConfig",
    "TinyConfig",
    "TrainerConfig",
    "WandbConfig",
    "dump",
    "load",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A whole run."""

    name: str
    """Name of the run."""
    run_dir: str | None = None
    """Folder of everything the run writes; None: ``runs/NAME``."""
    seed: int = 0
    """Seed of every random choice; >= 0."""
    cluster: str = "local"
    """Profile of ``configs/cluster`` (or a YAML file) that fills ``launch``: local, slurm, testcluster."""
    generator: str = "models/tiny/generator"
    """The fixed generator: a Hugging Face folder, the URL of an OpenAI-compatible endpoint, or ``oracle``."""
    generator_model: str | None = None
    """Model name asked for when ``generator`` is a URL."""
    stages: tuple[str, ...] = ("sample", "synthesize", "sft", "rl", "eval", "report")
    """Stages of ``ctrl-hpc run``, in order."""
    data: DataConfig = field(default_factory=DataConfig)
    """Problems."""
    tiny: TinyConfig = field(default_factory=TinyConfig)
    """The miniature world."""
    prompts: PromptConfig = field(default_factory=PromptConfig)
    """Templates."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The critic."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """Drafts."""
    synthesize: SynthesizeConfig = field(default_factory=SynthesizeConfig)
    """Hinted critiques."""
    sft: SFTConfig = field(default_factory=SFTConfig)
    """Stage I."""
    rl: RLConfig = field(default_factory=RLConfig)
    """Stage II."""
    eval: EvalConfig = field(default_factory=EvalConfig)
    """Evaluation."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """The trainer's processes."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Megatron's parallelism."""
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    """The executor array."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """The rollout arrays."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Slurm or local."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Tracking."""


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a YAML file with ``a.b=c`` overrides.

    Raises ValueError with one line that names the key, the value and what is allowed.
    """
    raise AssertionError


def dump(config: Config) -> str:
    """The whole configuration as YAML, defaults included; ``load`` reads it back to an equal configuration."""
    raise AssertionError
