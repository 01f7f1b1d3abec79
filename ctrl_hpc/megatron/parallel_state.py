"""Process groups of a trainer's ranks, and how the failure of one ends all."""

from __future__ import annotations

import datetime
import faulthandler
import os
import random
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist

from ctrl_hpc import jsonl
from ctrl_hpc.config import Config
from ctrl_hpc.config.machine import resolve_device
from ctrl_hpc.rollout.weights import cpu_has_bfloat16, has_bfloat16_weights

_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory|bad_alloc", re.IGNORECASE)
_TIMED_OUT = re.compile(r"timed out|timeout", re.IGNORECASE)
_LOST = re.compile(r"gloo|nccl|connection (reset|closed|refused)|broken pipe|socket", re.IGNORECASE)


@contextmanager
def told(config: Config, rank: int) -> Iterator[None]:
    """Raise RuntimeError with one line, what happened and what helps, for the faults of machines; others pass."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        line = explain(error, config, rank)
        if line is None:
            raise
        raise RuntimeError(line) from error


def explain(error: BaseException, config: Config, rank: int) -> str | None:
    """The line for an error, or None when it is no such fault."""
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or _MEMORY.search(text):
        return f"rank {rank} is out of memory: {_memory_knobs(config)} ({_short(text or 'MemoryError')})"
    if _LOST.search(text) and _TIMED_OUT.search(text):
        return (
            f"rank {rank}: a collective timed out after trainer.timeout_s={config.trainer.timeout_s:g} s, for another "
            f"rank hangs; the stacks of all ranks are in their logs ({_short(text)})"
        )
    if _LOST.search(text):
        return f"rank {rank}: connection closed by another rank, which died: its own log says of what ({_short(text)})"
    return None


def _memory_knobs(config: Config) -> str:
    """The keys that make a rank need less, with what they are now."""
    parallel = config.parallel
    knobs = [f"lower trainer.micro_batch_tokens (now {config.trainer.micro_batch_tokens})"]
    if parallel.recompute != "full":
        knobs.append(f"set parallel.recompute=full (now {parallel.recompute})")
    knobs.append(f"raise parallel.tensor (now {parallel.tensor})")
    if not parallel.distributed_optimizer:
        knobs.append("set parallel.distributed_optimizer=true")
    return ", ".join(knobs) + "; `ctrl-hpc run CONFIG --dry-run` tells what a layout needs"


def _short(text: str) -> str:
    return text if len(text) <= 160 else text[:157] + "..."


type Group = dist.ProcessGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This rank's place in the job. Group objects are for collectives on ``device``; ``host_group`` moves CPU data."""

    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype
    """Of weights and activations; gradients and optimizer state are fp32 always."""
    tensor_rank: int
    tensor_size: int
    tensor_group: Group
    pipeline_rank: int
    pipeline_size: int
    data_rank: int
    data_size: int

    @property
    def main(self) -> bool:
        """Whether this rank talks to the outside: services, files that all share, tracking."""
        return self.rank == 0

    @property
    def first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pipeline_rank == 0

    @property
    def last_stage(self) -> bool:
        """Whether this rank holds the output layer, so that it computes losses."""
        return self.pipeline_rank == self.pipeline_size - 1

    def from_main[**P, T](self, make: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """What ``make(...)`` returns on rank 0, on every rank; only rank 0 calls it. Any picklable object.

        When it raises there, the other ranks raise RuntimeError with its text instead of waiting for it.
        """
        if self.size == 1:
            return make(*args, **options)
        if not self.main:
            box: list[Any] = [None]
            dist.broadcast_object_list(box, src=0)
            value, error = box[0]
            if error is not None:
                raise RuntimeError(f"rank 0 {error}")
            return value
        try:
            made = make(*args, **options)
        except BaseException as error:
            what = "failed" if isinstance(error, Exception) else "was told to stop"  # by a signal: not its own mistake
            dist.broadcast_object_list([(None, f"{what}: {type(error).__name__}: {error}")], src=0)
            raise
        dist.broadcast_object_list([(made, None)], src=0)
        return made

    def barrier(self) -> None:
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier()


def check_kernels(config: Config, kind: str) -> None:
    """Raises ValueError for loss kernels that cannot run on ``kind``, cpu or cuda."""
    if kind == "cpu" and config.trainer.kernels == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("trainer.kernels=triton needs trainer.device=cuda (or TRITON_INTERPRET=1, for tests)")


def initialize(config: Config) -> World:
    """Join the job: process group, Megatron's groups, seeds, threads, and a stack dump for whatever hangs or crashes.

    Collectives that take longer than ``trainer.timeout_s`` fail. Raises ValueError for an impossible layout.
    """
    faulthandler.enable()
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    kind = resolve_device("trainer.device", config.trainer.device)
    config.parallel.check(size)
    check_kernels(config, kind)
    if kind == "cpu":
        from ctrl_hpc.megatron import cpu

        cpu.install()
        torch.set_num_threads(config.trainer.threads)
    device = (
        torch.device(kind, int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        if kind == "cuda"
        else torch.device("cpu")
    )
    if kind == "cuda":
        torch.cuda.set_device(device)
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if size == 1:
        os.environ.setdefault("MASTER_PORT", "0")  # a free one
    timeout = datetime.timedelta(seconds=config.trainer.timeout_s)
    backend = "gloo" if kind == "cpu" else "cpu:gloo,cuda:nccl"
    if not dist.is_initialized():
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)

    from megatron.core import parallel_state as mpu

    mpu.initialize_model_parallel(
        tensor_model_parallel_size=config.parallel.tensor,
        pipeline_model_parallel_size=config.parallel.pipeline,
        create_gloo_process_groups=False,
        distributed_timeout_minutes=config.trainer.timeout_s / 60,  # type: ignore[arg-type]  # it makes a timedelta
    )
    _seed_everything(config.seed)
    _start_random_tracker(kind, config.seed)
    return World(
        rank=rank,
        size=size,
        device=device,
        dtype=_dtype(config, kind),
        tensor_rank=mpu.get_tensor_model_parallel_rank(),
        tensor_size=mpu.get_tensor_model_parallel_world_size(),
        tensor_group=mpu.get_tensor_model_parallel_group(),
        pipeline_rank=mpu.get_pipeline_model_parallel_rank(),
        pipeline_size=mpu.get_pipeline_model_parallel_world_size(),
        data_rank=mpu.get_data_parallel_rank(),
        data_size=mpu.get_data_parallel_world_size(),
    )


@contextmanager
def job(config: Config) -> Iterator[World]:
    """``initialize`` for the length of a block; the groups are taken down when it ends well.

    When it ends badly they are left: taking them down would wait for ranks that may hang. Raises RuntimeError with one
    line for memory that is out, a rank that is lost and a collective that hangs.
    """
    with told(config, int(os.environ.get("RANK", "0"))):
        world = initialize(config)
        watch(config.trainer.timeout_s)
        yield world
    faulthandler.cancel_dump_traceback_later()
    _destroy()


def _destroy() -> None:
    """Leave the job."""
    dismantle()
    dist.destroy_process_group()


def dismantle() -> None:
    """Take down Megatron's groups only: the ranks can be arranged anew by ``initialize``."""
    from megatron.core import parallel_state as mpu
    from megatron.core.tensor_parallel import random as tensor_random

    mpu.destroy_model_parallel()
    mpu.destroy_global_memory_buffer()
    tensor_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False


def watch(timeout_s: float) -> None:
    """Restart the watch: without another call every thread's stack goes to stderr, shortly before ``timeout_s`` is up.

    Before, so that every rank has told where it is when the first one's collective times out and the job is ended; and
    again after as long, for a collective may have begun late.
    """
    faulthandler.dump_traceback_later(0.9 * timeout_s, repeat=True, file=sys.__stderr__ or 2)


def _seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch; the same on every rank, for nothing random depends on the layout."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _start_random_tracker(kind: str, seed: int) -> None:
    if kind == "cuda":
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        model_parallel_cuda_manual_seed(seed)
    else:
        from ctrl_hpc.megatron import cpu

        cpu.start_random_tracker()


def _dtype(config: Config, kind: str) -> torch.dtype:
    """The type of weights and activations, the same on all ranks: the first rank's processor decides."""
    name = config.trainer.dtype
    if name == "auto" and kind == "cuda":
        name = "bfloat16"
    elif name == "auto":
        pays = [dist.get_rank() == 0 and _pays(config)]
        if dist.get_world_size() > 1:
            dist.broadcast_object_list(pays, src=0)
        name = "bfloat16" if pays[0] else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def _pays(config: Config) -> bool:
    """Whether a CPU trains this critic in bfloat16; a run that has begun goes on as it began, on whatever processor."""
    pays = has_bfloat16_weights(config.critic.model) and cpu_has_bfloat16()
    if config.run_dir is None:
        return pays
    chosen = Path(config.run_dir) / "trainer-dtype"
    if chosen.exists():
        return chosen.read_text(encoding="utf-8").strip() == "bfloat16"
    if any(Path(config.run_dir).glob("*/checkpoints/step-*")):
        return False
    if pays:
        chosen.parent.mkdir(parents=True, exist_ok=True)
        jsonl.write_text(chosen, "bfloat16\n")
    return pays
