"""What publishing costs over RL steps of a real model: bytes of differences, and how long the trainer waits.

``python bench/publishing.py FOLDER`` trains a Hugging Face folder by GRPO on sums of small numbers (the reward is that
the sum is named first, and the completion is short), on the CPU, and publishes every version twice: whole, while the
trainer waits, and by :class:`Publisher` as a difference, while it goes on. The engine that samples loads each version's
difference, and is compared with the whole folder bit by bit.
"""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from ctrl_kernels import group_advantages
from safetensors.torch import load_file

from ctrl_hpc.config import Config, OptimizerConfig, RLConfig, TrainerConfig, WandbConfig
from ctrl_hpc.megatron import parallel_state
from ctrl_hpc.records import Sampling
from ctrl_hpc.rollout.engine import PaddedEngine, load_engine
from ctrl_hpc.train.ahead import weights_folder
from ctrl_hpc.train.batch import collate
from ctrl_hpc.train.losses import RLLoss
from ctrl_hpc.train.policy import Policy
from ctrl_hpc.train.publish import Publisher

GROUP = 4


def experience(engine: PaddedEngine, tokenizer: Any, step: int, prompts: int, tokens: int) -> tuple[Any, ...]:
    """Prompts and completions, their log-probabilities, and rewards."""
    draw = random.Random(step)
    sums = [(draw.randrange(2, 50), draw.randrange(2, 50)) for _ in range(prompts) for _ in range(GROUP)]
    sums = [sums[at // GROUP * GROUP] for at in range(len(sums))]
    asked = [tokenizer(f"Question: What is {a} + {b}?\nAnswer: {a} + {b} =").input_ids for a, b in sums]
    made = engine.generate(
        asked, [Sampling(temperature=1.0, max_tokens=tokens, seed=step * 1000 + i) for i in range(len(asked))]
    )
    texts = [tokenizer.decode(item.token_ids) for item in made]
    rewards = [float(str(a + b) in text[:8]) - 0.01 * len(text) for (a, b), text in zip(sums, texts, strict=True)]
    return asked, made, torch.tensor(rewards)


def improve(policy: Policy, found: tuple[Any, ...], lr: float) -> None:
    """One GRPO step, as the stage takes it."""
    asked, made, rewards_S = found
    batch = collate([(prompt, item.token_ids) for prompt, item in zip(asked, made, strict=True)])
    rollout_SR = torch.zeros(batch.mask_SR.shape)
    for row, item in enumerate(made):
        rollout_SR[row, : len(item.logprobs)] = torch.tensor(item.logprobs)
    groups_S = torch.arange(len(made)) // GROUP
    advantages_S = group_advantages(rewards_S, groups_S, estimator="grpo", backend="torch")
    advantages_SR = advantages_S[:, None].expand(batch.mask_SR.shape) * batch.mask_SR
    loss = RLLoss.of(batch, policy.config.rl, advantages_SR=advantages_SR, rollout_SR=rollout_SR)
    policy.update(batch, loss, lr)


def size(folder: Path) -> int:
    """Bytes of a version's weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def main() -> None:
    """The command's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="of weights in the trainer"
    )
    parser.add_argument("--prompts", type=int, default=4, help=f"of a step, {GROUP} completions each (default: 4)")
    parser.add_argument("--tokens", type=int, default=16, help="of a completion, at most (default: 16)")
    options = parser.parse_args()
    config = Config(
        name="publishing",
        rl=RLConfig(publish="delta", publish_full_every=options.steps + 1, kl_coef=0.0),
        trainer=TrainerConfig(device="cpu", dtype=options.dtype, micro_batch_tokens=256),
        wandb=WandbConfig(mode="disabled"),
    )
    with tempfile.TemporaryDirectory() as place, parallel_state.job(config) as world:
        measure(config, world, options, Path(place))


def measure(config: Config, world: Any, options: argparse.Namespace, place: Path) -> None:
    """The steps, a line each, and the means."""
    from transformers import AutoTokenizer

    steady = OptimizerConfig(lr=options.lr, schedule="constant")
    policy = Policy(config, world, options.folder, optimizer=steady)
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    publisher = Publisher(policy, place, options.folder)
    publisher.publish(0)
    publisher.wait()
    engine = load_engine(str(weights_folder(place, 0)), dtype=options.dtype)
    assert isinstance(engine, PaddedEngine)
    engine.load_weights(str(weights_folder(place, 0)), 0)
    rows = []
    for step in range(options.steps):
        found = experience(engine, tokenizer, step, options.prompts, options.tokens)
        improve(policy, found, options.lr)
        began = time.perf_counter()
        policy.export(place / "whole", source=options.folder, link=True)
        whole_s, began = time.perf_counter() - began, time.perf_counter()
        publisher.publish(step + 1)
        waits_s = time.perf_counter() - began
        publisher.wait()
        written_s = time.perf_counter() - began
        folder = weights_folder(place, step + 1)
        engine.load_weights(str(folder), step + 1)
        own, whole = engine.model.state_dict(), load_file(place / "whole" / "model.safetensors")
        assert all(torch.equal(own[name], tensor) for name, tensor in whole.items()), "the same bits"
        share = size(folder) / size(place / "whole")
        rows.append((share, whole_s, waits_s, written_s))
        print(
            f"step {step}: reward {found[2].mean():+.3f}  difference {100 * share:.2f} %  whole, waited for:"
            f" {whole_s:.2f} s  trainer waits {waits_s:.2f} s  difference is there after {written_s:.2f} s",
            flush=True,
        )
        shutil.rmtree(place / "whole")
    share, whole_s, waits_s, _ = map(statistics.mean, zip(*rows, strict=True))
    print(
        f"{options.dtype}, lr {options.lr:g}: {100 * share:.2f} % of the bytes in the mean; the trainer waits"
        f" {waits_s:.2f} s, {100 * waits_s / whole_s:.0f} % of {whole_s:.2f} s"
    )


if __name__ == "__main__":
    main()
