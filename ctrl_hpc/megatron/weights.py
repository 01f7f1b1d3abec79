"""Weights between a Hugging Face folder and Megatron's shards, tensor by tensor, by one table of layouts.

A Megatron parameter, its tensor-parallel shards put together along ``dim``, is a concatenation of row (or column)
ranges of Hugging Face tensors; loading cuts this rank's interval out of that concatenation, reading no other bytes,
and exporting cuts the concatenation back into the tensors it came from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ctrl_hpc.megatron.architecture import Architecture
from ctrl_hpc.megatron.parallel_state import World
from ctrl_hpc.rollout.weights import INDEX, SINGLE, gguf_hint

OPEN_FILES = 2
"""Files kept mapped at a time: a parameter's pieces may lie in two."""
BUCKET_BYTES = 64 << 20
"""Parameters are gathered over the tensor-parallel group in messages of about this size."""
DTYPES = {"F32": "float32", "BF16": "bfloat16"}
"""Precisions of tensors: safetensors' names and torch's."""
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_MADE_ANEW = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Ends of the names of buffers that older folders hold, and that are computed from the configuration."""
_ROWS = 4096
"""Rows of tensors that are compared at a time."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows (or columns) ``start`` to ``stop`` of a Hugging Face tensor; ``name`` None is zero padding."""

    name: str | None
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Layout:
    """How a Megatron parameter is made: pieces along ``dim``; None is a tensor that every rank holds whole."""

    dim: int | None
    pieces: tuple[Piece, ...]


def layout(name: str, architecture: Architecture, tensor: int, first_layer: int) -> Layout:
    """The layout of Megatron parameter ``name``; ``first_layer`` is the number of this stage's first layer.

    Both of Megatron's namings are known: the local specification's and Transformer Engine's fused norms.
    """
    whole = {"decoder.final_layernorm.weight": "model.norm.weight"}
    if name in whole:
        return Layout(None, (Piece(whole[name], 0, architecture.hidden_size),))
    vocabulary = {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "output_layer.weight": "model.embed_tokens.weight" if architecture.tied else "lm_head.weight",
    }
    if name in vocabulary:
        rows, padded = architecture.vocab_size, architecture.padded_vocab(tensor)
        return Layout(0, (Piece(vocabulary[name], 0, rows), Piece(None, 0, padded - rows)))
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    assert match is not None, f"no layout for parameter {name}"
    return _layer_layout(match[2], f"model.layers.{first_layer + int(match[1])}.", architecture, tensor)


def _layer_layout(name: str, prefix: str, architecture: Architecture, tensor: int) -> Layout:
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    whole = {
        "input_layernorm.weight": prefix + "input_layernorm.weight",
        "self_attention.linear_qkv.layer_norm_weight": prefix + "input_layernorm.weight",
        "pre_mlp_layernorm.weight": prefix + "post_attention_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": prefix + "post_attention_layernorm.weight",
        "self_attention.q_layernorm.weight": attention + "q_norm.weight",
        "self_attention.k_layernorm.weight": attention + "k_norm.weight",
    }
    if name in whole:
        size = architecture.head_dim if "self_attn" in whole[name] else architecture.hidden_size
        return Layout(None, (Piece(whole[name], 0, size),))
    if name in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"):
        return Layout(0, tuple(_qkv_pieces(attention, name.rsplit(".", 1)[1], architecture)))
    if name == "mlp.linear_fc1.weight":  # each rank holds its rows of the gate, then its rows of the up projection
        rows = architecture.mlp_size // tensor
        halves = (mlp + "gate_proj.weight", mlp + "up_proj.weight")
        return Layout(0, tuple(Piece(half, r * rows, (r + 1) * rows) for r in range(tensor) for half in halves))
    columns = {
        "self_attention.linear_proj.weight": (
            attention + "o_proj.weight",
            architecture.n_heads * architecture.head_dim,
        ),
        "mlp.linear_fc2.weight": (mlp + "down_proj.weight", architecture.mlp_size),
    }
    assert name in columns, f"no layout for parameter {prefix}{name}"
    source, size = columns[name]
    return Layout(1, (Piece(source, 0, size),))


def _qkv_pieces(prefix: str, kind: str, architecture: Architecture) -> Iterator[Piece]:
    """Megatron interleaves: the query heads of a group, then its key head, then its value head, group after group."""
    queries = architecture.n_heads // architecture.n_kv_heads * architecture.head_dim
    for group in range(architecture.n_kv_heads):
        yield Piece(f"{prefix}q_proj.{kind}", group * queries, (group + 1) * queries)
        for part in ("k_proj", "v_proj"):
            yield Piece(f"{prefix}{part}.{kind}", group * architecture.head_dim, (group + 1) * architecture.head_dim)


class Folder:
    """The tensors of a Hugging Face folder, read in slices; no tensor is held longer than it is looked at.

    Raises ValueError when a weight file or a tensor is missing, or a file is broken.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self._open: dict[str, Any] = {}
        if (self.path / INDEX).is_file():
            self._files: dict[str, str] = json.loads((self.path / INDEX).read_text(encoding="utf-8"))["weight_map"]
        elif (self.path / SINGLE).is_file():
            self._files = dict.fromkeys(self._handle(SINGLE).keys(), SINGLE)
        else:
            raise ValueError(f"{folder}: no {SINGLE} and no {INDEX}; safetensors weights are needed{gguf_hint(folder)}")

    def check(self, architecture: Architecture) -> None:
        """Raises ValueError, naming the tensor, unless the folder holds the architecture's tensors and no others.

        Buffers that transformers makes itself are let through, and a tied output layer that repeats the embedding.
        """
        expected = shapes(architecture)
        for name in sorted(self._files):
            found = tuple(self._slice(name).get_shape())
            if name in expected:
                if found != expected[name]:
                    raise ValueError(
                        f"{self.path}: tensor {name} is {list(found)}, config.json makes it {list(expected[name])}"
                    )
            elif name == OUTPUT and architecture.tied:
                if not self._alike(name, EMBEDDING):
                    raise ValueError(
                        f"{self.path}: tensor {name} differs from {EMBEDDING}, but config.json has tie_word_embeddings"
                    )
            elif not name.endswith(_MADE_ANEW):
                raise ValueError(f"{self.path}: tensor {name} is not part of a {architecture.kind} of its config.json")
        missing = sorted(expected.keys() - self._files.keys())
        if missing:
            raise ValueError(f"{self.path}: tensor {missing[0]} is missing")

    def dtype(self) -> str:
        """The precision that all tensors have, as torch names it; raises ValueError for several, or one not supported.

        What config.json says does not count: a conversion keeps the tensors' bits.
        """
        known: dict[str, str] = {}
        for name in sorted(self._files):
            if not name.endswith(_MADE_ANEW):
                known.setdefault(self._slice(name).get_dtype(), name)
        names = {found: DTYPES.get(found) for found in known}
        for found, named in names.items():
            if named is None:
                allowed = ", ".join(DTYPES)
                raise ValueError(
                    f"{self.path}: tensor {known[found]} is {found}, which is not supported; allowed: {allowed}"
                )
        if len(known) != 1:
            told = ", ".join(f"{name} is {found}" for found, name in sorted(known.items()))
            raise ValueError(f"{self.path}: tensors of several types: {told}; save it in one")
        return str(next(iter(names.values())))

    def _alike(self, name: str, other: str) -> bool:
        if other not in self._files or self._slice(name).get_shape() != self._slice(other).get_shape():
            return False
        rows = self._slice(name).get_shape()[0]
        return all(
            torch.equal(self._slice(name)[at : at + _ROWS], self._slice(other)[at : at + _ROWS])
            for at in range(0, rows, _ROWS)
        )

    def _slice(self, name: str) -> Any:
        handle = self._handle(self._files[name])
        if name not in handle.keys():  # noqa: SIM118 (a handle is no mapping)
            raise ValueError(f"{self.path}: tensor {name} is not in {self._files[name]}, where {INDEX} has it")
        return handle.get_slice(name)

    def read(self, piece: Piece, dim: int) -> Tensor:
        """The rows (``dim`` 0) or columns (``dim`` 1) of a piece."""
        assert piece.name is not None
        if piece.name not in self._files:
            raise ValueError(f"{self.path}: tensor {piece.name} is missing")
        tensor = self._slice(piece.name)
        size = tensor.get_shape()[dim]
        if piece.stop > size:
            raise ValueError(f"{self.path}: tensor {piece.name} has size {size} in dimension {dim}, not {piece.stop}")
        return tensor[piece.start : piece.stop] if dim == 0 else tensor[:, piece.start : piece.stop]

    def _handle(self, name: str) -> Any:
        if name not in self._open:
            while len(self._open) >= OPEN_FILES:
                del self._open[next(iter(self._open))]
            try:
                self._open[name] = safe_open(str(self.path / name), framework="pt")
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{self.path / name}: cannot be read: {error}") from None
        return self._open[name]


def shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """The tensors of a Hugging Face folder of this architecture."""
    width, rows = architecture.hidden_size, architecture.vocab_size
    queries, keys = (heads * architecture.head_dim for heads in (architecture.n_heads, architecture.n_kv_heads))
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (queries, width),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.v_proj.weight": (keys, width),
        "self_attn.o_proj.weight": (width, queries),
        "mlp.gate_proj.weight": (architecture.mlp_size, width),
        "mlp.up_proj.weight": (architecture.mlp_size, width),
        "mlp.down_proj.weight": (width, architecture.mlp_size),
    }
    if architecture.qkv_bias:
        sizes = {"q": queries, "k": keys, "v": keys}
        layer |= {f"self_attn.{part}_proj.bias": (size,) for part, size in sizes.items()}
    if architecture.qk_norm:
        layer |= {f"self_attn.{part}_norm.weight": (architecture.head_dim,) for part in "qk"}
    out: dict[str, tuple[int, ...]] = {EMBEDDING: (rows, width), "model.norm.weight": (width,)}
    out |= {} if architecture.tied else {OUTPUT: (rows, width)}
    for number in range(architecture.n_layers):
        out |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return out


@torch.no_grad()
def load(model: torch.nn.Module, folder: str | Path, architecture: Architecture, world: World) -> None:
    """Set this rank's parameters from a Hugging Face folder; reads only the rank's own bytes, a tensor at a time."""
    source = Folder(folder)
    source.check(architecture)
    fill(model, source, architecture, world)


class Source(Protocol):
    """Tensors by Hugging Face's names."""

    @property
    def path(self) -> Path:
        """Where they come from, for messages."""
        ...

    def read(self, piece: Piece, dim: int) -> Tensor:
        """The rows (``dim`` 0) or columns (``dim`` 1) of a piece."""
        ...


@torch.no_grad()
def fill(
    model: torch.nn.Module, source: Source, architecture: Architecture, world: World, *, adapters: bool = False
) -> None:
    """Set this rank's parameters, its adapters' or else all others, a tensor at a time."""
    for name, parameter, rule in _described(model, architecture, world, adapters=adapters):
        dim = rule.dim or 0
        shards = 1 if rule.dim is None else world.tensor_size
        total = sum(piece.stop - piece.start for piece in rule.pieces)
        low = total // shards * (world.tensor_rank if shards > 1 else 0)
        parts = [
            source.read(piece, dim).to(parameter)
            if piece.name is not None
            else parameter.new_zeros(piece.stop - piece.start, *parameter.shape[1:])
            for piece in interval(rule.pieces, low, low + total // shards)
        ]
        value = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
        if value.shape != parameter.shape:
            raise ValueError(
                f"{source.path}: {name} is {list(value.shape)} there, {list(parameter.shape)} in the critic"
            )
        parameter.copy_(value)


def _described(
    model: torch.nn.Module, architecture: Architecture, world: World, *, adapters: bool
) -> Iterator[tuple[str, Tensor, Layout]]:
    """Parameters with their layout: an adapter's says it itself (see :mod:`ctrl_hpc.megatron.lora`)."""
    first_layer = first_layer_of(architecture, world)
    for name, parameter in model.named_parameters():
        own: Layout | None = getattr(parameter, "lora_layout", None)
        if adapters == (own is not None):
            yield name, parameter, own or layout(name, architecture, world.tensor_size, first_layer)


def interval(pieces: tuple[Piece, ...], low: int, high: int) -> Iterator[Piece]:
    """The parts of a concatenation of pieces that lie in [low, high)."""
    at = 0
    for piece in pieces:
        size = piece.stop - piece.start
        first, last = max(low, at), min(high, at + size)
        if first < last:
            yield Piece(piece.name, piece.start + first - at, piece.start + last - at)
        at += size


def first_layer_of(architecture: Architecture, world: World) -> int:
    """The number of the first layer of this rank's pipeline stage."""
    return architecture.n_layers // world.pipeline_size * world.pipeline_rank


def buckets(
    model: torch.nn.Module, architecture: Architecture, world: World, *, adapters: bool = False
) -> list[list[tuple[Tensor, Layout]]]:
    """This rank's parameters, its adapters' or else all others, in messages of about :data:`BUCKET_BYTES`.

    A tied output layer is not repeated.
    """
    out: list[list[tuple[Tensor, Layout]]] = []
    size = BUCKET_BYTES
    for name, parameter, rule in _described(model, architecture, world, adapters=adapters):
        if name == "output_layer.weight" and architecture.tied:
            continue
        if size >= BUCKET_BYTES:
            out.append([])
            size = 0
        out[-1].append((parameter, rule))
        size += parameter.numel() * parameter.element_size()
    return out


class Copies:
    """Host memory that gathered tensors lie in, used again the next time: fresh memory costs more than the copying."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, int], Tensor] = {}

    def room(self, bucket: int, shard: int, numel: int, dtype: torch.dtype, *, pinned: bool = False) -> Tensor:
        """For a shard of a bucket; ``pinned``: page-locked, for what comes from a GPU."""
        if (bucket, shard) not in self._held:
            self._held[bucket, shard] = torch.empty(numel, dtype=dtype, pin_memory=pinned)
        return self._held[bucket, shard]


@torch.no_grad()
def gather(
    model: torch.nn.Module,
    architecture: Architecture,
    world: World,
    *,
    spread: bool = False,
    adapters: bool = False,
    copies: Copies | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors of this pipeline stage, on the CPU, on the stage's first tensor-parallel rank.

    They are the critic's with what its adapters have learnt merged in, or else the ``adapters`` themselves. Every rank
    of the tensor-parallel group must run through it; the others yield nothing. With ``spread`` each rank of the stage,
    all data-parallel replicas' too, gets a part of the tensors of about the same size, and every one a rank. With
    ``copies`` the tensors lie there, until it is given again.
    """
    for number, bucket in enumerate(buckets(model, architecture, world, adapters=adapters)):
        replica, rank = divmod(number, world.tensor_size) if spread else (world.data_rank, 0)
        if replica % world.data_size == world.data_rank:
            yield from _gather_bucket(bucket, world, rank, number, copies)


def _gather_bucket(
    bucket: list[tuple[Tensor, Layout]], world: World, rank: int, number: int, copies: Copies | None
) -> Iterator[tuple[str, Tensor]]:
    """Its tensors, put together on one rank of the tensor-parallel group."""
    on_gpu, numel = bucket[0][0].is_cuda, sum(parameter.numel() for parameter, _ in bucket)
    here = None if on_gpu else copies
    # Norms may be float32 in a bfloat16 model, and would make all that lies beside them so.
    parts = [_merged(parameter).flatten().to(world.dtype) for parameter, _ in bucket]
    room = here.room(number, 0, numel, world.dtype) if here is not None and world.tensor_size == 1 else None
    flat = torch.cat(parts) if room is None else torch.cat(parts, out=room)
    shards = [flat]
    if world.tensor_size > 1:
        shards = [
            torch.empty_like(flat) if here is None else here.room(number, place, numel, flat.dtype)
            for place in range(world.tensor_size if world.tensor_rank == rank else 0)
        ]
        dist.gather(flat, shards or None, group=world.tensor_group, group_dst=rank)
    if world.tensor_rank != rank:
        return
    if copies is not None and on_gpu:
        rooms = (copies.room(number, place, numel, flat.dtype, pinned=True) for place in range(len(shards)))
        shards = [room.copy_(shard) for room, shard in zip(rooms, shards, strict=True)]
    at = 0
    for parameter, rule in bucket:
        local = [shard[at : at + parameter.numel()].view(parameter.shape).cpu() for shard in shards]
        at += parameter.numel()
        full = local[0] if rule.dim is None or len(local) == 1 else torch.cat(local, rule.dim)
        yield from _split(full, rule)


def _merged(parameter: Tensor) -> Tensor:
    """A weight with its adapter in it, where it has one."""
    adapter = getattr(parameter, "adapter", None)
    return parameter if adapter is None else adapter.merged(parameter)


def _split(full: Tensor, rule: Layout) -> Iterator[tuple[str, Tensor]]:
    dim = rule.dim or 0
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    at = 0
    for piece in rule.pieces:
        size = piece.stop - piece.start
        if piece.name is not None:
            parts.setdefault(piece.name, []).append((piece.start, full.narrow(dim, at, size)))
        at += size
    for name, ranges in parts.items():
        ordered = [tensor for _, tensor in sorted(ranges, key=lambda item: item[0])]
        yield name, (ordered[0] if len(ordered) == 1 else torch.cat(ordered, dim)).contiguous()
