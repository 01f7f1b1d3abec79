"""A causal language model on one device: padded batches, their cache, and the sampler."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ctrl_hpc.config.machine import resolve_device
from ctrl_hpc.records import Engine, Generation, Sampling
from ctrl_hpc.rollout.continuous import ContinuousEngine
from ctrl_hpc.rollout.weights import copy_weights, weight_files
from ctrl_hpc.rollout.worker import check_prompts

GROWTH = 64
"""Least room, in positions, made when a buffer is full; long ones grow by half."""


class KVCache:
    """What transformers' attention layers need of a cache: ``update``; plus ``expand`` and ``keep`` for the batch.

    Prompts are computed once: ``expand`` copies each prompt's keys and values to the requests that share it.
    """

    def __init__(self, layers: int) -> None:
        self.length = 0
        """Positions filled in every row."""
        self._keys: list[torch.Tensor | None] = [None] * layers
        self._values: list[torch.Tensor | None] = [None] * layers

    def update(
        self, keys_BHSK: torch.Tensor, values_BHSK: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new positions of a layer and return all of its keys and values; ``advance`` ends the step."""
        end = self.length + keys_BHSK.shape[2]
        all_keys = self._store(self._keys, keys_BHSK, layer, end)
        all_values = self._store(self._values, values_BHSK, layer, end)
        return all_keys, all_values

    def _store(self, store: list[torch.Tensor | None], new_BHSK: torch.Tensor, layer: int, end: int) -> torch.Tensor:
        old = store[layer]
        if old is None:
            store[layer] = new_BHSK
            return new_BHSK
        if end > old.shape[2]:
            grown = old.new_zeros(old.shape[0], old.shape[1], end + max(GROWTH, end // 2), old.shape[3])
            grown[:, :, : self.length] = old[:, :, : self.length]
            store[layer] = old = grown
        old[:, :, self.length : end] = new_BHSK
        return old[:, :, :end]

    def advance(self, positions: int) -> None:
        """Every layer has appended this many positions."""
        self.length += positions

    def get_seq_length(self, *_: Any) -> int:
        """Positions filled (transformers' name)."""
        return self.length

    def keep(self, rows_K: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may be named several times."""
        for store in (self._keys, self._values):
            for layer, tensor in enumerate(store):
                assert tensor is not None
                chosen = tensor.new_zeros(len(rows_K), tensor.shape[1], self.length + GROWTH, tensor.shape[3])
                chosen[:, :, : self.length] = tensor[rows_K, :, : self.length]
                store[layer] = chosen


def uniforms(seeds: Sequence[int | None], steps: int) -> torch.Tensor:
    """``[B, T]`` float64 numbers in [0, 1): row b is a Philox stream keyed by seed b, whatever the other rows."""
    out_BT = np.empty((len(seeds), steps))
    for row, seed in enumerate(seeds):
        key = secrets.randbits(62) if seed is None else seed
        out_BT[row] = np.random.Generator(np.random.Philox(key=key)).random(steps)
    return torch.from_numpy(out_BT)


class Sampler:
    """Draws the next token of every row of a batch by inverting the cumulative distribution.

    Log-probabilities are those of the softmax at the row's temperature before the nucleus cut (at temperature 1 for
    greedy rows): what a trainer recomputes from the logits.
    """

    def __init__(self, sampling: Sequence[Sampling], device: torch.device) -> None:
        steps = max(item.max_tokens for item in sampling)
        greedy = [item.temperature == 0.0 for item in sampling]
        self._greedy_B = torch.tensor(greedy, device=device)
        self._all_greedy, self._none_greedy = all(greedy), not any(greedy)
        scale = [1.0 if item.temperature == 0.0 else 1.0 / item.temperature for item in sampling]
        self._scale_B1 = torch.tensor(scale, dtype=torch.float32, device=device)[:, None]
        self._top_p_B1 = torch.tensor([item.top_p for item in sampling], dtype=torch.float64, device=device)[:, None]
        self._nucleus = any(item.top_p < 1.0 for item in sampling)
        seeds = [0 if item.temperature == 0.0 else item.seed for item in sampling]
        self._uniforms_BT = uniforms(seeds, 1 if self._all_greedy else steps).to(device)

    def keep(self, rows_K: torch.Tensor) -> None:
        """Forget all rows but these."""
        self._greedy_B = self._greedy_B[rows_K]
        self._scale_B1, self._top_p_B1 = self._scale_B1[rows_K], self._top_p_B1[rows_K]
        self._uniforms_BT = self._uniforms_BT[rows_K]

    def draw(self, logits_BV: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``(tokens [B], logprobs [B])`` of step ``step``, counted from 0."""
        logprobs_BV = torch.log_softmax(logits_BV.float() * self._scale_B1, dim=-1)
        if self._all_greedy:
            tokens_B = logits_BV.argmax(dim=-1)
        else:
            tokens_B = self._invert(logprobs_BV, step)
            if not self._none_greedy:
                tokens_B = torch.where(self._greedy_B, logits_BV.argmax(dim=-1), tokens_B)
        return tokens_B, logprobs_BV.gather(1, tokens_B[:, None])[:, 0]

    def _invert(self, logprobs_BV: torch.Tensor, step: int) -> torch.Tensor:
        probs_BV = logprobs_BV.exp().double()
        if self._nucleus:
            sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
            above_BV = sorted_BV.cumsum(dim=-1) - sorted_BV  # mass of the strictly likelier tokens
            kept_BV = torch.where(above_BV < self._top_p_B1, sorted_BV, 0.0)
            probs_BV = torch.zeros_like(probs_BV).scatter_(1, order_BV, kept_BV)
        cumulative_BV = probs_BV.cumsum(dim=-1)
        target_B1 = self._uniforms_BT[:, step : step + 1] * cumulative_BV[:, -1:]
        tokens_B = torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0]
        return tokens_B.clamp_(max=probs_BV.shape[1] - 1)


COMPACT_BELOW = 0.75
"""Finished rows are dropped from a batch when fewer than this fraction of its rows is alive."""


class PaddedEngine:
    """Decodes many requests at once in left-padded batches.

    Requests are sorted by prompt length and cut into batches of at most ``max_batch_tokens`` (padding and the longest
    completion included). Equal prompts are computed once. Finished rows leave the batch. Every request has its own
    stream of random numbers, so that its completion does not depend on its batch mates, up to rounding of the logits.
    """

    def __init__(self, model: Any, stop_ids: frozenset[int], *, max_batch_tokens: int = 65536) -> None:
        self.model, self.stop_ids, self.max_batch_tokens = model, stop_ids, max_batch_tokens
        self.version = 0
        self.max_positions = int(model.config.max_position_embeddings)
        self._device = next(model.parameters()).device
        self._stop_S = torch.tensor(sorted(stop_ids), dtype=torch.long, device=self._device)

    def load_weights(self, folder: str, version: int) -> None:
        """Replace the weights by those of a Hugging Face folder; on ValueError nothing has changed."""
        copy_weights(self.model, folder)
        self.version = version

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sequence[Sampling]) -> list[Generation]:
        """One completion for each prompt, in order; ``text`` is empty and ``n`` must be 1.

        A completion ends at a stop token, after ``max_tokens``, or where the model's positions end ("length").
        Raises ValueError for a prompt that is empty or leaves no position for a completion.
        """
        check_prompts(prompts, self.max_positions, self.model.config.vocab_size)
        out: list[Generation | None] = [None] * len(prompts)
        with torch.inference_mode():
            for rows in self._batches(prompts, sampling):
                batch = _Batch([prompts[row] for row in rows], [sampling[row] for row in rows], self)
                for row, generation in zip(rows, batch.run(), strict=True):
                    out[row] = generation
        return [generation for generation in out if generation is not None]

    def _batches(self, prompts: Sequence[Sequence[int]], sampling: Sequence[Sampling]) -> Iterator[list[int]]:
        order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), tuple(prompts[row])))
        batch: list[int] = []
        longest_completion = 0
        for row in order:
            longest_completion = max(longest_completion, sampling[row].max_tokens)
            if batch and (len(batch) + 1) * (len(prompts[row]) + longest_completion) > self.max_batch_tokens:
                yield batch
                batch, longest_completion = [], sampling[row].max_tokens
            batch.append(row)
        if batch:
            yield batch


class _Batch:
    """One padded batch, decoded to its end."""

    def __init__(self, prompts: list[Sequence[int]], sampling: list[Sampling], engine: PaddedEngine) -> None:
        self.prompts, self.engine = prompts, engine
        self.model, self.device = engine.model, engine._device
        room = [engine.max_positions - len(prompt) for prompt in prompts]
        self.limits = [min(item.max_tokens, left) for item, left in zip(sampling, room, strict=True)]
        self.sampler = Sampler(sampling, self.device)
        self.cache = KVCache(self.model.config.num_hidden_layers)

    def run(self) -> list[Generation]:
        """Prefill, then a token a step for every live row."""
        steps, rows = max(self.limits), len(self.prompts)
        tokens_BT = torch.zeros(rows, steps, dtype=torch.long, device=self.device)
        logprobs_BT = torch.zeros(rows, steps, device=self.device)
        lengths_B = torch.tensor(self.limits, device=self.device)
        stopped_B = torch.zeros(rows, dtype=torch.bool, device=self.device)
        alive_R = torch.arange(rows, device=self.device)  # request of each row still in the batch
        logits_RV, pad_R = self._prefill()
        for step in range(steps):
            token_R, logprob_R = self.sampler.draw(logits_RV, step)
            running_R = ~stopped_B[alive_R] & (step < lengths_B[alive_R])
            tokens_BT[alive_R, step] = torch.where(running_R, token_R, 0)
            logprobs_BT[alive_R, step] = torch.where(running_R, logprob_R, 0.0)
            ended_R = running_R & torch.isin(token_R, self.engine._stop_S)
            stopped_B[alive_R[ended_R]] = True
            lengths_B[alive_R[ended_R]] = step + 1
            keep_K = torch.nonzero(running_R & ~ended_R & (step + 1 < lengths_B[alive_R]))[:, 0]
            if len(keep_K) == 0:
                break
            if len(keep_K) < COMPACT_BELOW * len(alive_R):
                self.cache.keep(keep_K)
                self.sampler.keep(keep_K)
                alive_R, token_R, pad_R = alive_R[keep_K], token_R[keep_K], pad_R[keep_K]
            logits_RV = self._decode(token_R, pad_R)
        if not torch.isfinite(logprobs_BT).all():
            raise RuntimeError(f"the logits are not finite: bad weights? (version {self.engine.version})")
        return self._generations(tokens_BT, logprobs_BT, lengths_B, stopped_B)

    def _prefill(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits after each request's prompt and its left padding; each distinct prompt is computed once."""
        distinct = {tuple(prompt): None for prompt in self.prompts}
        index = {prompt: u for u, prompt in enumerate(distinct)}
        row_B = torch.tensor([index[tuple(prompt)] for prompt in self.prompts], device=self.device)
        width = max(map(len, distinct))
        ids_UP = torch.tensor([(0,) * (width - len(prompt)) + prompt for prompt in distinct], device=self.device)
        pad_U = torch.tensor([width - len(prompt) for prompt in distinct], device=self.device)
        column_P = torch.arange(width, device=self.device)
        real_UP = column_P >= pad_U[:, None]
        allowed_UPP = real_UP[:, None, :] & (column_P[None, :, None] >= column_P)
        positions_UP = (column_P - pad_U[:, None]).clamp_(min=0)
        logits_UV = self._forward(ids_UP, positions_UP, allowed_UPP)
        self.cache.keep(row_B)
        return logits_UV[row_B], pad_U[row_B]

    def _decode(self, token_R: torch.Tensor, pad_R: torch.Tensor) -> torch.Tensor:
        filled = self.cache.length
        allowed_R1S = (torch.arange(filled + 1, device=self.device) >= pad_R[:, None])[:, None, :]
        return self._forward(token_R[:, None], (filled - pad_R)[:, None], allowed_R1S)

    def _forward(self, ids_BQ: torch.Tensor, positions_BQ: torch.Tensor, allowed_BQS: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, V]`` at the last of Q new positions; ``allowed`` says which of S positions each may see."""
        blocked = torch.finfo(self.model.dtype).min
        mask_B1QS = torch.zeros(allowed_BQS.shape, dtype=self.model.dtype, device=self.device)
        mask_B1QS = mask_B1QS.masked_fill_(~allowed_BQS, blocked)[:, None]
        out = self.model(
            input_ids=ids_BQ,
            position_ids=positions_BQ,
            attention_mask=mask_B1QS,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache.advance(ids_BQ.shape[1])
        return out.logits[:, -1]

    def _generations(
        self, tokens_BT: torch.Tensor, logprobs_BT: torch.Tensor, lengths_B: torch.Tensor, stopped_B: torch.Tensor
    ) -> list[Generation]:
        rows = zip(
            self.prompts, tokens_BT.tolist(), logprobs_BT.tolist(), lengths_B.tolist(), stopped_B.tolist(), strict=True
        )
        return [
            Generation(
                text="",
                prompt_ids=tuple(prompt),
                token_ids=tuple(tokens[:length]),
                logprobs=tuple(logprobs[:length]),
                finish_reason="stop" if stopped else "length",
                version=self.engine.version,
            )
            for prompt, tokens, logprobs, length, stopped in rows
        ]


def _continuous(model: Any, stop_ids: frozenset[int], _: int) -> Engine:
    return ContinuousEngine(model, stop_ids)


def _padded(model: Any, stop_ids: frozenset[int], max_batch_tokens: int) -> Engine:
    return PaddedEngine(model, stop_ids, max_batch_tokens=max_batch_tokens)


BATCHING: dict[str, Callable[[Any, frozenset[int], int], Engine]] = {"padded": _padded, "continuous": _continuous}
"""Engines by name, each made of a model, its stop ids and the largest padded batch in tokens."""


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
    device: str = "auto",
    batching: str = "auto",
    max_batch_tokens: int = 65536,
    stop_ids: frozenset[int] = frozenset(),
) -> Engine:
    """The engine for a Hugging Face folder, in float32 on a CPU and in the folder's own type on cuda.

    ``batching`` is a key of ``BATCHING``, or auto: continuous on cuda, padded on a CPU. ``stop_ids`` come on top of
    those the folder names. Raises ValueError when there is no such model, device or way of batching.
    """
    from transformers import AutoModelForCausalLM

    weight_files(folder)
    device = resolve_device("rollout.device", device)
    if batching == "auto":
        batching = "continuous" if device == "cuda" else "padded"
    if batching not in BATCHING:
        raise ValueError(f"rollout.batching={batching}: allowed: auto, {', '.join(BATCHING)}")
    dtype = torch.float32 if device == "cpu" else "auto"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device).eval()
    return BATCHING[batching](model, stop_ids | stop_token_ids(folder), max_batch_tokens)
