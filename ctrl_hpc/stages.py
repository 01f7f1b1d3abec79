"""The stages of a run: in which order they come, what each needs, and on which keys its records depend.

What may change between two starts of a run follows: keys that are free, and those that no stage with records has read.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ctrl_hpc.config import Config

_GENERATOR = ("generator", "generator_model", "endpoint", "tiny")
_CRITIC = ("critic", "tiny", "trainer", "parallel")
_COMPARED = ("data.eval_names", "data.eval_path", "data.eval_paths", "data.eval_split")
_TRAINING = (
    "data.name",
    "data.path",
    "data.split",
    "data.n_train",
    "data.decontaminate",
    "data.benchmarks",
    "data.overlap",
    "data.ngram",
    "data.exact",
    "data.filters",
    "data.verified_only",
)
_EVALUATION = (*_COMPARED, "data.n_eval")
_QUICK_EVALUATION = (*_EVALUATION, "eval.temperature", "eval.max_tokens", "eval.stop_when_correct")


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage; its function is in :data:`ctrl_hpc.pipeline.FUNCTIONS`."""

    about: str
    """What it makes, in a line."""
    reads: tuple[str, ...]
    """Sections and keys of the configuration on which its records depend, beside free ones."""
    services: tuple[str, ...] = ()
    """Roles of the services that it calls."""
    after: tuple[str, ...] = ()
    """Stages whose records it reads."""


STAGES: dict[str, Stage] = {
    "sample": Stage(
        about="drafts of the fixed generator, executed",
        reads=("seed", *_TRAINING, *_GENERATOR, "prompts", "sample", "executor", "rollout"),
        services=("executor", "generator"),
    ),
    "synthesize": Stage(
        about="critiques from execution hints, for SFT",
        reads=("seed", "critic", "tiny", "prompts", "synthesize", "rollout"),
        services=("critic",),
        after=("sample",),
    ),
    "sft": Stage(
        about="stage I: supervised fine-tuning of the critic",
        reads=("seed", *_CRITIC, "prompts", "sft"),
        after=("sample", "synthesize"),
    ),
    "rl": Stage(
        about="stage II: GRPO on the reward of the revised program",
        reads=("seed", *_CRITIC, *_GENERATOR, "prompts", "rl", "executor", "rollout"),
        services=("executor", "generator", "critic"),
        after=("sample", "sft"),
    ),
    "eval": Stage(
        about="critique-revision turns on held-out problems",
        reads=("seed", *_EVALUATION, "critic", *_GENERATOR, "prompts", "eval", "judge", "executor", "rollout"),
        services=("executor", "generator", "critic"),
    ),
    "report": Stage(about="tables, plots and results.json", reads=("name", "seed", "critic"), after=("eval",)),
}
"""Every stage of a run, in order."""

PREPARED = {
    "models": ("seed", "tiny.rebuild"),
    "problems/train*.jsonl": ("seed", *_TRAINING, "executor"),
    "problems/ledger.json*": ("seed", *_TRAINING, "executor"),
    "problems/left-out.json": ("seed", *_TRAINING),
    "problems/decontamination.json": ("seed", *_TRAINING),
    "problems/eval-*.jsonl": ("seed", *_EVALUATION),
    "problems/left-out-*.json": ("seed", *_EVALUATION),
    "problems/judgebench.jsonl": ("judge",),
}
"""What is made in a run's folder before the stages, and what it depends on: made anew when that has changed."""


def reads(stage: str, config: Config) -> set[str]:
    """The sections and keys that a stage itself reads under a configuration, beside free ones."""
    keys = set(STAGES[stage].reads)
    if stage == "sample" and config.data.compared_names:
        keys |= set(_COMPARED)
    if stage == "rl" and config.rl.eval_every:
        keys |= set(_QUICK_EVALUATION)
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
    compared = config.data.compared_names and set(PREPARED[pattern]) >= set(_TRAINING)
    return set(PREPARED[pattern]) | (set(_COMPARED) if compared else set())


def concerns(key: str, names: Collection[str]) -> bool:
    """Whether a key is one of these, or stands in one of these sections."""
    return any(key == name or key.startswith(f"{name}.") for name in names)
