"""Hugging Face folders to Megatron distributed checkpoints and back, by as many processes as shards are wanted.

The checkpoint's format does not depend on the layout: any TP x PP reads what any other wrote. More processes only
make each hold less: its own shard plus one tensor. ``python -m ctrl_hpc.megatron.convert`` is one of them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO

from ctrl_hpc.config import Config, ParallelConfig, TrainerConfig
from ctrl_hpc.megatron.architecture import HUGGINGFACE

DIRECTIONS = ("hf-to-megatron", "megatron-to-hf")


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
            shutil.rmtree(part_of(target), ignore_errors=True)
        said = {rank: _text(logs[rank]) for rank in failed}
    for rank, text in said.items():
        if started[rank].returncode == WRONG_INPUT:
            raise ValueError(text.strip().splitlines()[-1])
    for text in said.values():
        raise RuntimeError(f"{direction} failed:\n{text}")


def _wait(started: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Wait until all have ended, or one has failed: the rest may then wait for it in vain. The ranks that failed."""
    while True:
        ended = [process.poll() for process in started]
        if any(ended):
            time.sleep(GRACE_S)
            return [rank for rank, process in enumerate(started) if process.poll()]
        if all(code == 0 for code in ended):
            return []
        time.sleep(POLL_S)


def _text(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode(errors="replace")


POLL_S = 0.05
GRACE_S = 1.0
"""The others get so long to say what they know when one has failed."""
WRONG_INPUT = 2
"""Exit code of a process whose last line on stderr is for the user."""


def part_of(target: Path) -> Path:
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
    else:
        described = source
    architectures.check_layout(architectures.read(described), ParallelConfig(tensor=tensor, pipeline=pipeline))


def _convert(direction: str, source: Path, target: Path, tensor: int, pipeline: int) -> None:
    from ctrl_hpc.megatron import architecture as architectures
    from ctrl_hpc.megatron import checkpoint, model, parallel_state, weights

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
            checkpoint.save_weights(part_of(target), built, world, source=source)
            if world.main:
                os.replace(part_of(target), target)
        else:
            checkpoint.load_weights(source, built)
            weights.export(built, architecture, world, target, source=described)


def _dtype(direction: str, source: Path) -> str:
    """The precision of the tensors themselves: converted weights keep their bits."""
    from ctrl_hpc.megatron import checkpoint, weights

    return weights.Folder(source).dtype() if direction == "hf-to-megatron" else checkpoint.dtype(source)


def main() -> None:
    """One process of a conversion."""
    parser = argparse.ArgumentParser()
    parser.add_argument("direction", choices=DIRECTIONS)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--pp", type=int, default=1)
    options = parser.parse_args()
    try:
        _convert(options.direction, options.source, options.target, options.tp, options.pp)
    except ValueError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(WRONG_INPUT)  # the other ranks are ended; the groups are not waited for


if __name__ == "__main__":
    main()
