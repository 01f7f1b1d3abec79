"""Completions of token ids, as the server's routes ask for them: a worker and the tokenizer of its model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ctrl_hpc.records import Generation, Sampling
from ctrl_hpc.rollout.seed import derive_seed
from ctrl_hpc.rollout.worker import Worker


class Service:
    """A worker with its tokenizer: expands ``n``, runs requests, decodes texts."""

    def __init__(self, worker: Worker, tokenizer: Any, model: str) -> None:
        self.worker, self.tokenizer, self.model = worker, tokenizer, model

    async def complete(self, prompts: Sequence[Sequence[int]], sampling: Sequence[Sampling]) -> list[list[Generation]]:
        """``n`` completions for each prompt; sample j of a seeded request uses the seed itself, then derived ones."""
        flat_prompts, flat_sampling = [], []
        for prompt, item in zip(prompts, sampling, strict=True):
            for j in range(item.n):
                seed = item.seed if item.seed is None or j == 0 else derive_seed(item.seed, j)
                flat_prompts.append(prompt)
                flat_sampling.append(
                    Sampling(temperature=item.temperature, top_p=item.top_p, max_tokens=item.max_tokens, seed=seed)
                )
        generations = await asyncio.wrap_future(self.worker.submit(flat_prompts, flat_sampling))
        flat = iter(generations)
        return [[next(flat) for _ in range(item.n)] for item in sampling]

    def texts(self, generations: Sequence[Generation]) -> list[str]:
        """The completions' texts, special tokens left out."""
        return self.tokenizer.batch_decode([list(item.token_ids) for item in generations], skip_special_tokens=True)
