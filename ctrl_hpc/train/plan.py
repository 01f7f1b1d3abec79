"""The plan of a run before it is queued: memory of a rank by kind, time of a step, executors, jobs. Starts nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import psutil
import torch

from ctrl_hpc.config import Config
from ctrl_hpc.megatron import architecture as architectures
from ctrl_hpc.megatron.architecture import Architecture
from ctrl_hpc.megatron.memory import Memory, estimate
from ctrl_hpc.megatron.parallel_state import check, device_type

GIB = 1 << 30
RESERVE = {"cuda": 4.0, "cpu": 1.0}
"""GiB of a device that the process itself takes: context, communication buffers, imports, fragmentation."""
TFLOPS = {"cuda": 0.4 * 989.0, "cpu": 0.04}
"""Useful Tflop/s of a rank where none are given: 40 % of an H100's dense bf16 peak; one CPU core."""
ROLLOUT_TOKENS_PER_S = {"cuda": 3000.0, "cpu": 8000.0}
"""Of one critic server where none are given: a large model on a GPU, the tiny one on a CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a run would take; ``lines`` is the same for people."""

    n_parameters: int
    ranks: int
    data_size: int
    device: str
    memory: Memory
    available_gb: float | None
    """Device memory of a rank in GiB; None when it is not known here."""
    sft_step_s: float
    rl_update_s: float
    rl_rollout_s: float
    rl_tokens_per_s: float
    """Tokens through the trainer's update, of all ranks."""
    executor_workers: int
    """Jails that finish a step's executions within one update, so that the trainer does not wait for them."""
    jobs: tuple[str, ...]

    @property
    def fits(self) -> bool | None:
        """Whether the fullest rank fits its device; None when the device is not known here."""
        if self.available_gb is None:
            return None
        return self.memory.total / GIB + RESERVE[self.device] <= self.available_gb

    def lines(self) -> Iterator[str]:
        """The plan, a line a fact."""
        layout = f"{self.ranks} ranks on {self.device}, {self.data_size} data-parallel"
        yield f"critic: {self.n_parameters / 1e9:.3g}B parameters; trainer: {layout}"
        for field in fields(self.memory):
            yield f"memory of the fullest rank, {field.name}: {getattr(self.memory, field.name) / GIB:.2f} GiB"
        reserve = f"{RESERVE[self.device]:g} GiB reserve"
        yield f"memory of the fullest rank, total: {self.memory.total / GIB:.2f} GiB + {reserve}"
        if self.fits is None:
            yield "device memory: not known on this machine; set plan.memory_gb"
        elif self.fits:
            yield f"fits the device's {self.available_gb:.0f} GiB"
        else:
            yield f"does not fit the device's {self.available_gb:.0f} GiB: {self.remedy()}"
        yield f"sft step: {_seconds(self.sft_step_s)}"
        yield f"rl step: update {_seconds(self.rl_update_s)} ({self.rl_tokens_per_s:.0f} tokens/s), critiques "
        yield f"{_seconds(self.rl_rollout_s)}; executors to keep up: {self.executor_workers} jails"
        yield from (f"job: {job}" for job in self.jobs)

    def remedy(self) -> str:
        """Which key helps most: the one behind the largest part."""
        state = self.memory.weights + self.memory.gradients + self.memory.optimizer + self.memory.reference
        if state > self.memory.total / 2:
            return (
                "raise parallel.tensor or parallel.pipeline, or set parallel.distributed_optimizer=true, "
                "rl.reference=swap"
            )
        return "lower trainer.micro_batch_tokens, or set parallel.recompute=full, parallel.sequence=true"


def plan(config: Config) -> Plan:
    """The plan of a configuration; reads the critic's configuration only.

    Raises ValueError for a layout that cannot run.
    """
    ranks = config.trainer.nodes * config.trainer.ranks_per_node
    device = _device(config)
    check(config, ranks, device)
    architecture = architectures.read(config.critic.model)
    data_size = ranks // (config.parallel.tensor * config.parallel.pipeline)
    tokens = config.trainer.micro_batch_tokens
    response = config.rl.max_tokens / (config.rl.max_tokens + config.plan.prompt_tokens)
    memory = estimate(
        architecture,
        config.parallel,
        data_size=data_size,
        tokens=tokens,
        response_tokens=round(tokens * response),
        on_gpu=device == "cuda",
        reference_copy=config.rl.kl_coef > 0 and config.rl.reference == "copy",
    )
    flops = (config.plan.trainer_tflops or TFLOPS[device]) * 1e12 * ranks
    critiques = config.rl.prompts_per_step * config.rl.group_size
    length = config.plan.prompt_tokens + config.rl.max_tokens
    passes = 6 + 2 * (1 - 1 / config.rl.minibatches) + (2 if config.rl.kl_coef else 0)
    rl_update_s = passes / 6 * _training_flops(architecture, critiques * length, length) / flops
    rollout_rate = config.plan.rollout_tokens_per_s or ROLLOUT_TOKENS_PER_S[device]
    sft_length = min(config.sft.max_length, length)
    return Plan(
        n_parameters=architecture.n_parameters,
        ranks=ranks,
        data_size=data_size,
        device=device,
        memory=memory,
        available_gb=_available_gb(config, device),
        sft_step_s=_training_flops(architecture, config.sft.batch_size * sft_length, sft_length) / flops,
        rl_update_s=rl_update_s,
        rl_rollout_s=critiques * config.rl.max_tokens / (rollout_rate * max(1, config.rollout.critic_elements)),
        rl_tokens_per_s=critiques * length / rl_update_s,
        executor_workers=max(1, -int(-critiques / (rl_update_s * config.plan.executor_runs_per_s) // 1)),
        jobs=tuple(_jobs(config, ranks)),
    )


def _training_flops(architecture: Architecture, tokens: int, length: int) -> float:
    """6 operations a parameter and token, and causal attention's (forward 2 T^2 H D, backward twice that)."""
    embedding = architecture.vocab_size * architecture.hidden_size
    active = architecture.n_parameters - (0 if architecture.tied else embedding)
    attention = 6 * architecture.n_layers * length * architecture.n_heads * architecture.head_dim
    return float(tokens) * (6 * active + attention)


def _device(config: Config) -> str:
    """The device of the trainer's nodes, which need not be this machine's."""
    if config.trainer.device == "auto" and config.launch.trainer.gpus > 0:
        return "cuda"
    return config.trainer.device if config.trainer.device != "auto" else device_type(config)


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
    engine, trainer = config.launch.engine, config.trainer
    yield f"{engine}: trainer, {trainer.nodes} nodes x {trainer.ranks_per_node} ranks, one gang ({ranks} tasks)"
    yield f"{engine}: critic servers, an array of {config.rollout.critic_elements}"
    if Path(config.generator).is_dir():
        yield f"{engine}: generator servers, an array of {config.rollout.generator_elements}"
    yield f"{engine}: executors, an array of {config.executor.elements} x {config.executor.workers} jails"


def _seconds(value: float) -> str:
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.1f} s"
