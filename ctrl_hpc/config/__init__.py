"""The configuration: one tree of frozen dataclasses, read from YAML with ``a.b=c`` overrides."""

from ctrl_hpc.config.load import ROOT, dump, load
from ctrl_hpc.config.machine import (
    EndpointConfig,
    ExecutorConfig,
    JobConfig,
    LaunchConfig,
    ParallelConfig,
    PlanConfig,
    RolloutConfig,
    TrainerConfig,
    WandbConfig,
)
from ctrl_hpc.config.method import (
    CriticConfig,
    DataConfig,
    EvalConfig,
    FilterConfig,
    JudgeConfig,
    OptimizerConfig,
    PromptConfig,
    RLConfig,
    SampleConfig,
    SFTConfig,
    SynthesizeConfig,
    TinyConfig,
)
from ctrl_hpc.config.tree import Config, check, value

__all__ = [
    "ROOT",
    "Config",
    "CriticConfig",
    "DataConfig",
    "EndpointConfig",
    "EvalConfig",
    "ExecutorConfig",
    "FilterConfig",
    "JobConfig",
    "JudgeConfig",
    "LaunchConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "PlanConfig",
    "PromptConfig",
    "RLConfig",
    "RolloutConfig",
    "SFTConfig",
    "SampleConfig",
    "SynthesizeConfig",
    "TinyConfig",
    "TrainerConfig",
    "WandbConfig",
    "check",
    "dump",
    "load",
    "value",
]
