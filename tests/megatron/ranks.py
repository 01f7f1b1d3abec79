"""One rank of a test's training job (see ``megatron_jobs.spawn``), with torch.distributed's environment set.

Megatron takes seconds to import and changes torch, so tests run it in such processes, many checks in one, and assert
on what they leave in FOLDER.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron_jobs import LAYOUTS, sequences
from torch import Tensor

from ctrl_hpc.config import Config, OptimizerConfig, ParallelConfig, RLConfig, TrainerConfig, WandbConfig
from ctrl_hpc.megatron import parallel_state
from ctrl_hpc.megatron.parallel_state import World

CONFIG = Config(
    name="test",
    trainer=TrainerConfig(device="cpu", micro_batch_tokens=64, timeout_s=120.0),
    wandb=WandbConfig(mode="disabled"),
)
STEPS = 20
STEADY = OptimizerConfig(lr=3e-3, schedule="constant")


def arranged(parallel: ParallelConfig, **trainer: Any) -> Iterator[tuple[Config, World]]:
    """The configuration and this rank's world for a layout; taken down afterwards. Use as a for loop of one turn."""
    config = replace(CONFIG, parallel=parallel, trainer=replace(CONFIG.trainer, **trainer))
    world = parallel_state.initialize(config)
    yield config, world
    parallel_state.dismantle()


def parity(folder: Path) -> None:
    """Logits, loss and gradients of every model in every layout of this number of ranks."""
    from ctrl_hpc.train.batch import collate
    from ctrl_hpc.train.losses import SFTLoss
    from ctrl_hpc.train.policy import Policy

    for name, parallel in LAYOUTS[int(os.environ["WORLD_SIZE"])].items():
        for config, world in arranged(parallel):
            for path in sorted((folder / "models").iterdir()):
                policy = Policy(config, world, path, optimizer=STEADY)
                batch = collate(sequences(policy.architecture.vocab_size))
                logits = _logits(policy, batch)
                loss = policy.gradients(batch, SFTLoss(n_tokens=batch.n_tokens))["loss"]
                gradients = gradients_of(policy)
                policy.export(folder / "exports" / f"{path.name}-{name}", source=path)
                if world.main:
                    found = {"logits": logits, "loss": loss, "gradients": gradients}
                    torch.save(found, folder / f"parity-{path.name}-{name}.pt")


def _logits(policy: Any, batch: Any) -> Tensor:
    """Logits [S, R, V] for each response token, the same on every rank."""
    world = policy.world

    def loss(head: Any, micro: Any, hidden_ND: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        local_NV = hidden_ND @ head.weight.T
        shards = [torch.empty_like(local_NV) for _ in range(world.tensor_size)]
        dist.all_gather(shards, local_NV.contiguous(), group=world.tensor_group)
        return local_NV.sum(), {"logits": torch.cat(shards, 1)[:, : head.vocab_size]}

    parts = policy._micro_batches(batch)
    with torch.no_grad():
        found = policy._run(parts, loss, forward_only=True)
    logits_SRV = torch.zeros(*batch.mask_SR.shape, policy.architecture.vocab_size)
    if world.last_stage and world.tensor_rank == 0:
        for micro, item in zip(parts, found, strict=True):
            if len(micro.rows_B):
                logits_SRV[micro.rows_B[micro.rows_N], micro.slots_N] = item["logits"]
    dist.all_reduce(logits_SRV)
    return logits_SRV


class _MainGradients:
    """Looks like a model whose parameters are the gradients that Megatron holds."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._model.named_parameters():
            yield name, parameter.main_grad


def gradients_of(policy: Any) -> dict[str, Tensor]:
    """Gradients by Hugging Face name, whole, on every rank."""
    from ctrl_hpc.megatron.weights import gather

    mine = dict(gather(_MainGradients(policy.model), policy.architecture, policy.world))  # type: ignore[arg-type]
    everyone: list[Any] = [None] * policy.world.size
    dist.all_gather_object(everyone, mine)
    return {name: value for found in everyone for name, value in found.items()}


def curve(folder: Path) -> None:
    """Losses of 20 SFT steps; with four ranks also those of runs moved from TP 2 to TP 1 to TP 4 on the way."""
    world_size = int(os.environ["WORLD_SIZE"])
    sharded = ParallelConfig(tensor=2, distributed_optimizer=True)
    layouts = {1: {"single": ParallelConfig()}, 4: {"tp2-dp2": ParallelConfig(tensor=2), "tp2-dp2-sharded": sharded}}
    found: dict[str, Any] = {}
    for name, parallel in layouts[world_size].items():
        for config, world in arranged(parallel):
            found[name] = _train(config, world, folder / name, 0, STEPS)
    for name, distributed in {"moved": False, "moved-sharded": True}.items() if world_size == 4 else ():
        found[name] = []
        for tensor, (start, stop) in {2: (0, 5), 1: (5, 10), 4: (10, STEPS)}.items():
            for config, world in arranged(ParallelConfig(tensor=tensor, distributed_optimizer=distributed)):
                found[name] += _train(config, world, folder / name, start, stop)
    if int(os.environ["RANK"]) == 0:
        (folder / f"curve-{world_size}.json").write_text(json.dumps(found))


def _train(config: Config, world: World, folder: Path, start: int, stop: int) -> list[float]:
    """SFT steps from a checkpoint at ``start`` (from the model folder at 0), saved at ``stop`` in ``folder``."""
    from ctrl_hpc.megatron import checkpoint
    from ctrl_hpc.train.batch import collate
    from ctrl_hpc.train.losses import SFTLoss
    from ctrl_hpc.train.policy import Policy

    policy = Policy(config, world, folder.parent / "models" / "qwen3-tied", optimizer=STEADY)
    checkpoints = folder / "checkpoints"
    if start:
        progress = checkpoint.load(checkpoints, _parts(policy), world)
        assert progress is not None and progress["step"] == start and progress["note"] == "kept"
    pairs = sequences(policy.architecture.vocab_size, 6 * STEPS, prompt=None)
    losses = []
    for step in range(start, stop):
        batch = collate(pairs[6 * (step % 4) : 6 * (step % 4) + 6])
        losses.append(policy.update(batch, SFTLoss(n_tokens=batch.n_tokens), STEADY.lr)["loss"])
    if stop < STEPS:
        save = checkpoint.begin if config.parallel.distributed_optimizer else checkpoint.save
        place = (checkpoints, stop, _parts(policy), world, {"note": "kept"})
        pending = save(*place, keep=2, source=policy.folder)
        if pending is not None:  # what is trained meanwhile must not come into the checkpoint
            policy.update(batch, SFTLoss(n_tokens=batch.n_tokens), STEADY.lr)
            pending.finish()
    return losses


def behaviour(folder: Path) -> None:
    """What one policy does: resumes, swaps, refuses, learns; facts as JSON."""
    facts: dict[str, Any] = {}
    for config, world in arranged(ParallelConfig()):
        for part in (
            _resumes,
            _saves_in_background,
            _micro_batching,
            _swap,
            _not_finite,
            _learns_by_rl,
            _learns_values,
            _refuses,
        ):
            facts |= part(config, world, folder)
    for config, world in arranged(ParallelConfig(), dtype="bfloat16"):
        facts |= _resumes_in_bfloat16(config, world, folder)
    (folder / "behaviour.json").write_text(json.dumps(facts))


def _policy(config: Config, world: World, folder: Path, name: str = "qwen2-tied") -> Any:
    from ctrl_hpc.train.policy import Policy

    return Policy(config, world, folder / "models" / name, optimizer=STEADY)


def _parts(policy: Any) -> Any:
    return {"policy": (policy.model, policy.optimizer)}


def _bits(policy: Any) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in policy.model.parameters()]


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def _resumes(config: Config, world: World, folder: Path) -> dict[str, Any]:
    from ctrl_hpc.megatron import checkpoint
    from ctrl_hpc.train.batch import collate
    from ctrl_hpc.train.losses import SFTLoss

    policy, other = _policy(config, world, folder), _policy(config, world, folder)
    batches = [collate(sequences(policy.architecture.vocab_size, 6 + n, prompt=None)) for n in range(4)]
    place = folder / "checkpoints-behaviour"
    for step, batch in enumerate(batches):
        policy.update(batch, SFTLoss(n_tokens=batch.n_tokens), 1e-3)
        if step < 3:
            checkpoint.save(place, step + 1, _parts(policy), world, {}, keep=2, source=policy.folder)
    random_before = torch.rand(3)
    (place / ".step-000009.part").mkdir()  # what a crash while saving leaves
    progress = checkpoint.load(place, _parts(other), world)
    assert progress is not None
    random_after = torch.rand(3)
    other.update(batches[3], SFTLoss(n_tokens=batches[3].n_tokens), 1e-3)
    return {
        "resumed_at": progress["step"],
        "kept": sorted(path.name for path in place.iterdir() if path.name.startswith("step")),
        "resumed_same_bits": _same(_bits(policy), _bits(other)),
        "random_restored": torch.equal(random_before, random_after),
    }


def _resumes_in_bfloat16(config: Config, world: World, folder: Path) -> dict[str, Any]:
    from ctrl_hpc.megatron import checkpoint
    from ctrl_hpc.train.batch import collate
    from ctrl_hpc.train.losses import SFTLoss

    policy, other = _policy(config, world, folder), _policy(config, world, folder)
    batch = collate(sequences(policy.architecture.vocab_size, 6, prompt=None))
    policy.update(batch, SFTLoss(n_tokens=batch.n_tokens), 1e-3)
    place = folder / "checkpoints-bfloat16"
    checkpoint.save(place, 1, _parts(policy), world, {}, keep=1, source=policy.folder)
    checkpoint.load(place, _parts(other), world)
    for each in (policy, other):
        each.update(batch, SFTLoss(n_tokens=batch.n_tokens), 1e-3)
    return {
        "bfloat16": sorted({str(parameter.dtype) for parameter in policy.model.parameters()}),
        "bfloat16_same_bits": _same(_bits(policy), _bits(other)),
    }


def _saves_in_background(config: Config, world: World, folder: Path) -> dict[str, Any]:
    """A step is trained while the writer is held up; the checkpoint has the weights from before it."""
    from ctrl_hpc.megatron import checkpoint
    from ctrl_hpc.train.batch import collate
    from ctrl_hpc.train.losses import SFTLoss

    policy, other = _policy(config, world, folder), _policy(config, world, folder)
    batch = collate(sequences(policy.architecture.vocab_size, prompt=None))
    before, place, gate = _bits(policy), folder / "checkpoints-background", threading.Event()
    pending = checkpoint.begin(place, 1, _parts(policy), world, {}, keep=1, source=policy.folder, after=gate.wait)
    policy.update(batch, SFTLoss(n_tokens=batch.n_tokens), 1e-3)
    early = checkpoint.latest(place) is not None
    gate.set()
    pending.finish()
    checkpoint.load(place, _parts(other), world)
    return {"saved_too_early": early, "background_same_bits": _same(before, _bits(other))}


def _micro_batching(config: Config, world: World, folder: Path) -> dict[str, Any]:
    from ctrl_hpc.train.batch import collate
    from ctrl_hpc.train.losses import SFTLoss

    gradients = []
    for budget in (24 * 48, 48):
        policy = _policy(replace(config, trainer=replace(config.trainer, micro_batch_tokens=budget)), world, folder)
        batch = collate(sequences(policy.architecture.vocab_size, 24, prompt=None))
        policy.gradients(batch, SFTLoss(n_tokens=batch.n_tokens))
        gradients.append(torch.cat([parameter.main_grad.flatten() for parameter in policy.model.parameters()]))
    whole, split = gradients
    return {"micro_batching_error": float((split - whole).norm() / whole.norm())}


def _swap(config: Config, world: World, folder: Path) -> dict[str, Any]:
    from ctrl_hpc.train.batch import collate
    from ctrl_hpc.train.losses import SFTLoss
    from ctrl_hpc.train.policy import make_reference

    policy = _policy(config, world, folder)
    path = folder / "models" / "qwen2-tied"
    swap, copy = (make_reference(policy, path, kind) for kind in ("swap", "copy"))
    batch = collate(sequences(policy.architecture.vocab_size, prompt=None))
    first = policy.logprobs(batch)
    policy.update(batch, SFTLoss(n_tokens=batch.n_tokens), 1e-2)
    before = _bits(policy)
    swapped, copied = swap.logprobs(batch), copy.logprobs(batch)
    return {
        "reference_is_fixed": torch.equal(swapped, first) and torch.equal(copied, first),
        "policy_untouched_by_swap": _same(before, _bits(policy)),
        "policy_moved": not torch.equal(policy.logprobs(batch), first),
    }


def _not_finite(config: Config, world: World, folder: Path) -> dict[str, Any]:
    from ctrl_hpc.train.batch import collate

    policy = _policy(config, world, folder)
    before = _bits(policy)
    batch = collate(sequences(policy.architecture.vocab_size))

    def broken(head: Any, micro: Any, hidden_ND: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return hidden_ND.sum() * math.nan, {}

    try:
        policy.update(batch, broken, 1e-3)
    except FloatingPointError as error:
        return {"not_finite": str(error), "untouched_by_nan": _same(before, _bits(policy))}
    return {"not_finite": "accepted"}


def _learns_by_rl(config: Config, world: World, folder: Path) -> dict[str, Any]:
    from ctrl_hpc.train.batch import collate
    from ctrl_hpc.train.losses import RLLoss

    moved = {}
    for name, options in {
        "token": RLConfig(),
        "sequence": RLConfig(ratio="sequence", aggregation="seq-mean-token-mean", entropy_coef=1e-4),
    }.items():
        policy = _policy(config, world, folder)
        batch = collate(sequences(policy.architecture.vocab_size, 8, prompt=None))
        old_SR = policy.logprobs(batch)
        advantages_S = torch.tensor([1.0, -1.0] * 4)
        advantages_SR = advantages_S[:, None] * batch.mask_SR
        for step in range(3):
            known = None if step == 0 else old_SR
            loss = RLLoss.of(
                batch,
                options,
                advantages_SR=advantages_SR,
                rollout_SR=old_SR,
                old_SR=known,
                reference_SR=old_SR,
            )
            logged = policy.update(batch, loss, 1e-3)
        change_S = (policy.logprobs(batch) - old_SR).sum(1) * advantages_S
        moved[f"rl_moves_{name}"] = bool((change_S > 0).all())
        moved[f"rl_logged_{name}"] = sorted(logged)
    return moved


def _learns_values(config: Config, world: World, folder: Path) -> dict[str, Any]:
    """A value network learns which of two kinds of response is worth 1; its checkpoint lies beside the policy's."""
    from ctrl_hpc.megatron import checkpoint
    from ctrl_hpc.train.batch import collate
    from ctrl_hpc.train.losses import ValueLoss
    from ctrl_hpc.train.policy import Value

    facts: dict[str, Any] = {}
    for name in ("qwen2-tied", "qwen2-untied"):
        value = Value(config, world, folder / "models" / name, optimizer=STEADY)
        batch = collate([([3, 4], [5 + row % 2, 7, 8]) for row in range(6)])
        wanted_SR = (torch.arange(6) % 2 == 0).float()[:, None].expand(6, 3)
        first_SR = value.values(batch)
        losses = []
        for _ in range(60):
            loss = ValueLoss(clip=0.5, old_SR=value.values(batch), returns_SR=wanted_SR, n_tokens=batch.n_tokens)
            losses.append(value.update(batch, loss, 3e-3)["loss"])
        learnt_SR = value.values(batch)
        facts[f"value_{name}"] = {
            "zero_at_first": not first_SR.any(),
            "falls": losses[-1] < 0.25 * losses[0],
            "tells_apart": bool((learnt_SR[::2, 1:] > learnt_SR[1::2, 1:] + 0.5).all()),
        }
    policy, other = (
        _policy(config, world, folder, name),
        Value(config, world, folder / "models" / name, optimizer=STEADY),
    )
    parts = {"policy": (policy.model, policy.optimizer), "value": (value.model, value.optimizer)}
    fresh = {"policy": (policy.model, policy.optimizer), "value": (other.model, other.optimizer)}
    checkpoint.save(folder / "checkpoints-value", 1, parts, world, {}, keep=1, source=policy.folder)
    checkpoint.load(folder / "checkpoints-value", fresh, world)
    return facts | {"value_resumes": _same(_bits(value), _bits(other))}


def _refuses(config: Config, world: World, folder: Path) -> dict[str, Any]:
    from ctrl_hpc.megatron import checkpoint
    from ctrl_hpc.train.batch import collate
    from ctrl_hpc.train.losses import SFTLoss

    def wrong_checkpoint() -> None:
        policy = _policy(config, world, folder, "llama-untied")
        checkpoint.load(folder / "checkpoints-behaviour", _parts(policy), world)

    def too_long() -> None:
        policy = _policy(config, world, folder)
        batch = collate([([1] * 60, [2] * 60)])
        policy.update(batch, SFTLoss(n_tokens=60), 1e-3)

    def layout(size: int, **parallel: Any) -> None:
        ParallelConfig(**parallel).check(size)

    broken = folder / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((folder / "models" / "qwen2-tied" / "config.json").read_text())
    other = folder / "other"
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "gpt2"}')
    attempts: dict[str, Callable[[], object]] = {
        "missing": lambda: _policy(config, world, folder, "nowhere"),
        "no_weights": lambda: _policy(config, world, folder, "../broken"),
        "unsupported": lambda: _policy(config, world, folder, "../other"),
        "wrong_checkpoint": wrong_checkpoint,
        "too_long": too_long,
        "ranks": lambda: layout(3, tensor=2),
        "sequence": lambda: layout(1, sequence=True),
    }
    said = {}
    for name, attempt in attempts.items():
        try:
            attempt()
            said[name] = "accepted"
        except ValueError as error:
            said[name] = str(error)
    return {"refused": said}
