"""The stages of a run: in which order they come, what each needs, and on which keys its records depend."""

from __future__ import annotations

from dataclasses import dataclass

_GENERATOR = (
    "generator",
    "generator_model",
    "generator_thinking",
    "generator_thought_tokens",
    "generator_close_thought",
    "endpoint",
    "tiny",
)
_CRITIC = ("critic", "lora", "tiny", "trainer", "parallel")
_ASKING = ("prompts.folder", "prompts.system")
"""What of ``prompts`` the generator is asked with."""
COMPARED = ("data.eval_names", "data.eval_path", "data.eval_paths", "data.eval_split")
TRAINING = (
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
EVALUATION = (*COMPARED, "data.n_eval")
QUICK_EVALUATION = (*EVALUATION, "eval.temperature", "eval.max_tokens", "eval.stop_when_correct")


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
        reads=("seed", *TRAINING, *_GENERATOR, *_ASKING, "sample", "executor", "rollout"),
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
        reads=("seed", *EVALUATION, "critic", *_GENERATOR, "prompts", "eval", "judge", "executor", "rollout"),
        services=("executor", "generator", "critic"),
    ),
    "report": Stage(about="tables, plots and results.json", reads=("name", "seed", "critic"), after=("eval",)),
}
"""Every stage of a run, in order."""

PREPARED = {
    "models": ("seed", "tiny.rebuild", "critic.thinking"),
    "problems/train*.jsonl": ("seed", *TRAINING, "executor"),
    "problems/ledger.json*": ("seed", *TRAINING, "executor"),
    "problems/left-out.json": ("seed", *TRAINING),
    "problems/decontamination.json": ("seed", *TRAINING),
    "problems/eval-*.jsonl": ("seed", *EVALUATION),
    "problems/left-out-*.json": ("seed", *EVALUATION),
    "problems/judgebench.jsonl": ("judge",),
    "problems/critic-benchmark-*.jsonl": ("eval.critic_benchmarks.sources", "eval.critic_benchmarks.n_questions"),
}
"""What is made in a run's folder before the stages, and what it depends on: made anew when that has changed."""
