"""Checkpoints: Megatron's distributed format (any TP x PP x DP in, any out), atomic, the newest ones kept.

A checkpoint is a folder ``step-NNNNNN`` with model, optimizer, random state of every rank, and a small dictionary of
progress (step, position in the data, tracking id). It is written beside its place and renamed when it is whole, so a
crash leaves the last good one.
"""

from __future__ import annotations

import os
import queue
import random
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import GPTModel
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ctrl_hpc.megatron import lora
from ctrl_hpc.megatron.architecture import HUGGINGFACE
from ctrl_hpc.megatron.export import copy_side_files
from ctrl_hpc.megatron.optimizer import Optimizer
from ctrl_hpc.megatron.parallel_state import World

EMBEDDING = "embedding.word_embeddings.weight"
"""Name of a tensor that every checkpoint has."""
_NAME = re.compile(r"step-(\d{6,})")


def _local_queue(*_unused: Any, **_options: Any) -> queue.Queue[Any]:
    return queue.Queue()


# Megatron starts a manager process for the results of its writer threads, ten seconds for each rank, for the sake of
# asynchronous saves in another process; saves in this process need only a queue.
filesystem_async.get_write_results_queue = _local_queue


Parts = Mapping[str, tuple[GPTModel, Optimizer]]
"""What is trained, by name; ``policy`` is always there."""


class Pending:
    """A checkpoint that is being written by a thread, from copies of the tensors: training may go on meanwhile."""

    def __init__(
        self, request: Any, finish: Callable[[], None], world: World, after: Callable[[], object] | None
    ) -> None:
        """Copy what ``request``, Megatron's, is to write, and start writing."""
        self._request, self._finish, self._world, self._after = request, finish, world, after
        self._done: Future[None] | None = None
        self.write_s = 0.0
        """Seconds that the writing took, once it is finished."""
        if request.async_fn is None:
            return  # nothing to write on this rank
        arguments = list(request.async_fn_args)
        arguments[1] = request.preload_fn()
        if world.device.type == "cpu":  # there is nothing to bring to the host, so that they are the tensors themselves
            arguments[1] = [_copied(bucket) for bucket in arguments[1]]
        thread = ThreadPoolExecutor(1, "checkpoint")
        self._done = thread.submit(self._write, arguments)
        thread.shutdown(wait=False)

    def _write(self, arguments: list[Any]) -> None:
        if self._after is not None:
            self._after()
        started = time.perf_counter()
        self._request.async_fn(*arguments, **self._request.async_fn_kwargs)
        self.write_s = time.perf_counter() - started

    def finish(self) -> None:
        """Wait until it is written and put it in its place; every rank takes part."""
        if self._done is not None:
            self._done.result()
        self._world.barrier()
        for function in self._request.finalize_fns:
            function()
        self._finish()


def _copied(bucket: Any) -> Any:
    """A bucket of Megatron's writer (file, key, (bytes, tensors)) with tensors of its own."""
    file, key, (data, tensors) = bucket
    return file, key, (data, [(item, tensor.clone()) for item, tensor in tensors])


def save(
    folder: Path,
    step: int,
    parts: Parts,
    world: World,
    progress: dict[str, Any],
    *,
    keep: int,
    source: str | Path,
) -> None:
    """Write ``folder/step-NNNNNN`` and remove all but the newest ``keep``; every rank takes part.

    ``progress`` must be the same on every rank. The configuration and tokenizer of ``source``, the Hugging Face folder
    that the critic came from, are put beside, so that the checkpoint alone can be converted.
    """
    part, finish, state = _prepare(folder, step, parts, world, progress, keep)
    _write(part, state, world, source)
    finish()


def begin(
    folder: Path,
    step: int,
    parts: Parts,
    world: World,
    progress: dict[str, Any],
    *,
    keep: int,
    source: str | Path,
    after: Callable[[], object] | None = None,
) -> Pending:
    """As :func:`save`, but it is there only after ``finish`` of what this returns; one at a time.

    The writing starts when ``after`` has returned, in the writing thread.
    """
    part, finish, state = _prepare(folder, step, parts, world, progress, keep)
    _make_folder(part, world, source)
    options: dict[str, Any] = {"async_sharded_save": True, "async_strategy": "mcore"}
    request = dist_checkpointing.save(state, str(part), validate_access_integrity=False, **options)
    return Pending(request, finish, world, after)


def _prepare(
    folder: Path, step: int, parts: Parts, world: World, progress: dict[str, Any], keep: int
) -> tuple[Path, Callable[[], None], dict[str, Any]]:
    """Where a checkpoint is written, what puts it in its place, and what it holds."""
    target = folder / f"step-{step:06d}"
    part = folder / f".step-{step:06d}.part"
    state = _sharded_state(parts, world, is_loading=False)
    state["progress"] = {**progress, "step": step, "world_size": world.size}

    def finish() -> None:
        if world.main:
            shutil.rmtree(target, ignore_errors=True)
            os.replace(part, target)
            _remove_old(folder, keep)
        world.barrier()

    return part, finish, state


def save_weights(folder: Path, model: GPTModel, world: World, *, source: str | Path) -> None:
    """Write a checkpoint of the weights alone, in place."""
    _write(folder, {"policy": {"model": _sharded_weights(model, "policy")}}, world, source)


def load_weights(folder: Path, model: GPTModel) -> None:
    """Read the weights of a checkpoint, with or without the rest.

    Raises ValueError when it does not fit the model.
    """
    model.load_state_dict(_read(folder, {"policy": {"model": _sharded_weights(model, "policy")}})["policy"]["model"])


def dtype(folder: Path) -> str:
    """The precision of a checkpoint's weights, as torch names it. Raises ValueError when it cannot be read."""
    try:
        found = FileSystemReader(str(folder)).read_metadata().state_dict_metadata
        if any(".lora_" in name for name in found):
            raise ValueError(
                f"{folder}: holds adapters alone; RUN/STAGE/hf and RUN/STAGE/adapters are there at the end"
            )
        described = found[EMBEDDING]
        assert isinstance(described, TensorStorageMetadata)
    except (CheckpointException, KeyError, RuntimeError, OSError) as error:
        raise ValueError(f"{folder}: not a checkpoint of a critic: {_one_line(error)}") from None
    return str(described.properties.dtype).removeprefix("torch.")


def _write(part: Path, state: dict[str, Any], world: World, source: str | Path) -> None:
    _make_folder(part, world, source)
    dist_checkpointing.save(state, str(part), validate_access_integrity=False)
    world.barrier()


def _make_folder(part: Path, world: World, source: str | Path) -> None:
    if world.main:
        for left in (part, *part.parent.glob(".step-*")):  # by a run that was killed while it saved or removed
            shutil.rmtree(left, ignore_errors=True)
        (part / HUGGINGFACE).mkdir(parents=True)
        copy_side_files(Path(source), part / HUGGINGFACE)
    world.barrier()


def _read(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(state, str(folder))
    except (CheckpointException, CheckpointingException, KeyError, RuntimeError, OSError) as error:
        raise ValueError(f"{folder}: does not fit this critic and layout: {_one_line(error)}") from error


def load(folder: Path, parts: Parts, world: World) -> dict[str, Any] | None:
    """Restore the newest checkpoint of ``folder`` into models and optimizers; its progress, or None without one.

    Random state is restored where the number of ranks is the same. Raises ValueError when it does not fit the model.
    """
    newest = world.from_main(lambda: str(latest(folder) or ""))
    if not newest:
        return None
    progress = _progress(Path(newest))
    same_ranks = progress["world_size"] == world.size
    loaded = _read(Path(newest), _sharded_state(parts, world, is_loading=True, with_random=same_ranks))
    for name, (model, optimizer) in parts.items():
        model.load_state_dict(loaded[name]["model"], strict=not lora.is_adapted(model))
        optimizer.load_state_dict(loaded[name]["optimizer"])
    if same_ranks:
        _set_random_state(loaded["random"])
    return progress


def _progress(folder: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load_common_state_dict(str(folder))["progress"]
    except (CheckpointException, CheckpointingException, KeyError, RuntimeError, OSError) as error:
        raise ValueError(f"{folder}: is not a trainer's checkpoint, or a broken one: {_one_line(error)}") from error


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a folder."""
    found = _all(folder)
    return found[-1] if found else None


def _all(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    steps = {int(match[1]): path for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))}
    return [steps[step] for step in sorted(steps)]


def _remove_old(folder: Path, keep: int) -> None:
    for path in _all(folder)[:-keep]:
        gone = path.with_name(f".{path.name}.old")
        os.replace(path, gone)  # a checkpoint half removed must not look whole
        shutil.rmtree(gone)


def _sharded_state(parts: Parts, world: World, *, is_loading: bool, with_random: bool = True) -> dict[str, Any]:
    state: dict[str, Any] = {}
    for name, (model, optimizer) in parts.items():
        weights = _sharded_weights(model, name)
        state[name] = {
            "model": weights,
            "optimizer": optimizer.sharded_state_dict(weights, is_loading=is_loading),
        }
    if with_random:
        state["random"] = ShardedObject("random", _random_state(), (world.size,), (world.rank,))
    return state


def _sharded_weights(model: GPTModel, name: str) -> dict[str, Any]:
    """Under keys of the checkpoint that are the policy's bare names, and prefixed for other parts.

    Of a model with adapters what is trained, alone.
    """
    prefix = "" if name == "policy" else f"{name}."
    weights = {key.removeprefix(prefix): value for key, value in model.sharded_state_dict(prefix=prefix).items()}
    if not lora.is_adapted(model):
        return weights
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    return {key: value for key, value in weights.items() if key in trained}


def _random_state() -> dict[str, Any]:
    state = {"python": random.getstate(), "numpy": numpy.random.get_state(), "torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        state |= {"cuda": torch.cuda.get_rng_state(), "tracker": get_cuda_rng_tracker().get_states()}
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_initialized():
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        torch.cuda.set_rng_state(state["cuda"])
        get_cuda_rng_tracker().set_states(state["tracker"])


def _one_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException) and error.failures:  # torch wraps what happened on each rank
        error = next(iter(error.failures.values()))[0]
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."
