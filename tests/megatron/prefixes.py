"""A rank that learns from critiques that share prompts (see ``megatron_jobs.spawn``); leaves prefix-*.pt."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ranks import STEADY, arranged, gradients_of

from ctrl_hpc.config import ParallelConfig, RLConfig
from ctrl_hpc.train.batch import Batch, collate
from ctrl_hpc.train.losses import RLLoss
from ctrl_hpc.train.policy import Policy

MODELS = ("qwen2-tied", "llama-tied", "qwen3-untied")
LAYOUTS: dict[int, dict[str, ParallelConfig]] = {
    1: {"single": ParallelConfig()},
    2: {
        "tp2-sp": ParallelConfig(tensor=2, sequence=True, recompute="full"),
        "pp2": ParallelConfig(pipeline=2, recompute="full"),
        "dp2": ParallelConfig(),
    },
}
OPTIONS = {
    "token": RLConfig(),
    "sequence": RLConfig(ratio="sequence", aggregation="seq-mean-token-mean", entropy_coef=1e-2),
}


def batch_of(vocab_size: int) -> Batch:
    """Three drafts with four, one and three critiques of unlike lengths, one of a token alone, one partly forced."""
    generator = torch.Generator().manual_seed(3)

    def ids(n: int) -> list[int]:
        return torch.randint(0, vocab_size, (n,), generator=generator).tolist()

    prompts = [ids(17), ids(5), ids(9)]
    lengths = [(0, 6), (1, 11), (0, 1), (2, 8), (0, 13), (2, 3), (0, 9), (2, 8)]
    forced = [None, None, None, (2, 4), None, None, None, None]
    return collate([(prompts[prompt], ids(n)) for prompt, n in lengths], forced)


def check(folder: Path) -> None:
    """Gradients and log-probabilities with prompts computed once and again and again, in every layout."""
    for layout, parallel in LAYOUTS[int(os.environ["WORLD_SIZE"])].items():
        for name in MODELS:
            for shared in (True, False):
                for config, world in arranged(parallel, shared_prefix=shared, micro_batch_tokens=64):
                    policy = Policy(
                        replace(config, lora=config.lora), world, folder / "models" / name, optimizer=STEADY
                    )
                    found = _found(policy)
                    if world.main:
                        torch.save(found, folder / f"prefix-{name}-{layout}-{shared}.pt")


def _found(policy: Policy) -> dict[str, Any]:
    batch = batch_of(policy.architecture.vocab_size)
    old_SR, entropy_SR = policy.logprobs_and_entropy(batch)
    parts = policy._micro_batches(batch)
    found: dict[str, Any] = {
        "logprobs": old_SR,
        "entropy": entropy_SR,
        "tokens": sum(micro.tokens_BT.numel() for micro in parts),
        "n_parts": len(parts),
    }
    advantages_SR = torch.linspace(-1, 1, len(batch))[:, None] * batch.mask_SR
    for kind, options in OPTIONS.items():
        facts = {"advantages_SR": advantages_SR, "rollout_SR": old_SR, "old_SR": old_SR - 0.1}
        loss = RLLoss.of(batch, options, reference_SR=old_SR - 0.2, **facts)
        logged = policy.gradients(batch, loss)
        found[kind] = {"logged": logged, "gradients": gradients_of(policy)}
    return found
