"""Megatron at TP=2 with the Triton kernels, interpreted, gives what it gives with PyTorch's: SFT, RL, advantages.

``main`` is one rank of that job.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import megatron_jobs
import pytest
import torch

BACKENDS = ("torch", "triton")
STEPS = ("sft", "rl one pass", "rl two passes", "rl sequences")
LIMIT = 1e-5


def main(folder: Path) -> None:
    """One optimizer step of each kind with each backend, from the same weights; what it left goes to backends.pt."""
    import ranks

    from ctrl_hpc.config import ParallelConfig

    found: dict[str, Any] = {}
    for backend in BACKENDS:
        for config, world in ranks.arranged(ParallelConfig(tensor=2), kernels=backend):
            found[backend] = {step: take(step, config, world, folder / "models" / "qwen2-tied") for step in STEPS}
            found[backend] |= advantages(backend)
            if world.main:
                torch.save(found, folder / "backends.pt")


def take(step: str, config: Any, world: Any, model: Path) -> dict[str, Any]:
    """What a step logs, its gradients and the weights after it."""
    import ranks

    from ctrl_hpc.config import RLConfig
    from ctrl_hpc.train.batch import collate
    from ctrl_hpc.train.losses import RLLoss, SFTLoss
    from ctrl_hpc.train.policy import Policy

    policy = Policy(config, world, model, optimizer=ranks.STEADY)
    batch = collate(megatron_jobs.sequences(policy.architecture.vocab_size, 6, prompt=None))
    loss: Any = SFTLoss(n_tokens=batch.n_tokens)
    if step != "sft":
        options = RLConfig(kl_coef=0.05, entropy_coef=0.01, importance_cap=2.0, dual_clip=3.0, temperature=0.9)
        if step == "rl sequences":
            options = replace(options, ratio="sequence", aggregation="seq-mean-token-mean")
        generator = torch.Generator().manual_seed(1)
        noise = 0.3 * torch.randn(4, *batch.mask_SR.shape, generator=generator)
        now_SR = policy.logprobs(batch, temperature=options.temperature)
        loss = RLLoss.of(
            batch,
            options,
            advantages_SR=noise[0] * 5,
            rollout_SR=now_SR + noise[1],
            old_SR=None if step == "rl two passes" else now_SR + noise[2],
            reference_SR=now_SR + noise[3],
        )
    logged = policy.gradients(batch, loss)
    gradients = ranks.gradients_of(policy)
    after = policy.update(batch, loss, ranks.STEADY.lr)
    assert policy.kernels == config.trainer.kernels == policy.engine()["kernels"]
    assert all(after[name] == pytest.approx(value, rel=1e-6, abs=1e-9) for name, value in logged.items())
    mine = {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}
    return {"logged": after, "gradients": gradients, "weights": mine}


def advantages(backend: Any) -> dict[str, Any]:
    """Of rewards in groups, and of rewards with values."""
    import ctrl_kernels

    generator = torch.Generator().manual_seed(2)
    rewards, values = torch.randn(2, 12, 9, generator=generator)
    mask = torch.rand(12, 9, generator=generator) < 0.7
    groups = torch.arange(12) % 4
    grouped = ctrl_kernels.group_advantages(rewards[:, 0], groups, backend=backend)
    estimated, returns = ctrl_kernels.gae(rewards, values, mask, gamma=0.99, lam=0.95, backend=backend)
    return {"group_advantages": grouped, "gae": estimated, "returns": returns}


@pytest.fixture(scope="module")
def found(workplace: Path) -> dict[str, Any]:
    """What rank 0 of two found."""
    megatron_jobs.spawn("test_kernel_backends", "main", workplace, 2)
    return torch.load(workplace / "backends.pt")


def difference(left: torch.Tensor, right: torch.Tensor) -> float:
    """|left - right| / |right|."""
    return ((left - right).norm() / right.norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_both_backends_train_alike(found: dict[str, Any], step: str) -> None:
    torch_, triton = (found[backend][step] for backend in BACKENDS)
    assert triton["logged"] == pytest.approx(torch_["logged"], rel=LIMIT, abs=1e-6)
    for part in ("gradients", "weights"):
        assert triton[part].keys() == torch_[part].keys()
        for name, value in torch_[part].items():
            assert value.norm() > 0, name
            assert difference(triton[part][name], value) < LIMIT, (part, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["group_advantages", "gae", "returns"])
def test_both_backends_estimate_advantages_alike(found: dict[str, Any], name: str) -> None:
    assert difference(found["triton"][name], found["torch"][name]) < LIMIT
