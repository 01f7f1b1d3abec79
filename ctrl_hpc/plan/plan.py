"""The plan of a run before it is queued: memory of a rank by kind, time of a step, executors, jobs. Starts nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import psutil
import torch

from ctrl_hpc.config import Config, JobConfig
from ctrl_hpc.config.machine import resolve_device
from ctrl_hpc.megatron import architecture as architectures
from ctrl_hpc.megatron import parallel_state
from ctrl_hpc.megatron.architecture import Architecture
from ctrl_hpc.plan.costs import Costs, costs
from ctrl_hpc.plan.memory import FP32, Memory, Workload, estimate
from ctrl_hpc.plan.rates import rates, runs_per_s
from ctrl_hpc.plan.work import critique_tokens, sharing, update_passes, work
from ctrl_hpc.rollout.weights import cpu_has_bfloat16, has_bfloat16_weights

GIB = 1 << 30
_RESERVE = {"cuda": 4.0, "cpu": 1.0}
"""GiB of a device that the process itself takes: context, communication buffers, imports, fragmentation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run would take; ``lines`` is the same for people."""

    model: str
    """Where the critic's sizes are from."""
    n_parameters: int
    ranks: int
    tensor: int
    data_size: int
    device: str
    stages: tuple[Memory, ...]
    """Memory of a rank of each pipeline stage."""
    available_gb: float | None
    """Device memory of a rank in GiB; None when it is not known here."""
    sft_step_s: float
    sft_tokens_per_s: float
    """Tokens through the trainer, of all ranks; likewise for RL."""
    rl_update_s: float
    rl_rollout_s: float
    rl_tokens_per_s: float
    max_staleness: int
    executor_workers: int
    """Jails that finish a step's executions within one update, so that the trainer does not wait for them."""
    costs: Costs
    jobs: tuple[str, ...]

    @property
    def memory(self) -> Memory:
        """Of the fullest rank."""
        return max(self.stages, key=lambda memory: memory.total)

    @property
    def fits(self) -> bool | None:
        """Whether the fullest rank fits its device; None when the device is not known here."""
        if self.available_gb is None:
            return None
        return self.memory.total / GIB + _RESERVE[self.device] <= self.available_gb

    def lines(self) -> Iterator[str]:
        """The plan, a line a fact."""
        layout = f"tensor {self.tensor} x pipeline {len(self.stages)} x data {self.data_size}"
        yield f"critic: {count(self.n_parameters)} parameters ({self.model})"
        yield f"trainer: {self.ranks} ranks on {self.device}, {layout}"
        for stage, memory in enumerate(self.stages):
            which = f"a rank of pipeline stage {stage}" if len(self.stages) > 1 else "a rank"
            kinds = {field.name: getattr(memory, field.name) for field in fields(memory)}
            told = ", ".join(f"{kind} {_size(size)}" for kind, size in kinds.items() if size)
            yield f"memory of {which}: {_size(memory.total)} = {told}"
        if self.fits is None:
            yield "device memory: not known on this machine; set plan.memory_gb"
        else:
            yield f"fits: {self.verdict()}" if self.fits else f"does not fit: {self.verdict()}"
        rate = self.costs.rates.trainer_tflops
        yield f"sft step: {_seconds(self.sft_step_s)}, {self.sft_tokens_per_s:.0f} tokens/s ({rate})"
        yield (
            f"rl step: update {_seconds(self.rl_update_s)}, {self.rl_tokens_per_s:.0f} tokens/s ({rate}); "
            f"sampling the critiques {_seconds(self.rl_rollout_s)}"
        )
        yield self.overlap()
        yield from self.costs.lines()
        yield f"executors that keep the trainer busy: {self.executor_workers} jails"
        yield from (f"job: {job}" for job in self.jobs)

    def overlap(self) -> str:
        """How the update and the sampling of an RL step lie to each other."""
        stale = self.max_staleness
        if stale == 0:
            return f"rl.max_staleness=0: one after the other, {_seconds(self.rl_update_s + self.rl_rollout_s)}"
        together = _seconds(max(self.rl_update_s, self.rl_rollout_s))
        return f"rl.max_staleness={stale}: beside each other, {together}; weights on disk: {stale + 2} versions at most"

    def verdict(self) -> str:
        """What the fullest rank needs and has; where that is too little, the keys that help most."""
        need = f"{self.memory.total / GIB:.1f} GiB + {_RESERVE[self.device]:g} GiB reserve"
        if self.fits:
            return f"{need} of {self.available_gb:.1f} GiB a rank"
        return f"a rank needs {need} and has {self.available_gb:.1f} GiB; {self.remedy()}"

    def remedy(self) -> str:
        """Which keys help most: those behind the largest part."""
        memory = self.memory
        state = memory.weights + memory.gradients + memory.optimizer + memory.reference + memory.value
        if state > memory.total / 2:
            return (
                "raise parallel.tensor or parallel.pipeline, or set parallel.distributed_optimizer=true "
                "(with data-parallel ranks), rl.reference=swap"
            )
        return "lower trainer.micro_batch_tokens, or set parallel.recompute=full, parallel.sequence=true"


def plan(config: Config) -> Plan:
    """The plan of a configuration; reads the critic's configuration only, by name where its folder is not here.

    Raises ValueError for a layout that cannot run, and for a critic whose sizes are not known.
    """
    ranks = config.trainer.nodes * config.trainer.ranks_per_node
    device = trainer_device(config)
    config.parallel.check(ranks)
    parallel_state.check_kernels(config, device)
    architecture, model = _architecture(config.critic.model)
    architectures.check_layout(architecture, config.parallel)
    data_size = ranks // (config.parallel.tensor * config.parallel.pipeline)
    rl = config.rl
    length = config.plan.prompt_tokens + critique_tokens(config)
    found = rates(config, device)
    flops = found.trainer_tflops.value * 1e12 * ranks
    step = work(config, data_size)
    rl_update_s = step.passes / 3 * training_flops(architecture, step.tokens, step.attended, step.learnt) / flops
    sft_length = min(config.sft.max_length, length)
    sft_tokens = config.sft.batch_size * sft_length
    sft_learnt = round(sft_tokens * critique_tokens(config) / length)
    sft_flops = training_flops(architecture, sft_tokens, sft_tokens * sft_length / 2, sft_learnt)
    sft_step_s = update_passes(config) / 3 * sft_flops / flops
    whole = costs(
        config,
        architecture,
        ranks=ranks,
        width=2 if _in_half(config, device) else FP32,
        step=step,
        update_s=rl_update_s,
        sft_step_s=sft_step_s,
        rates=found,
    )
    return Plan(
        model=model,
        n_parameters=architecture.n_parameters,
        ranks=ranks,
        tensor=config.parallel.tensor,
        data_size=data_size,
        device=device,
        stages=estimate(architecture, config.parallel, _workload(config, device, data_size)),
        available_gb=_available_gb(config, device),
        sft_step_s=sft_step_s,
        sft_tokens_per_s=sft_tokens / sft_step_s,
        rl_update_s=rl_update_s,
        rl_rollout_s=whole.sample_s,
        rl_tokens_per_s=step.tokens / rl_update_s,
        max_staleness=rl.max_staleness,
        executor_workers=max(1, math.ceil(step.revisions / (rl_update_s * runs_per_s(config.plan, found)))),
        costs=whole,
        jobs=tuple(_jobs(config, ranks)),
    )


def _response_share(config: Config, data_size: int) -> float:
    """Share of a full micro-batch's tokens that are critiques': those of a draft may share their prompt."""
    critiques = sharing(config, data_size) * critique_tokens(config)
    return critiques / (config.plan.prompt_tokens + critiques)


def _in_half(config: Config, device: str) -> bool:
    """Whether the critic is trained in bfloat16; where its processor decides, as on this machine's."""
    if config.trainer.dtype != "auto":
        return config.trainer.dtype == "bfloat16"
    return device == "cuda" or (has_bfloat16_weights(config.critic.model) and cpu_has_bfloat16())


def _workload(config: Config, device: str, data_size: int) -> Workload:
    """What a rank holds in RL."""
    rl, tokens = config.rl, config.trainer.micro_batch_tokens
    return Workload(
        data_size=data_size,
        tokens=tokens,
        response_tokens=round(tokens * _response_share(config, data_size)),
        on_gpu=device == "cuda",
        half=_in_half(config, device),
        reference_copy=rl.kl_coef > 0 and rl.reference == "copy" and not config.lora.rank,
        value_network=rl.estimator == "gae",
        lora=config.lora,
    )


def _architecture(model: str) -> tuple[Architecture, str]:
    """The critic's architecture, and where it is from: its folder, or the table of known models."""
    if (Path(model) / "config.json").is_file():
        return architectures.read(model), model
    try:
        return architectures.known(model), f"{model} is not here: sizes as known of {Path(model).name}"
    except ValueError as error:
        raise ValueError(f"critic.model: {error}") from None


def training_flops(architecture: Architecture, tokens: int, attended: float, learnt: int) -> float:
    """Forward and backward: 6 operations a parameter and token, 12 H D a layer and position that a token attends to.

    ``attended``: the sum of those positions over the tokens; T tokens of a causal sequence attend to T^2 / 2.
    ``learnt``: tokens in the loss, the only ones whose logits are computed.
    """
    embedding = architecture.vocab_size * architecture.hidden_size
    layers = architecture.n_parameters - embedding * (1 if architecture.tied else 2)
    attention = 12 * architecture.n_layers * architecture.n_heads * architecture.head_dim
    return 6.0 * (tokens * layers + learnt * embedding) + attention * attended


def trainer_device(config: Config) -> str:
    """The device of the trainer's nodes, which need not be this machine's."""
    if config.trainer.device != "auto":
        return config.trainer.device
    return "cuda" if config.launch.trainer.gpus > 0 else resolve_device("trainer.device", "auto")


def _available_gb(config: Config, device: str) -> float | None:
    if config.plan.memory_gb is not None:
        return config.plan.memory_gb
    if device == "cuda":
        return torch.cuda.get_device_properties(0).total_memory / GIB if torch.cuda.is_available() else None
    if config.launch.engine == "slurm":
        memory_gb = config.launch.trainer.memory_gb
        return None if memory_gb is None else memory_gb / config.trainer.ranks_per_node
    return psutil.virtual_memory().total / GIB / config.trainer.ranks_per_node


def _jobs(config: Config, ranks: int) -> Iterator[str]:
    launch, trainer, rollout, stages = config.launch, config.trainer, config.rollout, set(config.stages)
    if {"sft", "rl"} & stages:
        gang = f"{trainer.nodes} nodes x {trainer.ranks_per_node} ranks, one gang of {ranks} tasks"
        yield f"{launch.engine}: trainer, {gang}{_resources(config, launch.trainer)}"
    if {"synthesize", "rl", "eval"} & stages:
        if rollout.critic_urls:
            yield f"none for the critic: served at {', '.join(rollout.critic_urls)}"
        else:
            array = f"an array of {rollout.critic_elements}"
            yield f"{launch.engine}: critic servers, {array}{_resources(config, launch.rollout)}"
    if {"sample", "rl", "eval"} & stages:
        if config.generator_is_served:
            array = f"an array of {rollout.generator_elements}"
            yield f"{launch.engine}: generator servers, {array}{_resources(config, launch.rollout)}"
        array = f"an array of {config.executor.elements} x {config.executor.workers} jails"
        yield f"{launch.engine}: executors, {array}{_resources(config, launch.executor)}"


def _resources(config: Config, job: JobConfig) -> str:
    """What Slurm is asked for a task."""
    if config.launch.engine != "slurm":
        return ""
    memory = "" if job.memory_gb is None else f", {job.memory_gb:g} GiB"
    partition = f" on {job.partition}" if job.partition else ""
    return f"; a task: {job.gpus} GPU, {job.cpus} CPU{memory}, {job.time_min} min{partition}"


def count(number: int) -> str:
    """A number in three digits: 348k, 7.62B."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _size(size: int) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB // 10 else f"{size / (1 << 20):.1f} MiB"


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
