"""What a rank can die of that is not its own mistake, told in one line: memory, a lost rank, a hung collective."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from ctrl_hpc.config import Config

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
        return f"rank {rank} is out of memory: {memory_knobs(config)} ({_short(text or 'MemoryError')})"
    if _LOST.search(text) and _TIMED_OUT.search(text):
        return (
            f"rank {rank}: a collective timed out after trainer.timeout_s={config.trainer.timeout_s:g} s, for another "
            f"rank hangs; the stacks of all ranks are in their logs ({_short(text)})"
        )
    if _LOST.search(text):
        return f"rank {rank}: connection closed by another rank, which died: its own log says of what ({_short(text)})"
    return None


def memory_knobs(config: Config) -> str:
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
