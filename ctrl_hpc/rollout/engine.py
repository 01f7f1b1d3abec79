"""The model behind a rollout server.

Two engines with one interface (``ctrl_hpc.protocols.Engine``): on a CPU, large padded batches sorted by length pay;
on a GPU, continuous batching does (``ctrl_hpc.rollout.continuous``).

Shapes: U distinct prompts, B requests (rows) of a batch, P prompt positions (padded), S positions so far, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ctrl_hpc.protocols import Engine
from ctrl_hpc.records import Generation, Sampling
from ctrl_hpc.rollout.continuous import ContinuousEngine
from ctrl_hpc.rollout.kv_cache import KVCache
from ctrl_hpc.rollout.request import check_prompts
from ctrl_hpc.rollout.sampler import Sampler
from ctrl_hpc.rollout.weights import copy_weights, weight_files

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
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("rollout.device=cuda, but this machine has no usable CUDA device; allowed: auto, cpu, cuda")
    if batching == "auto":
        batching = "continuous" if device == "cuda" else "padded"
    if batching not in BATCHING:
        raise ValueError(f"rollout.batching={batching}: allowed: auto, {', '.join(BATCHING)}")
    dtype = torch.float32 if device == "cpu" else "auto"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").to(device).eval()
    return BATCHING[batching](model, stop_ids | stop_token_ids(folder), max_batch_tokens)
