"""The configuration: one tree of frozen dataclasses, read from YAML with ``a.b=c`` overrides.

``load`` merges, later ones winning: the defaults of the dataclasses, the cluster profile, the YAML file, the overrides.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from ctrl_hpc.config.experiment import DataConfig, EvalConfig, JudgeConfig, PromptConfig, WandbConfig
from ctrl_hpc.config.sections import (
    CriticConfig,
    EndpointConfig,
    ExecutorConfig,
    JobConfig,
    LaunchConfig,
    LimitsConfig,
    OptimizerConfig,
    ParallelConfig,
    PlanConfig,
    RLConfig,
    RolloutConfig,
    SampleConfig,
    SFTConfig,
    SynthesizeConfig,
    TinyConfig,
    TrainerConfig,
)

__all__ = [
    "STAGES",
    "Config",
    "CriticConfig",
    "DataConfig",
    "EndpointConfig",
    "EvalConfig",
    "ExecutorConfig",
    "JobConfig",
    "JudgeConfig",
    "LaunchConfig",
    "LimitsConfig",
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
    "dump",
    "load",
    "value",
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
    plan: PlanConfig = field(default_factory=PlanConfig)
    """Rates that the plan counts with."""
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    """The executor array."""
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """The rollout arrays."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    """Slurm or local."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Tracking."""


_POSITIVE = (
    "data.n_train data.n_eval sample.n_samples sample.max_tokens synthesize.n_critiques synthesize.max_tokens "
    "trainer.nodes trainer.ranks_per_node trainer.micro_batch_tokens trainer.threads trainer.timeout_s "
    "trainer.keep_checkpoints sft.epochs sft.batch_size sft.max_length sft.save_every sft.optimizer.lr rl.steps "
    "rl.prompts_per_step rl.group_size rl.temperature rl.max_tokens rl.max_revision_tokens rl.minibatches "
    "rl.save_every rl.eval_problems rl.optimizer.lr rl.value_clip rl.value_optimizer.lr rl.gae_gamma "
    "plan.executor_runs_per_s plan.prompt_tokens eval.turns eval.n_samples eval.temperature eval.max_tokens "
    "eval.bootstrap eval.chunk eval.chunks_in_flight eval.votes rl.chunks_in_flight "
    "parallel.tensor parallel.pipeline executor.elements executor.workers executor.limits.cpu_s "
    "executor.limits.wall_s executor.limits.memory_mb executor.limits.output_bytes executor.limits.processes "
    "executor.time_factor "
    "rollout.critic_elements rollout.threads rollout.max_batch_tokens launch.heartbeat_s launch.dead_after_s "
    "launch.start_timeout_s launch.array_parallelism wandb.services_every_s endpoint.max_in_flight endpoint.max_tries "
    "endpoint.timeout_s"
).split()
_NOT_NEGATIVE = (
    "seed sample.adversarial_tests rl.leak_penalty "
    "sample.temperature synthesize.temperature sft.optimizer.warmup_steps rl.optimizer.warmup_steps "
    "sft.optimizer.weight_decay rl.optimizer.weight_decay sft.optimizer.clip_grad rl.optimizer.clip_grad "
    "rl.value_optimizer.warmup_steps rl.value_optimizer.weight_decay rl.value_optimizer.clip_grad "
    "rl.clip_low rl.clip_high rl.kl_coef rl.entropy_coef rl.max_staleness rl.chunk rl.eval_every rl.save_samples "
    "rl.refill_rounds "
    "rollout.generator_elements launch.max_requeues launch.signal_delay_s launch.disk_patience_s "
    "endpoint.price_in endpoint.price_out "
    "eval.report_samples"
).split()
STAGES = ("sample", "synthesize", "sft", "rl", "eval", "report")
"""Stages of a run, in order."""


def load(path: str | Path, overrides: Sequence[str] = (), *, validate: bool = True) -> Config:
    """The configuration of a YAML file with ``a.b=c`` overrides.

    Relative model and data paths that do not exist from the working directory are taken from the project's root (the
    folder above ``configs``). Raises ValueError with one line that names the key, the value and what is allowed.
    Without ``validate`` values are taken as they are, as of a run whose files may have moved since.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such configuration file")
    schema = OmegaConf.structured(Config)
    try:
        file = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, OSError) as error:
        raise ValueError(f"{path}: not valid YAML: {_one_line(error)}") from None
    given = _merge(schema, file, str(path))
    extra = OmegaConf.merge(*map(_override, overrides)) if overrides else OmegaConf.create()
    given = _merge(given, extra, "override")
    chosen = any(text.startswith("cluster=") for text in overrides)
    # a run's own config.yaml says all that its profile, which may be gone, had said
    profile = _profile(str(given.cluster), path) if chosen or not _is_whole(file) else None
    merged = schema if profile is None else _merge(schema, OmegaConf.load(profile), str(profile))
    merged = _merge(merged, file, str(path))
    merged = _merge(merged, extra, "override")
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise ValueError(f"{path}: {missing[0]}: missing; every configuration names it")
    config: Any = OmegaConf.to_object(merged)
    assert isinstance(config, Config)
    config = _shaped(_absolute_paths(config, path))
    if validate:
        _validate(config)
    return config


def _is_whole(file: Any) -> bool:
    """Whether a file gives every key, the launch section's too, as :func:`dump` writes them."""
    launch: Any = file.get("launch") if OmegaConf.is_dict(file) else None
    if not OmegaConf.is_dict(launch):
        return False
    return {item.name for item in fields(Config)} <= set(file) and {item.name for item in fields(LaunchConfig)} <= set(
        launch
    )


def dump(config: Config) -> str:
    """The whole configuration as YAML, defaults included; ``load`` reads it back to an equal configuration."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def value(config: Any, key: str) -> Any:
    """The value at a dotted key."""
    for part in key.split("."):
        config = getattr(config, part)
    return config


def _override(text: str) -> Any:
    key, equals, item = text.partition("=")
    if not equals or not key:
        raise ValueError(f"override {text!r}: expected KEY=VALUE, for example rl.steps=50")
    # wandb sweeps write Python's None
    item = "null" if item == "None" else item
    try:
        return OmegaConf.from_dotlist([f"{key}={item}"])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"override {text!r}: {_one_line(error)}") from None


def _merge(base: Any, extra: Any, where: str) -> Any:
    try:
        return OmegaConf.merge(base, extra)
    except OmegaConfBaseException as error:
        raise ValueError(f"{where}: {_explain(error, base, extra)}") from None


def _explain(error: OmegaConfBaseException, base: Any, extra: Any) -> str:
    key = error.full_key
    if isinstance(error, ConfigKeyError) and key:
        parent = OmegaConf.select(base, key.rpartition(".")[0]) if "." in key else base
        allowed = sorted(map(str, parent)) if OmegaConf.is_dict(parent) else []
        close = difflib.get_close_matches(key.rpartition(".")[2], allowed, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        return f"{key}: unknown key{hint}; allowed: {', '.join(allowed)}"
    if not key:  # a section given as a plain value: find which
        for name in extra:
            if OmegaConf.is_dict(OmegaConf.select(base, str(name))) and not OmegaConf.is_dict(extra[name]):
                return f"{name}: {extra[name]!r} is not a section; write {name}.KEY=VALUE"
    return f"{key}: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split("\n    full_key")[0].split())


def _profile(name: str, path: Path) -> Path | None:
    """The file of a cluster profile: a path, or a name looked up beside the configuration and in the project."""
    places = [Path(name)] if name.endswith((".yaml", ".yml")) else []
    folders = [path.parent / "cluster", path.parent.parent / "cluster", ROOT / "configs" / "cluster"]
    places += [folder / f"{name}.yaml" for folder in folders]
    for place in places:
        if place.is_file():
            return place
    if name == "local":
        return None
    known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")} | {"local"})
    raise ValueError(f"cluster: {name!r} is not a profile; allowed: {', '.join(known)}, or the path of a YAML file")


ROOT = Path(__file__).resolve().parents[2]
"""The project's folder: configs, models and slurm lie there in a checkout."""


def _absolute_paths(config: Config, file: Path) -> Config:
    roots = [Path.cwd(), *file.resolve().parents, ROOT]

    def absolute(text: str | None) -> str | None:
        if text is None or "://" in text or Path(text).is_absolute():
            return text
        return str(next((root / text for root in roots if (root / text).exists()), Path.cwd() / text))

    def function_in(place: str) -> str:
        file, sign, function = place.rpartition(":")
        return f"{absolute(file)}{sign}{function}"

    is_folder = config.generator != "oracle"
    own, further = config.data.eval_paths, config.data.benchmarks
    data = replace(
        config.data,
        path=absolute(config.data.path),
        eval_path=absolute(config.data.eval_path),
        eval_paths={name: absolute(place) or "" for name, place in own.items()},
        benchmarks={name: (absolute(place) or "") if place else "" for name, place in further.items()},
    )
    folder, judges = config.prompts.folder, config.executor.judges
    return replace(
        config,
        run_dir=str(Path(config.run_dir or Path("runs") / config.name).absolute()),
        generator=(absolute(config.generator) or "") if is_folder else config.generator,
        data=data,
        tiny=replace(config.tiny, models=absolute(config.tiny.models) or ""),
        critic=replace(config.critic, model=absolute(config.critic.model) or ""),
        judge=replace(config.judge, path=absolute(config.judge.path), template=absolute(config.judge.template)),
        executor=replace(config.executor, judges={name: function_in(place) for name, place in judges.items()}),
        eval=replace(config.eval, models={name: absolute(place) or "" for name, place in config.eval.models.items()}),
        prompts=replace(config.prompts, folder=(absolute(folder) or "") if "/" in folder else folder),
    )


def _shaped(config: Config) -> Config:
    """With ``eval.widths``, the number of drafts and of turns that it says."""
    widths = config.eval.widths
    if not widths:
        return config
    if len(widths) < 2 or min(widths) < 1:
        told = "drafts a problem, then critiques in each of at least one turn, all 1 or more"
        raise ValueError(f"eval.widths: {list(widths)} is not allowed; {told}")
    return replace(config, eval=replace(config.eval, n_samples=widths[0], turns=len(widths) - 1))


def _validate(config: Config) -> None:
    for key in _POSITIVE:
        if not value(config, key) > 0:
            raise ValueError(f"{key}: {value(config, key)} is not allowed; it must be greater than 0")
    for key in _NOT_NEGATIVE:
        if not value(config, key) >= 0:
            raise ValueError(f"{key}: {value(config, key)} is not allowed; it must be 0 or greater")
    if not config.name or "/" in config.name:
        raise ValueError(f"name: {config.name!r} is not allowed; a name without slashes")
    for stage in config.stages:
        if stage not in STAGES:
            raise ValueError(f"stages: {stage!r} is not a stage; allowed: {', '.join(STAGES)}")
    if config.judge.votes and min(config.judge.votes) < 1:
        raise ValueError(f"judge.votes: {list(config.judge.votes)} is not allowed; each must be greater than 0")
    for name, place in config.executor.judges.items():
        file, _, function = place.rpartition(":")
        if not (file.endswith(".py") and Path(file).is_file() and function.isidentifier()):
            raise ValueError(
                f"executor.judges.{name}: {place!r} is not allowed; it must be FILE.py:FUNCTION of a file that exists"
            )
    for name, override in config.executor.overrides.items():
        for key in ("cpu_s", "memory_mb"):
            given = getattr(override, key)
            if given is not None and not given > 0:
                raise ValueError(f"executor.overrides.{name}.{key}: {given} is not allowed; it must be greater than 0")
    given = config.rl.transition_reward
    if given and set(given) != {"fix", "keep", "break", "stuck"}:
        raise ValueError(
            f"rl.transition_reward: {dict(given)} is not allowed; a number for each of fix, keep, break, stuck"
        )
    for key in ("rl.verdict_coef", "rl.verdict_only_share", "rl.gae_gamma", "rl.gae_lambda"):
        if not 0.0 <= value(config, key) <= 1.0:
            raise ValueError(f"{key}: {value(config, key)} is not allowed; it must lie in [0, 1]")
    for key in ("plan.memory_gb", "plan.trainer_tflops", "plan.rollout_tokens_per_s"):
        given = value(config, key)
        if given is not None and not given > 0:
            raise ValueError(f"{key}: {given} is not allowed; it must be greater than 0, or null")
    for key in ("rl.importance_cap", "rl.max_prompt_tokens"):
        given = value(config, key)
        if given is not None and not given > 0:
            raise ValueError(f"{key}: {given} is not allowed; it must be greater than 0, or null")
    if config.rl.dual_clip is not None and config.rl.dual_clip <= 1.0:
        raise ValueError(f"rl.dual_clip: {config.rl.dual_clip} is not allowed; it must be greater than 1, or null")
    _validate_combinations(config)


def _validate_combinations(config: Config) -> None:
    ranks = config.trainer.nodes * config.trainer.ranks_per_node
    model_ranks = config.parallel.tensor * config.parallel.pipeline
    if ranks % model_ranks:
        raise ValueError(
            f"parallel.tensor x parallel.pipeline = {model_ranks} does not divide the trainer's {ranks} ranks "
            f"(trainer.nodes {config.trainer.nodes} x trainer.ranks_per_node {config.trainer.ranks_per_node})"
        )
    if config.parallel.sequence and config.parallel.tensor == 1:
        raise ValueError("parallel.sequence: true needs parallel.tensor > 1")
    if config.rl.estimator != "gae" and config.rl.group_size == 1:
        raise ValueError(f"rl.group_size: 1 gives {config.rl.estimator} no advantage; at least 2, or rl.estimator=gae")
    samples = config.rl.prompts_per_step * config.rl.group_size
    if samples < config.rl.minibatches:
        raise ValueError(f"rl.minibatches: {config.rl.minibatches} is more than the {samples} critiques of a step")
    served = "://" not in config.generator and config.generator != "oracle"
    if served and config.rollout.generator_elements == 0:
        raise ValueError(
            "rollout.generator_elements: 0 leaves the generator's folder unserved; at least 1, or generator=URL"
        )
    limit = config.endpoint.requests_per_min
    if limit is not None and not limit > 0:
        raise ValueError(f"endpoint.requests_per_min: {limit} is not allowed; it must be greater than 0, or null")
    if "://" in config.generator and not config.generator_model:
        raise ValueError("generator_model: missing; a generator that is a URL needs the name of its model")
