"""Log-probs of prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ctrl_hpc.rollout.decoding import Decoding, TopLogprobs
from ctrl_hpc.rollout.packed import FloatHead

_SCORED_AT_ONCE = 256
"""Positions whose logits are held at a time when prompts are scored."""
_Score = tuple[tuple[float, ...], tuple[TopLogprobs, ...]]
"""Log-probs of a prompt's tokens but the first, and the likeliest tokens there."""


def score_prompts(
    model: Any, prompts: Sequence[Sequence[int]], decodings: Sequence[Decoding], head: FloatHead | None = None
) -> list[_Score | None]:
    """The prompts' own log-probs at temperature 1, where they are asked for; equal prompts are computed once.

    ``head``: what makes the logits in place of the model's own, of fewer bits.
    """
    known: dict[tuple[tuple[int, ...], int], _Score] = {}
    out: list[_Score | None] = []
    for prompt, decoding in zip(prompts, decodings, strict=True):
        key = (tuple(prompt), decoding.top_logprobs)
        if decoding.prompt_logprobs and key not in known:
            known[key] = _score(model, *key, head)
        out.append(known[key] if decoding.prompt_logprobs else None)
    return out


def _score(model: Any, prompt: tuple[int, ...], top: int, head: FloatHead | None) -> _Score:
    device = next(model.parameters()).device
    ids_1T = torch.tensor([prompt], device=device)
    hidden_TD = model.base_model(input_ids=ids_1T, use_cache=False).last_hidden_state[0, :-1]
    values: list[float] = []
    tops: list[TopLogprobs] = []
    for start in range(0, len(hidden_TD), _SCORED_AT_ONCE):
        part_CD = hidden_TD[start : start + _SCORED_AT_ONCE]
        logits_CV = model.get_output_embeddings()(part_CD) if head is None else head(part_CD)
        logprobs_CV = torch.log_softmax(logits_CV.float(), dim=-1)
        wanted_C1 = ids_1T[0, start + 1 : start + 1 + len(part_CD), None]
        values += logprobs_CV.gather(1, wanted_C1)[:, 0].tolist()
        likeliest = logprobs_CV.topk(top, dim=-1)
        pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        tops += [tuple(zip(ids, logprobs, strict=True)) for ids, logprobs in pairs]
    if not all(map(math.isfinite, values)):
        raise RuntimeError("the logits are not finite: bad weights?")
    return tuple(values), tuple(tops)
