"""The configuration as a whole: its sections, and what must hold between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from ctrl_hpc.config.facts import Example, Fact, Free, IsPath, Must, NotNegative, facts, is_url
from ctrl_hpc.config.machine import (
    EndpointConfig,
    ExecutorConfig,
    LaunchConfig,
    ParallelConfig,
    PlanConfig,
    RolloutConfig,
    TrackingConfig,
    TrainerConfig,
    WandbConfig,
)
from ctrl_hpc.config.method import (
    CriticConfig,
    DataConfig,
    EvalConfig,
    JudgeConfig,
    LoraConfig,
    PromptConfig,
    RLConfig,
    SampleConfig,
    SFTConfig,
    SynthesizeConfig,
    TinyConfig,
)
from ctrl_hpc.config.objectives import LOSSES
from ctrl_hpc.config.stages import STAGES
from ctrl_hpc.records import CLOSE_ROOM, thought_room

ORACLE = "oracle"
"""The generator that answers with the canonical solutions."""
_IS_STAGE = Must(STAGES.__contains__, f"be one of {', '.join(STAGES)}")
_IS_NAME = Must(lambda name: bool(name) and "/" not in name, "be a name without slashes")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A whole run."""

    name: Annotated[str, _IS_NAME]
    """Name of the run."""
    run_dir: Free[str] | None = None
    """Folder of everything the run writes; None: ``runs/NAME``."""
    seed: NotNegative[int] = 0
    """Seed of every random choice."""
    cluster: Free[str] = "local"
    """Profile of ``configs/cluster`` (or a YAML file) that fills ``launch``: local, slurm, testcluster."""
    generator: Annotated[str, IsPath(names=(ORACLE,)), Example("https://api.openai.com/v1")] = "models/tiny/generator"
    """The fixed generator: a Hugging Face folder, the URL of an OpenAI-compatible endpoint, or ``oracle``."""
    generator_model: str | None = None
    """Model name asked for when ``generator`` is a URL."""
    generator_thinking: Literal["auto", "on", "off"] = "auto"
    """Whether the generator thinks before it answers, as ``critic.thinking``; its thought is no part of its answer."""
    generator_thought_tokens: NotNegative[int] = 0
    """Longest thought in tokens, beside the ``max_tokens`` of drafts and revisions; 0: both share those."""
    generator_close_thought: bool = False
    """End a thought that does not end within ``generator_thought_tokens`` by force, for a program to follow, as
    ``critic.close_thought``; not of a generator that is an endpoint. False: it leaves no program."""
    stages: Free[tuple[Annotated[str, _IS_STAGE], ...]] = tuple(STAGES)
    """Stages of ``ctrl-hpc run``, in order."""
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)
    """The generator's endpoint, when it is a URL."""
    data: DataConfig = field(default_factory=DataConfig)
    """Problems."""
    tiny: TinyConfig = field(default_factory=TinyConfig)
    """The miniature world."""
    prompts: PromptConfig = field(default_factory=PromptConfig)
    """Templates."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """The critic."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters in place of the critic's weights."""
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
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """JudgeBench."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """The trainer's processes."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Megatron's parallelism."""
    plan: Free[PlanConfig] = field(default_factory=PlanConfig)
    """Rates that the plan counts with."""
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    """The executor array."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """The rollout arrays."""
    launch: Free[LaunchConfig] = field(default_factory=LaunchConfig)
    """Slurm or local."""
    wandb: Free[WandbConfig] = field(default_factory=WandbConfig)
    """Tracking by wandb."""
    tracking: Free[TrackingConfig] = field(default_factory=TrackingConfig)
    """Tracking by others."""

    @property
    def generator_thought_room(self) -> int:
        """Tokens of the generator's thought, beside those of its answer."""
        return thought_room(self.generator_thinking, self.generator_thought_tokens)

    @property
    def generator_is_url(self) -> bool:
        """Whether the generator is an endpoint that somebody else serves."""
        return is_url(self.generator)

    @property
    def generator_is_served(self) -> bool:
        """Whether the generator is a folder, which an array of the run serves."""
        return not (self.generator_is_url or self.generator == ORACLE)

    @property
    def publishes_adapters_alone(self) -> bool:
        """Whether the critic's servers, of ours then, merge adapters themselves."""
        return self.lora.rank > 0 and self.rollout.engine == "builtin" and not self.rollout.critic_urls


def known() -> dict[str, Fact]:
    """The facts of every key, sections among them, by dotted key, in order."""
    return dict(facts(Config))


def value(config: Any, key: str) -> Any:
    """The value at a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def check(config: Config) -> None:
    """Raises ValueError, in one line that names the key, the value and what is allowed, for the first that is wrong."""
    for key, fact in facts(Config).items():
        if not fact.is_section:
            fact.check(value(config, key))
    _check_combinations(config)


def _check_objective(rl: RLConfig) -> None:
    if rl.estimator not in ("gae", "reinforce_pp") and rl.group_size == 1:
        raise ValueError(f"rl.group_size: 1 gives {rl.estimator} no advantage; at least 2, or rl.estimator=gae")
    if rl.estimator == "pass_k" and rl.pass_k >= rl.group_size:
        raise ValueError(f"rl.pass_k: {rl.pass_k} must be less than rl.group_size={rl.group_size}")
    for key, off in (("ratio", "token"), ("dual_clip", None), ("ratio_cap", None)):
        users = [name for name, objective in LOSSES.items() if key in objective.keys]
        if getattr(rl, key) != off and rl.loss not in users:
            raise ValueError(f"rl.{key}: goes with rl.loss={' or '.join(users)}, not {rl.loss}")
    if rl.clip_low > 1 and rl.loss not in ("dppo", "gmpo"):
        raise ValueError(f"rl.clip_low: {rl.clip_low} leaves no ratio above 0; at most 1")


_SENTENCE_TOKENS = 24
"""Of which ``rl.credit=sentence`` takes a sentence to be, where its cost is estimated."""


def _check_credit(rl: RLConfig) -> None:
    if rl.credit == "critique":
        return
    if rl.estimator not in ("grpo", "dr_grpo", "rloo"):
        raise ValueError(f"rl.credit: {rl.credit} goes with rl.estimator=grpo, dr_grpo or rloo, not {rl.estimator}")
    if rl.turns > 1:
        raise ValueError(f"rl.credit: {rl.credit} goes with rl.turns=1, not {rl.turns}")
    sentences = -(-rl.max_tokens // _SENTENCE_TOKENS)
    cost = rl.prompts_per_step * rl.group_size * sentences
    if cost > rl.credit_limit:
        raise ValueError(
            f"rl.credit: {rl.credit} would take about {cost} revisions and executions a step ({rl.prompts_per_step} "
            f"drafts x {rl.group_size} critiques x {sentences} sentences), {sentences} times as many as without; "
            f"rl.credit_limit allows {rl.credit_limit}: raise it, or make steps smaller or critiques shorter"
        )


def _check_thinking(config: Config) -> None:
    critic, longest = config.critic, config.rl.max_tokens + config.critic.thought_room
    if critic.close_thought and not critic.thought_room:
        raise ValueError("critic.close_thought: needs a budget, critic.thought_tokens, and a critic that thinks")
    if config.generator_close_thought and not config.generator_thought_room:
        raise ValueError(
            "generator_close_thought: needs a budget, generator_thought_tokens, and a generator that thinks"
        )
    if config.generator_close_thought and not config.generator_is_served:
        raise ValueError(
            f"generator_close_thought: goes with a generator that the run serves, a folder; not with {config.generator}"
        )
    if critic.close_thought and config.prompts.critique_close:
        raise ValueError("critic.close_thought: does not go with prompts.critique_close; leave one of them out")
    if critic.thinking == "on" and config.prompts.critique_prefix:
        raise ValueError("critic.thinking: on leaves no place for prompts.critique_prefix, which begins the answer")
    if config.rl.overlong_buffer > longest:
        raise ValueError(f"rl.overlong_buffer: {config.rl.overlong_buffer} is more than a critique's {longest} tokens")


def _check_combinations(config: Config) -> None:
    lengths = {"synthesize": config.synthesize.max_tokens, "rl": config.rl.max_tokens, "eval": config.eval.max_tokens}
    for section, length in lengths.items():
        if config.prompts.critique_close and length <= CLOSE_ROOM:
            raise ValueError(
                f"{section}.max_tokens: {length} leaves no room for prompts.critique_close, which takes {CLOSE_ROOM}; "
                "raise it, or leave that empty"
            )
    config.parallel.check(config.trainer.nodes * config.trainer.ranks_per_node)
    _check_objective(config.rl)
    _check_credit(config.rl)
    _check_thinking(config)
    samples = config.rl.prompts_per_step * config.rl.group_size
    if samples < config.rl.minibatches:
        raise ValueError(f"rl.minibatches: {config.rl.minibatches} is more than the {samples} critiques of a step")
    if config.generator_is_served and config.rollout.generator_elements == 0:
        raise ValueError(
            "rollout.generator_elements: 0 leaves the generator's folder unserved; at least 1, or generator=URL"
        )
    if config.rl.publish == "delta" and config.rollout.critic_urls:
        raise ValueError(
            "rl.publish: delta is understood by servers of ours alone, and rollout.critic_urls names others; full"
        )
    if config.rl.publish == "delta" and config.lora.rank:
        raise ValueError(
            "rl.publish: delta is for whole critics; with lora.rank the adapters alone are published; full"
        )
    if config.rollout.engine != "builtin" and config.rl.publish == "delta":
        raise ValueError(
            f"rl.publish: delta is understood by servers of ours alone, and rollout.engine is "
            f"{config.rollout.engine}; full"
        )
    if config.rollout.engine == "builtin" and config.rollout.tensor > 1:
        raise ValueError(f"rollout.tensor: {config.rollout.tensor} needs rollout.engine=sglang or vllm")
    if config.generator_is_url and not config.generator_model:
        raise ValueError("generator_model: missing; a generator that is a URL needs the name of its model")
