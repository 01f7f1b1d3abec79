"""Log-probs of prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ctrl_hpc.rollout.decoding import Decoding, TopLogprobs

SCORED_AT_ONCE = 256
"""Positions whose logits are held at a time when prompts are scored."""


def _continuous(model: Any, stop_ids: frozenset[int], _: int) -> Engine:
    return ContinuousEngine(model, stop_ids)


def _padded(model: Any, stop_ids: frozenset[int], max_batch_tokens: int) -> Engine:
    return PaddedEngine(model, stop_ids, max_batch_tokens=max_batch_tokens)


BATCHING: dict[str, Callable[[Any, frozenset[int], int], Engine]] = {"padded": _padded, "continuous": _continuous}
"""Engines by name, each made of a model, its stop ids and the largest padded batch in tokens."""


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Weights and activations by name."""


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 by instructions of its own; elsewhere it is slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())  # type: ignore[attr-defined]


def stop_token_ids(folder: str | Path) -> frozenset[int]:
    """The end-of-sequence ids a model folder names in its configuration files."""
    ids: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        path = Path(folder) / name
        if path.is_file():
            eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
            ids.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return frozenset(ids)


def load_engine(
    folder: str,
    *,
    device: str = "cpu",
    dtype: str = "auto",
    batching: str = "auto",
    max_batch_tokens: int = 65536,
    stop_ids: frozenset[int] = frozenset(),
) -> Engine:
    """The engine for a Hugging Face folder.

    ``dtype`` is a key of ``DTYPES``, or auto: the folder's own on cuda; on CPUs bfloat16 for a folder in bfloat16 where
    they multiply it, else float32. ``batching`` is a key of ``BATCHING``, or auto: continuous on cuda, padded on a
    CPU. ``stop_ids`` come on top of those the folder names. Raises ValueError when there is no such model, device, type
    or way of batching.
    """
    from transformers import AutoModelForCausalLM

    weight_files(folder)
    if batching == "auto":
        batching = "continuous" if device == "cuda" else "padded"
    if batching not in BATCHING:
        raise ValueError(f"rollout.batching={batching}: allowed: auto, {', '.join(BATCHING)}")
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"rollout.dtype={dtype}: allowed: auto, {', '.join(DTYPES)}")
    if dtype == "auto" and device == "cpu":
        dtype = "bfloat16" if stored_dtype(folder) == "BF16" and cpu_has_bfloat16() else "float32"
    kind = DTYPES.get(dtype, "auto")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, attn_implementation="sdpa").to(device).eval()
    return BATCHING[batching](model, stop_ids | stop_token_ids(folder), max_batch_tokens)


Score = tuple[tuple[float, ...], tuple[TopLogprobs, ...]]
"""Log-probs of a prompt's tokens but the first, and the likeliest tokens there."""


def score_prompts(model: Any, prompts: Sequence[Sequence[int]], decodings: Sequence[Decoding]) -> list[Score | None]:
    """The prompts' own log-probs at temperature 1, where they are asked for; equal prompts are computed once."""
    known: dict[tuple[tuple[int, ...], int], Score] = {}
    out: list[Score | None] = []
    for prompt, decoding in zip(prompts, decodings, strict=True):
        key = (tuple(prompt), decoding.top_logprobs)
        if decoding.prompt_logprobs and key not in known:
            known[key] = _score(model, *key)
        out.append(known[key] if decoding.prompt_logprobs else None)
    return out


def _score(model: Any, prompt: tuple[int, ...], top: int) -> Score:
    device = next(model.parameters()).device
    ids_1T = torch.tensor([prompt], device=device)
    hidden_TD = model.base_model(input_ids=ids_1T, use_cache=False).last_hidden_state[0, :-1]
    values: list[float] = []
    tops: list[TopLogprobs] = []
    for start in range(0, len(hidden_TD), SCORED_AT_ONCE):
        part_CD = hidden_TD[start : start + SCORED_AT_ONCE]
        logprobs_CV = torch.log_softmax(model.get_output_embeddings()(part_CD).float(), dim=-1)
        wanted_C1 = ids_1T[0, start + 1 : start + 1 + len(part_CD), None]
        values += logprobs_CV.gather(1, wanted_C1)[:, 0].tolist()
        likeliest = logprobs_CV.topk(top, dim=-1)
        pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
        tops += [tuple(zip(ids, logprobs, strict=True)) for ids, logprobs in pairs]
    if not all(map(math.isfinite, values)):
        raise RuntimeError("the logits are not finite: bad weights?")
    return tuple(values), tuple(tops)
