"""What the trainer computes for every objective: gradients by Hugging Face's names, and the inputs they came from.

``check`` is a rank of a job of one or two ranks (see ``megatron_jobs.spawn``); leaves FOLDER/objectives-RANKS.pt.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron_jobs import sequences
from ranks import CONFIG, gradients_of
from torch import Tensor

from ctrl_hpc.config import OptimizerConfig, ParallelConfig, RLConfig
from ctrl_hpc.megatron import parallel_state
from ctrl_hpc.train.advantages import advantages_and_returns
from ctrl_hpc.train.batch import Batch, collate
from ctrl_hpc.train.losses import RLLoss, SFTLoss, ValueLoss
from ctrl_hpc.train.policy import Policy, Value
from ctrl_hpc.train.rollouts import Experience

GROUPS = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2])
REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.25, 1.0])
STEPS = 3
ADAMW = OptimizerConfig(lr=1e-2, schedule="constant", weight_decay=0.1, eps=1e-3, clip_grad=0.5)
"""A large epsilon: with a small one a step of a tiny gradient is a matter of its sign, and rounding decides."""
CASES: dict[str, RLConfig] = {
    "grpo": RLConfig(kl_coef=0.0),
    "grpo_kl_entropy": RLConfig(kl_coef=0.05, entropy_coef=0.02),
    "grpo_k2": RLConfig(kl_coef=0.05, kl_estimator="k2"),
    "gspo": RLConfig(ratio="sequence", aggregation="seq-mean-token-mean", clip_low=0.02, clip_high=0.03, kl_coef=0.05),
    "rloo": RLConfig(estimator="rloo", kl_coef=0.0),
    "dr_grpo": RLConfig(estimator="dr_grpo", aggregation="seq-mean-token-sum", kl_coef=0.0, clip_high=0.28),
    "dual_clip": RLConfig(dual_clip=1.2, kl_coef=0.0),
    "truncated_importance_sampling": RLConfig(importance_cap=1.1, kl_coef=0.0),
    "ppo": RLConfig(estimator="gae", kl_coef=0.0, gae_lambda=0.9),
}


def check(folder: Path) -> None:
    """Every objective's gradient, that of the value network, and a few steps of the optimizer."""
    size = int(os.environ["WORLD_SIZE"])
    config = replace(CONFIG, parallel=ParallelConfig(tensor=size))
    world = parallel_state.initialize(config)
    model = folder / "models" / "qwen2-tied"
    policy = Policy(config, world, model, optimizer=ADAMW)
    batch = collate(sequences(policy.architecture.vocab_size, len(REWARDS), prompt=None))
    noise = torch.Generator().manual_seed(3)
    now_SR = policy.logprobs(batch)

    def near(scale: float) -> Tensor:
        return now_SR + scale * torch.randn(now_SR.shape, generator=noise) * batch.mask_SR

    given = {"old": near(0.3), "rollout": near(0.3), "reference": near(0.5), "values": near(1.0)}
    found: dict[str, Any] = {"given": given, "gradients": {}, "losses": {}, "logged": {}}
    for name, options in CASES.items():
        for old in ("known", "current"):  # of a later minibatch, and of the first one
            loss = RLLoss.of(
                batch,
                options,
                advantages_SR=_advantages(batch, options, given["values"]),
                rollout_SR=given["rollout"],
                old_SR=given["old"] if old == "known" else None,
                reference_SR=given["reference"] if options.kl_coef else None,
            )
            logged = policy.gradients(batch, loss)
            found["losses"][name, old] = logged["loss"]
            found["logged"][name, old] = logged
            found["gradients"][name, old] = gradients_of(policy)
    if size == 1:
        found |= _value(config, world, model, batch, given["values"]) | _steps(policy, batch)
    if world.main:
        torch.save(found, folder / f"objectives-{size}.pt")


def _advantages(batch: Batch, options: RLConfig, values_SR: Tensor) -> Tensor:
    if options.estimator == "gae":
        return advantages_and_returns(REWARDS, values_SR, batch.mask_SR, options)[0]
    experience = Experience(
        batch=batch,
        rewards_S=REWARDS,
        groups_S=GROUPS,
        valid_S=torch.ones(len(REWARDS), dtype=torch.bool),
        rollout_SR=torch.zeros(batch.mask_SR.shape),
        position=0,
        metrics={},
    )
    return experience.advantages(options.estimator)[:, None] * batch.mask_SR


def _value(config: Any, world: Any, model: Path, batch: Batch, old_SR: Tensor) -> dict[str, Any]:
    value = Value(config, world, model, optimizer=ADAMW)
    torch.nn.init.normal_(value.model.value_head.weight, std=0.2, generator=torch.Generator().manual_seed(4))
    returns_SR = advantages_and_returns(REWARDS, old_SR, batch.mask_SR, CASES["ppo"])[1]
    loss = ValueLoss(clip=0.2, old_SR=old_SR, returns_SR=returns_SR, n_tokens=batch.n_tokens)
    logged = value.gradients(batch, loss)
    gradients = {name: parameter.main_grad.clone() for name, parameter in value.model.named_parameters()}
    return {
        "value_head": value.model.value_head.weight.detach().clone(),
        "value_loss": logged["loss"],
        "value_gradients": {
            "head": gradients["value_head.weight"],
            "model.norm.weight": gradients["decoder.final_layernorm.weight"],
            "model.embed_tokens.weight": gradients["embedding.word_embeddings.weight"],
        },
    }


def _steps(policy: Policy, batch: Batch) -> dict[str, Any]:
    from ctrl_hpc.megatron.weights import gather

    norms = [policy.update(batch, SFTLoss(n_tokens=batch.n_tokens), ADAMW.lr)["grad_norm"] for _ in range(STEPS)]
    weights = gather(policy.model, policy.architecture, policy.world)
    return {"norms": norms, "weights": {name: tensor.clone() for name, tensor in weights}}
