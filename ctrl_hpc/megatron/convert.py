"""Hugging Face folders to Megatron distributed checkpoints and back, by as many processes as shards are wanted.

The checkpoint's format does not depend on the layout: any TP x PP reads what any other wrote. More processes only
make each hold less: its own shard plus one tensor. ``python -m ctrl_hpc.megatron.convert`` is one of them.
"""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Self

from ctrl_hpc.config import Config, ParallelConfig, TrainerConfig
from ctrl_hpc.megatron.architecture import HUGGINGFACE

_DIRECTIONS = ("hf-to-megatron", "megatron-to-hf")


def launch(direction: str, source: Path, target: Path, tensor: int, pipeline: int) -> None:
    """Convert by ``tensor`` x ``pipeline`` processes on this machine; ``target`` appears whole or not at all.

    Raises ValueError, in one line, for what the user can mend, RuntimeError for the rest.
    """
    _check(direction, source, target, tensor, pipeline)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = tensor * pipeline
    command = [sys.executable, "-m", __name__, direction, str(source), str(target)]
    command += ["--tp", str(tensor), "--pp", str(pipeline)]
    shared = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile()) for _ in range(ranks)]
        started = [
            subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=log)
            for rank, log in enumerate(logs)
        ]
        try:
            failed = _wait(started)
        finally:
            for process in started:
                process.kill()
                process.wait()
            shutil.rmtree(_part_of(target), ignore_errors=True)
        said = {rank: _text(logs[rank]) for rank in failed}
    for rank, text in said.items():
        if started[rank].returncode == _WRONG_INPUT:
            raise ValueError(text.strip().splitlines()[-1])
    for text in said.values():
        raise RuntimeError(f"{direction} failed:\n{text}")


def _wait(started: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Wait until all have ended, or one has failed: the rest may then wait for it in vain. The ranks that failed."""
    while True:
        ended = [process.poll() for process in started]
        if any(ended):
            time.sleep(_GRACE_S)
            return [rank for rank, process in enumerate(started) if process.poll()]
        if all(code == 0 for code in ended):
            return []
        time.sleep(POLL_S)


def _text(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")


POLL_S = 0.05
_GRACE_S = 1.0
"""The others get so long to say what they know when one has failed."""
_WRONG_INPUT = 2
"""Exit code of a process whose last line on stderr is for the user."""


def _part_of(target: Path) -> Path:
    """Where a conversion writes until it is whole."""
    return target.with_name(f".{target.name}.part")


def _check(direction: str, source: Path, target: Path, tensor: int, pipeline: int) -> None:
    from ctrl_hpc.megatron import architecture as architectures

    if target.exists():
        raise ValueError(f"{target}: exists; nothing was overwritten")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"{target}: its folder {target.absolute().parent} does not exist")
    for option, value in (("--tp", tensor), ("--pp", pipeline)):
        if value < 1:
            raise ValueError(f"{option}: {value} is not allowed; it must be >= 1")
    if direction == "megatron-to-hf":
        described = source / HUGGINGFACE
        if not (described / "config.json").is_file():
            raise ValueError(f"{source}: not a Megatron checkpoint of ctrl-hpc (it holds no {HUGGINGFACE}/config.json)")
        _check_metadata(source / ".metadata")
    else:
        described = source
    architectures.check_layout(architectures.read(described), ParallelConfig(tensor=tensor, pipeline=pipeline))


_CHECKPOINT = "torch.distributed.checkpoint"
_PLAIN = {
    "collections": "OrderedDict",
    "torch": "Size float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 int64 int32 int16 int8 uint8 bool",
    "torch.serialization": "_get_layout",
    f"{_CHECKPOINT}.filesystem": "_StorageInfo",
    f"{_CHECKPOINT}.metadata": "BytesStorageMetadata ChunkStorageMetadata Metadata MetadataIndex StorageMeta"
    " TensorProperties TensorStorageMetadata _MEM_FORMAT_ENCODING",
    f"{_CHECKPOINT}.planner": "BytesIOWriteData SavePlan TensorWriteData WriteItem WriteItemType",
}
"""What a checkpoint's metadata, which is a pickle, is made of: classes that hold data, by module."""


class _Inert:
    """Stands for any of them: takes what it is given and does nothing."""

    def __new__(cls, *_: object, **__: object) -> Self:
        return super().__new__(cls)

    def __setstate__(self, _: object) -> None:
        pass


class _Reader(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> type[_Inert]:
        if global_name not in _PLAIN.get(module_name, "").split():
            raise pickle.UnpicklingError(f"names {module_name}.{global_name}")
        return _Inert


def _check_metadata(file: Path) -> None:
    """ValueError where reading a checkpoint's metadata could run code of whoever wrote it; runs none itself."""
    if not file.is_file():
        return  # an incomplete checkpoint is found when it is read
    try:
        with open(file, "rb") as data:
            _Reader(data).load()
    except Exception as error:  # noqa: BLE001 (a hostile pickle fails in any way)
        raise ValueError(f"{file}: is no plain metadata of a checkpoint, and is not read: {error}") from None


def _convert(direction: str, source: Path, target: Path, tensor: int, pipeline: int) -> None:
    from ctrl_hpc.megatron import architecture as architectures
    from ctrl_hpc.megatron import checkpoint, export, model, parallel_state, weights

    described = source if direction == "hf-to-megatron" else source / HUGGINGFACE
    architecture = architectures.read(described)
    config = Config(
        name="convert",
        parallel=ParallelConfig(tensor=tensor, pipeline=pipeline),
        trainer=TrainerConfig(device="cpu", dtype=_dtype(direction, source)),  # type: ignore[arg-type]
    )
    with parallel_state.job(config) as world:
        built = model.build(architecture, config.parallel, world)
        if direction == "hf-to-megatron":
            weights.load(built, source, architecture, world)
            checkpoint.save_weights(_part_of(target), built, world, source=source)
            if world.main:
                os.replace(_part_of(target), target)
        else:
            checkpoint.load_weights(source, built)
            export.export(built, architecture, world, target, source=described)


def _dtype(direction: str, source: Path) -> str:
    """The precision of the tensors themselves: converted weights keep their bits."""
    from ctrl_hpc.megatron import checkpoint, weights

    return weights.Folder(source).dtype() if direction == "hf-to-megatron" else checkpoint.dtype(source)


def main() -> None:
    """One process of a conversion."""
    parser = argparse.ArgumentParser()
    parser.add_argument("direction", choices=_DIRECTIONS)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    options = parser.parse_args()
    try:
        _convert(options.direction, options.source, options.target, options.tp, options.pp)
    except ValueError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(_WRONG_INPUT)  # the other ranks are ended; the groups are not waited for


if __name__ == "__main__":
    main()
