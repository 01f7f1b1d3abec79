"""Continuous batching by transformers' paged-attention scheduler: the engine of GPU servers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ctrl_hpc.records import Generation, Sampling
from ctrl_hpc.rollout.weights import copy_weights
from ctrl_hpc.rollout.worker import check_prompts
from ctrl_hpc.seeds import derive_seed


class ContinuousEngine:
    """Requests join and leave the running batch a token at a time.

    Seeds fix the random stream of all requests gathered in one call, not of each request: a completion depends on
    its batch mates. Where that matters, ``rollout.batching=padded`` gives every request its own stream.
    """

    def __init__(self, model: Any, stop_ids: frozenset[int], **options: Any) -> None:
        """``options`` go to transformers' ``ContinuousBatchingConfig``: ``num_blocks``, ``max_batch_tokens``, ..."""
        self.model, self.stop_ids, self.options = model, stop_ids, options
        self.version = 0
        self.max_positions = int(model.config.max_position_embeddings)

    def load_weights(self, folder: str, version: int) -> None:
        """Replace the weights by those of a Hugging Face folder; on ValueError nothing has changed."""
        copy_weights(self.model, folder)
        self.version = version

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sequence[Sampling]) -> list[Generation]:
        """One completion for each prompt, in order; requests that sample alike are decoded together."""
        check_prompts(prompts, self.max_positions, self.model.config.vocab_size)
        groups: dict[tuple[float, float, int], list[int]] = {}
        for row, item in enumerate(sampling):
            groups.setdefault((item.temperature, item.top_p, item.max_tokens), []).append(row)
        out: dict[int, Generation] = {}
        for (temperature, top_p, max_tokens), rows in groups.items():
            seeds = [item.seed for row in rows if (item := sampling[row]).seed is not None]
            seed = derive_seed(0, *seeds) if seeds else None
            outputs = self._decode([list(prompts[row]) for row in rows], temperature, top_p, max_tokens, seed)
            out.update(zip(rows, outputs, strict=True))
        return [out[row] for row in range(len(prompts))]

    def _decode(
        self, prompts: list[list[int]], temperature: float, top_p: float, max_tokens: int, seed: int | None
    ) -> list[Generation]:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        sampled = {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
        generation = GenerationConfig(
            max_new_tokens=max_tokens,
            do_sample=temperature > 0,
            eos_token_id=sorted(self.stop_ids) or None,
            **sampled,
        )
        batching = ContinuousBatchingConfig(return_logprobs=True, seed=seed, **self.options)
        with torch.no_grad():
            results = self.model.generate_batch(prompts, generation, batching)
        if len(results) != len(prompts):
            raise RuntimeError(f"the continuous batching scheduler answered {len(results)} of {len(prompts)} requests")
        return [self._generation(prompt, result) for prompt, result in zip(prompts, results.values(), strict=True)]

    def _generation(self, prompt: list[int], result: Any) -> Generation:
        if result.error is not None:
            raise RuntimeError(f"continuous batching failed: {result.error}")
        tokens = tuple(result.generated_tokens)
        return Generation(
            text="",
            prompt_ids=tuple(prompt),
            token_ids=tokens,
            logprobs=tuple(result.logprobs),
            finish_reason="stop" if tokens and tokens[-1] in self.stop_ids else "length",
            version=self.version,
        )
