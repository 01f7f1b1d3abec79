"""LoRA on Megatron's linear layers: low-rank adapters that are trained while the critic's own weights are frozen.

Hu et al. 2021 (arXiv 2106.09685): y = W x + (alpha / rank) B A x, A [rank, in], B [out, rank], B zero at first. They
are the adapters that PEFT has on q_proj, k_proj, ..., also where Megatron fuses several of these into one layer: A
holds one below the other, each row of B belongs to the row of W beside it. Shapes: P fused adapters, r rank, O and I
this rank's part of the layer's outputs and inputs, T positions, B sequences.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor
from torch.nn import functional

from ctrl_hpc.config import LoraConfig
from ctrl_hpc.megatron import weights
from ctrl_hpc.megatron.architecture import Architecture
from ctrl_hpc.megatron.export import begin, made_by_all, rename, write_file
from ctrl_hpc.megatron.parallel_state import Group, World
from ctrl_hpc.megatron.weights import Layout, Piece
from ctrl_hpc.rollout.weights import ADAPTER_CONFIG, ADAPTER_PREFIX, ADAPTER_WEIGHTS
from ctrl_hpc.seeds import sampling_seed

_LAYERS = {
    ("self_attention", "linear_qkv"): ("q_proj", "k_proj", "v_proj"),
    ("self_attention", "linear_proj"): ("o_proj",),
    ("mlp", "linear_fc1"): ("gate_proj", "up_proj"),
    ("mlp", "linear_fc2"): ("down_proj",),
}
"""Megatron's linear layers by their place in a layer, and the modules that they are in Hugging Face's naming."""


class Adapter(torch.nn.Module):
    """What is added to the output of one linear layer, whose outputs (or else inputs) lie divided over the ranks."""

    def __init__(self, linear: Any, rule: Layout, parts: list[str], config: LoraConfig, mask_OP: Tensor) -> None:
        """For ``linear``, whose weight has the layout ``rule``.

        ``parts`` are the names of Hugging Face's weights in it; ``mask_OP`` says to which of them a row belongs.
        """
        super().__init__()
        self.scale = config.alpha / config.rank
        self.enabled = True
        self._divides_outputs = rule.dim == 0
        self._gated = ".gate_proj." in (rule.pieces[0].name or "")
        self._sequence = bool(linear.config.sequence_parallel)
        weight = linear.weight
        n_outputs, n_inputs = weight.shape
        self.A = torch.nn.Parameter(weight.new_empty(len(parts) * config.rank, n_inputs))
        self.B = torch.nn.Parameter(weight.new_empty(n_outputs, config.rank))
        divided = self.B if self._divides_outputs else self.A
        set_tensor_model_parallel_attributes(divided, True, 0 if self._divides_outputs else 1, 1)
        sides = _layouts(rule, parts, config.rank, n_outputs)
        self.A.lora_layout, self.B.lora_layout = sides  # type: ignore[attr-defined]
        weight.adapter = self
        self._mask_OPr = None if bool(mask_OP.all()) else mask_OP.repeat_interleave(config.rank, 1).to(weight)
        linear.register_forward_hook(self._add)

    def _rows(self, B_Or: Tensor) -> Tensor:
        """B [O, P r], each row zero but for the columns of its own part."""
        if self._mask_OPr is None:
            return B_Or
        return B_Or.repeat(1, self._mask_OPr.shape[1] // B_Or.shape[1]) * self._mask_OPr

    def forward(self, x_TBI: Tensor) -> Tensor:
        """The layer's addition, as whole or as divided as the layer's output is."""
        if self._divides_outputs:
            A_PrI = copy_to_tensor_model_parallel_region(self.A) if self._sequence else self.A
            low_TBPr = functional.linear(x_TBI, A_PrI)
            if self._sequence:
                low_TBPr = gather_from_sequence_parallel_region(low_TBPr, tensor_parallel_output_grad=True)
            else:
                low_TBPr = copy_to_tensor_model_parallel_region(low_TBPr)
            return functional.linear(low_TBPr, self._rows(self.B)) * self.scale
        low_TBr = functional.linear(x_TBI, self.A)
        if self._sequence:
            low_TBr = reduce_scatter_to_sequence_parallel_region(low_TBr)
            return functional.linear(low_TBr, copy_to_tensor_model_parallel_region(self.B)) * self.scale
        return functional.linear(reduce_from_tensor_model_parallel_region(low_TBr), self.B) * self.scale

    def _add(self, _linear: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any] | None:
        """The linear layer's forward hook."""
        return (output[0] + self(inputs[0]), output[1]) if self.enabled else None

    def merged(self, weight_OI: Tensor) -> Tensor:
        """This rank's part of the layer's weight with the adapter in it."""
        added_OI = self.scale * self._rows(self.B).float() @ self.A.float()
        return (weight_OI.float() + added_OI).to(weight_OI.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: Any = None, **_unused: Any
    ) -> dict[str, Any]:
        """As Megatron's checkpoints take it: the same for every tensor-parallel size."""
        axes = {"B": 0} if self._divides_outputs else {"A": 1}
        state = {"A": self.A, "B": self.B}
        sharded = make_sharded_tensors_for_checkpoint(state, prefix, axes, sharded_offsets)
        if self._gated:  # each rank's gate rows, then its up rows
            key = f"{prefix}B"
            sharded[key] = apply_swiglu_sharded_factory(sharded[key], sharded_offsets)
        return sharded


def _layouts(rule: Layout, parts: list[str], rank: int, n_outputs: int) -> tuple[Layout, Layout]:
    """Layouts of A and B of a layer whose weight has the layout ``rule``."""
    A, B = ({part: f"{part.removesuffix('.weight')}.lora_{side}.weight" for part in parts} for side in "AB")
    if rule.dim == 0:
        return (
            Layout(None, tuple(Piece(A[part], 0, rank) for part in parts)),
            Layout(0, tuple(Piece(B.get(piece.name or ""), piece.start, piece.stop) for piece in rule.pieces)),
        )
    (part,) = parts
    return (
        Layout(1, tuple(Piece(A[part], piece.start, piece.stop) for piece in rule.pieces)),
        Layout(None, (Piece(B[part], 0, n_outputs),)),
    )


def _mask(rule: Layout, parts: list[str], world: World) -> Tensor:
    """Which part each row of this rank belongs to, [O, P]; a row of a module without adapter to none."""
    if rule.dim != 0:
        return torch.ones(1, 1, dtype=torch.bool)
    total = sum(piece.stop - piece.start for piece in rule.pieces)
    low = total // world.tensor_size * world.tensor_rank
    rows = [
        torch.tensor([piece.name == part for part in parts]).expand(piece.stop - piece.start, -1)
        for piece in weights.interval(rule.pieces, low, low + total // world.tensor_size)
    ]
    return torch.cat(rows)


def attach(model: Any, config: LoraConfig, architecture: Architecture, world: World, *, seed: int) -> None:
    """Freeze the model and put fresh adapters beside its linear layers; the same ones in every layout.

    They stand beside the layer, as ``decoder.layers.N.mlp.lora_fc2.A``.
    """
    model.requires_grad_(False)
    for number, layer in enumerate(model.decoder.layers):
        for (place, name), modules in _LAYERS.items():
            parent = getattr(layer, place)
            rule = weights.layout(
                f"decoder.layers.{number}.{place}.{name}.weight",
                architecture,
                world.tensor_size,
                weights.first_layer_of(architecture, world),
            )
            found = dict.fromkeys(piece.name for piece in rule.pieces if piece.name is not None)
            wanted = [module for module in modules if module in config.targets]
            parts = [part for module in wanted for part in found if part.endswith(f".{module}.weight")]
            if parts:
                adapter = Adapter(getattr(parent, name), rule, parts, config, _mask(rule, parts, world))
                parent.add_module(name.replace("linear", "lora"), adapter)
    if model.config.recompute_granularity == "full" and model.pre_process:
        # Megatron's checkpointed layers have a gradient only where their input has one, and the embedding is frozen.
        model.embedding.register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
    fresh = _Fresh(seed, config.rank, weights.shapes(architecture))
    weights.fill(model, fresh, architecture, world, adapters=True)


class _Fresh:
    """Adapters of step 0, as PEFT has them: A uniform in +-1/sqrt(in), B zero; each tensor by its own seed."""

    path = Path("fresh adapters")

    def __init__(self, seed: int, rank: int, shapes: dict[str, tuple[int, ...]]) -> None:
        self._seed, self._rank, self._shapes = seed, rank, shapes

    def read(self, piece: Piece, dim: int) -> Tensor:
        """The rows (``dim`` 0) or columns (``dim`` 1) of a piece."""
        assert piece.name is not None
        module, side, _ = piece.name.rsplit(".", 2)
        n_outputs, n_inputs = self._shapes[f"{module}.weight"]
        if side == "lora_B":
            return torch.zeros(n_outputs, self._rank).narrow(dim, piece.start, piece.stop - piece.start)
        generator = torch.Generator().manual_seed(sampling_seed(self._seed, 0, piece.name))
        bound = 1 / math.sqrt(n_inputs)
        uniform = torch.empty(self._rank, n_inputs).uniform_(-bound, bound, generator=generator)
        return uniform.narrow(dim, piece.start, piece.stop - piece.start)


def is_adapted(model: Any) -> bool:
    """Whether the model has adapters."""
    return any(isinstance(module, Adapter) for module in model.modules())


@contextmanager
def disabled(model: Any) -> Iterator[None]:
    """The model without its adapters, as it was before training."""
    adapters = [module for module in model.modules() if isinstance(module, Adapter)]
    for adapter in adapters:
        adapter.enabled = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.enabled = True


def export(
    model: Any, config: LoraConfig, architecture: Architecture, world: World, folder: Path, *, base: str | Path
) -> None:
    """Write the adapters in PEFT's format, to be used with ``base``; all ranks take part.

    The folder appears whole or not at all; one that is there is replaced.
    """
    mine = dict(weights.gather(model, architecture, world, spread=True, adapters=True))
    write(mine, world, folder, config=config, base=base)


def write(
    mine: dict[str, Tensor],
    world: World,
    folder: Path,
    *,
    config: LoraConfig,
    base: str | Path,
    group: Group | None = None,
) -> None:
    """:func:`export` of adapters that are gathered: this rank's part.

    ``group`` is as in :func:`ctrl_hpc.megatron.export.write`.
    """
    part = begin(folder, world, group)
    tensors = made_by_all(lambda: mine, world, group)
    if world.main:
        named = {f"{ADAPTER_PREFIX}{name}": tensor for name, tensor in sorted(tensors.items())}
        write_file(named, part / ADAPTER_WEIGHTS)
        described = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str(Path(base).absolute()),
            "r": config.rank,
            "lora_alpha": config.alpha,
            "lora_dropout": 0.0,
            "target_modules": sorted(config.targets),
            "bias": "none",
            "inference_mode": True,
        }
        (part / ADAPTER_CONFIG).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        rename(part, folder)
