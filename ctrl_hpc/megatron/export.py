"""Writing a critic, its published versions and their differences as Hugging Face folders, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from ctrl_hpc.megatron.architecture import Architecture
from ctrl_hpc.megatron.parallel_state import Group, World
from ctrl_hpc.megatron.weights import gather
from ctrl_hpc.rollout import deltas
from ctrl_hpc.rollout.deltas import About
from ctrl_hpc.rollout.weights import INDEX, SINGLE

FILE_BYTES = 1 << 30
"""Size at which an export starts another safetensors file."""
_SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
)
"""What an export takes over from the folder that the critic came from, as patterns."""


def export(
    model: torch.nn.Module,
    architecture: Architecture,
    world: World,
    folder: str | Path,
    *,
    source: str | Path,
    link: bool = False,
) -> None:
    """Write the critic as a Hugging Face folder, with ``source``'s configuration and tokenizer; all ranks take part.

    Every rank writes a part of the tensors, all at once (of a small critic the first does). The folder appears whole,
    by a rename, or not at all; one that is there is replaced. ``link`` makes the side files hard links to those of
    ``source`` where the file system can.
    """
    write(gather(model, architecture, world, spread=True), world, folder, source=source, link=link)


def write(
    mine: Iterable[tuple[str, Tensor]],
    world: World,
    folder: str | Path,
    *,
    source: str | Path,
    link: bool = False,
    about: About | None = None,
    group: Group | None = None,
) -> None:
    """:func:`export` of tensors that are gathered: this rank's part.

    ``about`` is what the folder says of itself; ``group``: all ranks, where their main group is busy elsewhere.
    """
    target = Path(folder)
    part = begin(target, world, group)
    files = made_by_all(lambda: _write_part(mine, world, part), world, group)
    if world.main:
        if about is not None:
            about.write(part)
        _finish(part, target, files, Path(source), link)


def write_difference(
    mine: Iterable[tuple[str, Tensor]],
    world: World,
    folder: str | Path,
    *,
    about: About,
    previous: dict[str, Tensor],
    group: Group | None = None,
) -> None:
    """Write what has changed since ``previous``, both this rank's part; it becomes today's.

    ``about`` names the base. All ranks take part; the folder appears whole or not at all.
    """
    target = Path(folder)
    part = begin(target, world, group)
    file = part / f"delta-{_place(world)}.safetensors"
    tensors = made_by_all(lambda: deltas.write_part(mine, previous, file), world, group)
    if world.main:
        replace(about, tensors=tensors).write(part)
        rename(part, target)


def begin(target: Path, world: World, group: Group | None = None) -> Path:
    """The folder beside the target that is written to, which every rank sees."""
    part = target.with_name(f".{target.name}.part")
    if world.main:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    if world.size > 1 and group is None:
        world.barrier()
    elif world.size > 1:
        dist.barrier(group)
    return part


def _place(world: World) -> str:
    return f"{world.pipeline_rank:03d}-{world.data_rank:03d}-{world.tensor_rank:03d}"


def made_by_all[V](make: Callable[[], dict[str, V]], world: World, group: Group | None = None) -> dict[str, V]:
    """What the ranks make, together. What one raises, all raise, the others as RuntimeError: none waits for it."""
    if world.size == 1:
        return make()
    failure: Exception | None = None
    mine: dict[str, V] = {}
    try:
        mine = make()
    except Exception as error:  # noqa: BLE001 (any failure is told to all ranks)
        failure = error
    ranks: list[Any] = [None] * world.size
    told = None if failure is None else f"rank {world.rank}: {type(failure).__name__}: {failure}"
    dist.all_gather_object(ranks, (mine, told), group=group)
    if failure is not None:
        raise failure
    for _, told in ranks:
        if told is not None:
            raise RuntimeError(told)
    return {name: value for found, _ in ranks for name, value in found.items()}


def _write_part(mine: Iterable[tuple[str, Tensor]], world: World, part: Path) -> dict[str, str]:
    files: dict[str, str] = {}
    pending: dict[str, Tensor] = {}
    size = 0

    def flush() -> None:
        file = f"model-{_place(world)}-{len(set(files.values())):05d}.safetensors"
        write_file(pending, part / file)
        files.update(dict.fromkeys(pending, file))
        pending.clear()

    for name, tensor in mine:
        pending[name] = tensor
        size += tensor.numel() * tensor.element_size()
        if size >= FILE_BYTES:
            flush()
            size = 0
    if pending:
        flush()
    return files


def write_file(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file."""
    save_file(tensors, file, metadata={"format": "pt"})
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)  # safetensors writes files that only their owner can read


def _finish(part: Path, target: Path, files: Mapping[str, str], source: Path, link: bool) -> None:
    names = set(files.values())
    if len(names) == 1:
        os.replace(part / next(iter(names)), part / SINGLE)
    else:
        total = sum((part / name).stat().st_size for name in names)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
        (part / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    copy_side_files(source, part, link=link)
    rename(part, target)


def rename(part: Path, target: Path) -> None:
    """Put a written folder in its place; what is there is replaced."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(part, target)
    shutil.rmtree(old, ignore_errors=True)


def copy_side_files(source: Path, target: Path, *, link: bool = False) -> None:
    """Give ``target`` the configuration and tokenizer of ``source``; by hard links where asked for and possible."""
    for pattern in _SIDE_FILES:
        for file in source.glob(pattern):
            if link:
                try:
                    os.link(file, target / file.name)
                    continue
                except OSError:  # another file system, or one without hard links
                    pass
            shutil.copyfile(file, target / file.name)
