"""A rank that trains LoRA adapters (see ``megatron_jobs.spawn``); leaves ``lora-MODEL-LAYOUT.pt`` and folders.

Two ranks come first and save a checkpoint; one rank then continues from it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron_jobs import sequences
from ranks import STEADY, arranged
from torch import Tensor

from ctrl_hpc.config import LoraConfig, ParallelConfig
from ctrl_hpc.megatron import checkpoint, export, weights
from ctrl_hpc.seeds import sampling_seed
from ctrl_hpc.train.batch import collate
from ctrl_hpc.train.losses import SFTLoss
from ctrl_hpc.train.policy import Policy, make_reference

LORA = LoraConfig(rank=4, alpha=8.0)
SOME = LoraConfig(rank=2, alpha=2.0, targets=("v_proj", "up_proj", "down_proj"))
MODELS = {"qwen2-tied": LORA, "llama-tied": LORA, "qwen3-untied": SOME}
"""Biases; one key-value head for all ranks; modules that share a fused layer with others that have no adapter."""
LAYOUTS: dict[int, dict[str, ParallelConfig]] = {
    1: {"single": ParallelConfig()},
    2: {
        "tp2": ParallelConfig(tensor=2),
        "tp2-sp": ParallelConfig(tensor=2, sequence=True, recompute="full"),
        "pp2": ParallelConfig(pipeline=2),
        "dp2": ParallelConfig(distributed_optimizer=True),
    },
}
STEPS = 3


class _Random:
    """Adapters that are zero nowhere, the same in every layout."""

    path = Path("random")

    def __init__(self, architecture: Any, rank: int) -> None:
        self._shapes, self._rank = weights.shapes(architecture), rank

    def read(self, piece: weights.Piece, dim: int) -> Tensor:
        assert piece.name is not None
        module, side, _ = piece.name.rsplit(".", 2)
        n_outputs, n_inputs = self._shapes[f"{module}.weight"]
        shape = (self._rank, n_inputs) if side == "lora_A" else (n_outputs, self._rank)
        whole = torch.randn(shape, generator=torch.Generator().manual_seed(sampling_seed(1, 0, piece.name))) * 0.1
        return whole.narrow(dim, piece.start, piece.stop - piece.start)


class _AdapterGradients:
    """Looks like a model whose adapters are the gradients that Megatron holds."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._model.named_parameters():
            if hasattr(parameter, "lora_layout"):
                parameter.main_grad.lora_layout = parameter.lora_layout
                yield name, parameter.main_grad


def _whole(model: Any, policy: Policy) -> dict[str, Tensor]:
    mine = weights.gather(model, policy.architecture, policy.world, adapters=True)
    return export.made_by_all(lambda: dict(mine), policy.world)


def check(folder: Path) -> None:
    """Gradients, steps, folders and checkpoints of every model in every layout of this number of ranks."""
    for layout, parallel in LAYOUTS[int(os.environ["WORLD_SIZE"])].items():
        for config, world in arranged(parallel):
            for name, options in MODELS.items():
                policy = Policy(replace(config, lora=options), world, folder / "models" / name, optimizer=STEADY)
                found = _found(policy, folder, f"{name}-{layout}")
                if layout == "single":
                    found["continued"] = _continued(policy, folder / "lora-checkpoints" / name)
                if layout == "tp2":
                    place = (folder / "lora-checkpoints" / name, STEPS, _parts(policy), world, {})
                    checkpoint.save(*place, keep=1, source=policy.folder)
                    found["continued"] = _step(policy)
                if world.main:
                    torch.save(found, folder / f"lora-{name}-{layout}.pt")


def _parts(policy: Policy) -> Any:
    return {"policy": (policy.model, policy.optimizer)}


def _step(policy: Policy) -> dict[str, float]:
    batch = collate(sequences(policy.architecture.vocab_size))
    return policy.update(batch, SFTLoss(n_tokens=batch.n_tokens), STEADY.lr)


def _continued(policy: Policy, checkpoints: Path) -> dict[str, float]:
    checkpoint.load(checkpoints, _parts(policy), policy.world)
    return _step(policy)


def _found(policy: Policy, folder: Path, name: str) -> dict[str, Any]:
    batch = collate(sequences(policy.architecture.vocab_size))
    fresh = _whole(policy.model, policy)
    random = _Random(policy.architecture, policy.config.lora.rank)
    weights.fill(policy.model, random, policy.architecture, policy.world, adapters=True)
    if policy.optimizer is not None:
        policy.optimizer.inner.reload_model_params()
    logged = policy.gradients(batch, SFTLoss(n_tokens=batch.n_tokens))
    gradients = _whole(_AdapterGradients(policy.model), policy)
    reference = make_reference(policy, policy.folder, "copy").logprobs(batch)
    frozen = Policy(replace(policy.config, lora=LoraConfig()), policy.world, policy.folder).logprobs(batch)
    policy.export_adapters(folder / "adapters" / name)
    policy.export(folder / "merged" / name, source=policy.folder)
    assert policy.optimizer is not None
    return {
        "fresh": fresh,
        "loss": logged["loss"],
        "gradients": gradients,
        "reference_error": float((reference - frozen).abs().max()),
        "logprobs": policy.logprobs(batch),
        "steps": [_step(policy) for _ in range(STEPS)],
        "trained": sum(parameter.numel() for parameter in policy.model.parameters() if parameter.requires_grad),
        "adapters": sum(
            parameter.numel() for parameter in policy.model.parameters() if hasattr(parameter, "lora_layout")
        ),
        "optimized": sum(parameter.numel() for parameter in policy.optimizer.inner.get_parameters()),
        "after": _whole(policy.model, policy),
    }
