"""Continuous batching by transformers' paged-attention scheduler: the engine of GPU servers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ctrl_hpc.records import Sampling
from ctrl_hpc.rollout.decoding import Completion, Decoding, Follower, check_prompts
from ctrl_hpc.rollout.sampler import Adjustments, Sampler
from ctrl_hpc.rollout.scoring import score_prompts
from ctrl_hpc.rollout.weights import copy_weights
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
        self._state: str | None = None
        self.max_positions = int(model.config.max_position_embeddings)
        self.vocabulary = int(model.config.vocab_size)

    def load_weights(self, folder: str, version: int) -> None:
        """Replace the weights by those of a Hugging Face folder; on ValueError nothing has changed."""
        self._state = copy_weights(self.model, folder, self._state)
        self.version = version

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[Sampling],
        followers: Sequence[Follower] | None = None,
    ) -> list[Completion]:
        """One completion for each prompt, in order; requests that sample alike are decoded together.

        Followers are told of a completion when it is done: what they end is cut there. One that is aborted meanwhile
        runs on and is marked so. Raises ValueError for parameters that this scheduler does not know.
        """
        check_prompts(prompts, self.max_positions, self.vocabulary)
        decodings = [
            replace(item, max_tokens=min(item.max_tokens, self.max_positions - len(prompt)))
            for item, prompt in zip(map(Decoding.of, sampling), prompts, strict=True)
        ]
        groups: dict[Decoding, list[int]] = {}
        out: dict[int, Completion] = {}
        for row, decoding in enumerate(decodings):
            if _is_one_biased(decoding):
                out[row] = self._one_biased(prompts[row], decoding)
                continue
            _check_known(decoding)
            groups.setdefault(replace(decoding, seed=None, n=1, first=0, prompt_logprobs=False), []).append(row)
        for alike, rows in groups.items():
            seeds = [item.seed for row in rows if (item := sampling[row]).seed is not None]
            seed = derive_seed(0, *seeds) if seeds else None
            out.update(zip(rows, self._decode([list(prompts[row]) for row in rows], alike, seed), strict=True))
        with torch.inference_mode():
            scored = score_prompts(self.model, prompts, decodings)
        for row, score in enumerate(scored):
            if score is not None:
                out[row] = replace(out[row], prompt_logprobs=score[0])
        return [out[row] if followers is None else _followed(out[row], followers[row]) for row in range(len(prompts))]

    def _one_biased(self, prompt: Sequence[int], decoding: Decoding) -> Completion:
        """One token by biased logits, which the scheduler does not know, by a forward pass of its own."""
        device, stop_ids = next(self.model.parameters()).device, decoding.stop_ids(self.stop_ids)
        with torch.inference_mode():
            hidden_1D = self.model.base_model(
                input_ids=torch.tensor([list(prompt)], device=device), use_cache=False
            ).last_hidden_state[:, -1]
            logits_1V = self.model.get_output_embeddings()(hidden_1D)
            logits_1V = Adjustments([decoding], [prompt], [stop_ids], self.vocabulary, device).apply(logits_1V, 0)
            token_1, logprob_1, _ = Sampler([decoding], 1, device).draw(logits_1V, 0)
        if not torch.isfinite(logprob_1).all():
            raise RuntimeError(f"the logits are not finite: bad weights? (version {self.version})")
        token = int(token_1)
        return Completion(
            text="",
            prompt_ids=tuple(prompt),
            token_ids=(token,),
            logprobs=(float(logprob_1),),
            finish_reason="stop" if token in stop_ids else "length",
            version=self.version,
            matched=token if token in stop_ids else None,
        )

    def _decode(self, prompts: list[list[int]], decoding: Decoding, seed: int | None) -> list[Completion]:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        stop_ids = decoding.stop_ids(self.stop_ids)
        if decoding.max_tokens == 0:
            nothing = [Completion(text="", prompt_ids=tuple(prompt), finish_reason="length") for prompt in prompts]
            return [replace(item, version=self.version) for item in nothing]
        sampled = {"temperature": decoding.temperature, "top_p": decoding.top_p, "top_k": decoding.top_k}
        generation = GenerationConfig(
            max_new_tokens=decoding.max_tokens,
            do_sample=decoding.temperature > 0,
            eos_token_id=sorted(stop_ids) or None,
            **(sampled if decoding.temperature > 0 else {}),
        )
        batching = ContinuousBatchingConfig(return_logprobs=True, seed=seed, **self.options)
        with torch.no_grad():
            results = self.model.generate_batch(prompts, generation, batching)
        if len(results) != len(prompts):
            raise RuntimeError(f"the continuous batching scheduler answered {len(results)} of {len(prompts)} requests")
        return [self._completion(p, result, stop_ids) for p, result in zip(prompts, results.values(), strict=True)]

    def _completion(self, prompt: list[int], result: Any, stop_ids: frozenset[int]) -> Completion:
        if result.error is not None:
            raise RuntimeError(f"continuous batching failed: {result.error}")
        tokens = tuple(result.generated_tokens)
        stopped = bool(tokens) and tokens[-1] in stop_ids
        return Completion(
            text="",
            prompt_ids=tuple(prompt),
            token_ids=tokens,
            logprobs=tuple(result.logprobs),
            finish_reason="stop" if stopped else "length",
            version=self.version,
            matched=tokens[-1] if stopped else None,
        )


def _is_one_biased(decoding: Decoding) -> bool:
    """Whether a single token is asked for, and nothing that needs others: how one of several words is chosen."""
    return decoding.max_tokens == 1 and bool(decoding.logit_bias) and decoding.top_logprobs == 0


def _check_known(decoding: Decoding) -> None:
    asked = {
        "min_p": decoding.min_p > 0.0,
        "top_logprobs": decoding.top_logprobs > 0,
        "penalties, logit_bias and min_tokens": decoding.adjusts_logits,
    }
    for name, is_asked in asked.items():
        if is_asked:
            raise ValueError(f"{name}: not served with rollout.batching=continuous; rollout.batching=padded serves it")


def _followed(completion: Completion, follower: Follower) -> Completion:
    """The completion up to where its follower ends it; marked, where that was aborted while it was decoded."""
    if follower.aborted:
        return replace(completion, finish_reason="abort", matched=None)
    if follower.watches:
        for count, (token, logprob) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True), 1):
            if follower.token(token, logprob, ()):
                tokens, logprobs = completion.token_ids[:count], completion.logprobs[:count]
                return replace(completion, token_ids=tokens, logprobs=logprobs, finish_reason="stop", matched=None)
    return completion
