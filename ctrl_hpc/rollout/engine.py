"""A causal language model on one device: padded batches and their cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from ctrl_hpc.records import Sampling
from ctrl_hpc.rollout.continuous import ContinuousEngine
from ctrl_hpc.rollout.decoding import Completion, Decoding, Engine, Follower, TopLogprobs, check_prompts
from ctrl_hpc.rollout.kv_cache import FILLS_A_CPU, FIXED_ROPES, REMEMBERED_BATCHES, KVCache, Recent
from ctrl_hpc.rollout.packed import PackedLinears, can_pack, float_head
from ctrl_hpc.rollout.prefill import apart, padded
from ctrl_hpc.rollout.sampler import Adjustments, Sampler
from ctrl_hpc.rollout.scoring import score_prompts
from ctrl_hpc.rollout.weights import copy_weights, cpu_has_bfloat16, stored_dtype, weight_files

_COMPACT_BELOW = 0.75
"""Finished rows are dropped from a batch when fewer than this fraction of its rows is alive."""
LENGTH, STOP, ABORT = 0, 1, 2
_FINISH: tuple[Literal["length", "stop", "abort"], ...] = ("length", "stop", "abort")
"""Why a completion ended, by its number in a batch; one that goes on is on its way to its length."""


class PaddedEngine:
    """Decodes many requests at once in left-padded batches.

    Requests are sorted by prompt length and cut into batches of at most ``max_batch_tokens`` (padding and the longest
    completion included). Equal prompts are computed once; by a large model on a CPU, what prompts begin with in common,
    too. Finished rows leave the batch. Every request has its own stream of random numbers, so that its completion does
    not depend on its batch mates, up to rounding of the logits.
    """

    def __init__(self, model: Any, stop_ids: frozenset[int], *, max_batch_tokens: int = 65536) -> None:
        self.model, self.stop_ids, self.max_batch_tokens = model, stop_ids, max_batch_tokens
        self.version = 0
        self._state: str | None = None
        self.max_positions = int(model.config.max_position_embeddings)
        self.vocabulary = int(model.config.vocab_size)
        self._device = next(model.parameters()).device
        self._recent = Recent(REMEMBERED_BATCHES * max_batch_tokens) if _takes_prompts_apart(model) else None
        packs = can_pack(model)
        self._packed = PackedLinears(model) if packs else None
        self.head = float_head(model, packed=packs)

    def load_weights(self, folder: str, version: int) -> None:
        """Replace the weights by those of a Hugging Face folder; on ValueError nothing has changed."""
        self._state = copy_weights(self.model, folder, self._state)
        self.forget()
        for copied in (self._packed, self.head):
            if copied is not None:
                copied.update()
        self.version = version

    def forget(self) -> None:
        """Keep no rows of earlier batches."""
        if self._recent is not None:
            self._recent = Recent(REMEMBERED_BATCHES * self.max_batch_tokens)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[Sampling],
        followers: Sequence[Follower] | None = None,
    ) -> list[Completion]:
        """One completion for each prompt, in order; ``text`` is empty and ``n`` must be 1.

        A completion ends at a stop token, after ``max_tokens``, where the model's positions end ("length"), or when
        its follower says so. Raises ValueError for a prompt that is empty or leaves no position for a completion.
        """
        check_prompts(prompts, self.max_positions, self.vocabulary)
        decodings = [
            replace(item, max_tokens=min(item.max_tokens, self.max_positions - len(prompt)))
            for item, prompt in zip(map(Decoding.of, sampling), prompts, strict=True)
        ]
        out: list[Completion | None] = [None] * len(prompts)
        with torch.inference_mode():
            for rows in self._batches(prompts, decodings):
                goes_along = None if followers is None else [followers[row] for row in rows]
                batch = _Batch([prompts[row] for row in rows], [decodings[row] for row in rows], goes_along, self)
                for row, completion in zip(rows, batch.run(), strict=True):
                    out[row] = completion
            scored = score_prompts(self.model, prompts, decodings, self.head)
        return [
            completion if score is None else replace(completion, prompt_logprobs=score[0], prompt_top_logprobs=score[1])
            for completion, score in zip(out, scored, strict=True)
            if completion is not None
        ]

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


def _takes_prompts_apart(model: Any) -> bool:
    """Whether a prompt keeps the device busy by itself, and its beginning is the same whatever comes after it."""
    weights = list(model.parameters())
    large = sum(weight.numel() for weight in weights) >= FILLS_A_CPU
    rope: dict[str, Any] = getattr(model.config, "rope_parameters", None) or {}
    of_layers = [one for one in rope.values() if isinstance(one, dict)] or [rope]  # one kind, or one a kind of layer
    fixed = all(one.get("rope_type", "default") in FIXED_ROPES for one in of_layers)
    return large and fixed and weights[0].device.type == "cpu"


class _Batch:
    """One padded batch, decoded to its end."""

    def __init__(
        self,
        prompts: list[Sequence[int]],
        decodings: list[Decoding],
        followers: list[Follower] | None,
        engine: PaddedEngine,
    ) -> None:
        self.prompts, self.decodings, self.followers, self.engine = prompts, decodings, followers, engine
        self.model, self.device = engine.model, engine._device
        self.limits = [item.max_tokens for item in decodings]
        self.sampler = Sampler(decodings, max(self.limits), self.device)
        self.stop_ids = [item.stop_ids(engine.stop_ids) for item in decodings]
        self.stop_tables = _StopTables(self.stop_ids, engine.stop_ids, self.device)
        self.adjustments: Adjustments | None = None
        if any(item.adjusts_logits for item in decodings):
            vocabulary = self.model.config.vocab_size
            self.adjustments = Adjustments(decodings, prompts, self.stop_ids, vocabulary, self.device)
        self.top = max(item.top_logprobs for item in decodings)
        self.tops: list[list[TopLogprobs]] = [[] for _ in prompts]
        self.cache = KVCache(self.model.config.num_hidden_layers)

    def run(self) -> list[Completion]:
        """Prefill, then a token a step for every live row."""
        steps, rows = max(self.limits), len(self.prompts)
        tokens_BT = torch.zeros(rows, steps, dtype=torch.long, device=self.device)
        logprobs_BT = torch.zeros(rows, steps, device=self.device)
        lengths_B = torch.tensor(self.limits, device=self.device)
        ends_B = torch.full((rows,), LENGTH, device=self.device)
        alive_R = torch.arange(rows, device=self.device)  # request of each row still in the batch
        if steps == 0:
            return self._completions(tokens_BT, logprobs_BT, lengths_B, ends_B)
        logits_RV, real_RP = self._prefilled()
        for step in range(steps):
            if self.adjustments is not None:
                logits_RV = self.adjustments.apply(logits_RV, step)
            token_R, logprob_R, logprobs_RV = self.sampler.draw(logits_RV, step)
            running_R = (ends_B[alive_R] == LENGTH) & (step < lengths_B[alive_R])
            tokens_BT[alive_R, step] = torch.where(running_R, token_R, 0)
            logprobs_BT[alive_R, step] = torch.where(running_R, logprob_R, 0.0)
            ended_R = running_R & self.stop_tables.ends(token_R, alive_R)
            if self.adjustments is not None:
                self.adjustments.note(token_R)
            if self.top:
                self._note_top(logprobs_RV, alive_R, running_R)
            ends_B[alive_R[ended_R]] = STOP
            if self.followers is not None:
                ended_R |= self._follow(token_R, logprob_R, alive_R, running_R, ends_B)
            lengths_B[alive_R[ended_R]] = step + 1
            keep_K = torch.nonzero(running_R & ~ended_R & (step + 1 < lengths_B[alive_R]))[:, 0]
            if len(keep_K) == 0:
                self._remember(range(len(alive_R)), alive_R, real_RP, tokens_BT, lengths_B)
                break
            if len(keep_K) < _COMPACT_BELOW * len(alive_R):
                left = set(range(len(alive_R))) - set(keep_K.tolist())
                self._remember(sorted(left), alive_R, real_RP, tokens_BT, lengths_B)
                self.cache.keep(keep_K)
                self.sampler.keep(keep_K)
                if self.adjustments is not None:
                    self.adjustments.keep(keep_K)
                alive_R, token_R, real_RP = alive_R[keep_K], token_R[keep_K], real_RP[keep_K]
            logits_RV = self._decode(token_R, real_RP)
        if not torch.isfinite(logprobs_BT).all():
            raise RuntimeError(f"the logits are not finite: bad weights? (version {self.engine.version})")
        return self._completions(tokens_BT, logprobs_BT, lengths_B, ends_B)

    def _remember(
        self,
        leaving: Iterable[int],
        alive_R: torch.Tensor,
        real_RP: torch.Tensor,
        tokens_BT: torch.Tensor,
        lengths_B: torch.Tensor,
    ) -> None:
        """Note the caches of these of the rows, which have all but the last of their tokens."""
        if self.engine._recent is None:
            return
        for row in leaving:
            request = int(alive_R[row])
            drawn = int(lengths_B[request]) - 1
            later_N = torch.arange(real_RP.shape[1], real_RP.shape[1] + drawn, device=self.device)
            columns_N = torch.cat([torch.nonzero(real_RP[row])[:, 0], later_N])
            tokens = (*self.prompts[request], *tokens_BT[request, :drawn].tolist())
            self.engine._recent.note(tokens, self.cache.row(row, columns_N))

    def _note_top(self, logprobs_RV: torch.Tensor, alive_R: torch.Tensor, running_R: torch.Tensor) -> None:
        values_RK, ids_RK = logprobs_RV.topk(self.top, dim=-1)
        lists = zip(alive_R.tolist(), running_R.tolist(), ids_RK.tolist(), values_RK.tolist(), strict=True)
        for row, running, ids, values in lists:
            if running:
                self.tops[row].append(tuple(zip(ids, values, strict=True))[: self.decodings[row].top_logprobs])

    def _follow(
        self,
        token_R: torch.Tensor,
        logprob_R: torch.Tensor,
        alive_R: torch.Tensor,
        running_R: torch.Tensor,
        ends_B: torch.Tensor,
    ) -> torch.Tensor:
        """Tell the followers of their tokens; which rows they end, noted in ``ends_B``."""
        assert self.followers is not None
        ended_R = torch.zeros_like(running_R)
        if not any(follower.watches or follower.aborted for follower in self.followers):
            return ended_R
        lists = zip(alive_R.tolist(), running_R.tolist(), token_R.tolist(), logprob_R.tolist(), strict=True)
        for index, (row, running, token, logprob) in enumerate(lists):
            follower = self.followers[row]
            if not running:
                continue
            top = self.tops[row][-1] if self.tops[row] else ()
            ends = STOP if follower.watches and follower.token(token, logprob, top) else LENGTH
            if follower.aborted and ends == LENGTH and int(ends_B[row]) == LENGTH:
                ends = ABORT
            if ends != LENGTH:
                ends_B[row], ended_R[index] = ends, True
        return ended_R

    def _prefilled(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits after each request's prompt, and its columns of the cache; each distinct prompt is computed once."""
        distinct = {tuple(prompt): None for prompt in self.prompts}
        index = {prompt: u for u, prompt in enumerate(distinct)}
        row_B = torch.tensor([index[tuple(prompt)] for prompt in self.prompts], device=self.device)
        layers = self.model.config.num_hidden_layers
        recent, asked = self.engine._recent, (self._forward, layers, list(distinct), self.device)
        self.cache, last_U, real_UP = padded(*asked) if recent is None else apart(*asked, recent)
        self.cache.keep(row_B)
        return self._logits(last_U)[row_B], real_UP[row_B]

    def _decode(self, token_R: torch.Tensor, real_RP: torch.Tensor) -> torch.Tensor:
        later = self.cache.length + 1 - real_RP.shape[1]
        allowed_R1S = torch.cat([real_RP, real_RP.new_ones(len(real_RP), later)], dim=1)[:, None]
        positions_R1 = real_RP.sum(dim=1, keepdim=True) + (later - 1)
        return self._logits(self._forward(self.cache, token_R[:, None], positions_R1, allowed_R1S))

    def _forward(
        self, cache: KVCache, ids_BQ: torch.Tensor, positions_BQ: torch.Tensor, allowed_BQS: torch.Tensor
    ) -> torch.Tensor:
        """The last hidden state ``[B, D]`` where the engine has its own head, else logits ``[B, V]``."""
        blocked = torch.finfo(self.model.dtype).min
        mask_B1QS = torch.zeros(allowed_BQS.shape, dtype=self.model.dtype, device=self.device)
        mask_B1QS = mask_B1QS.masked_fill_(~allowed_BQS, blocked)[:, None]
        inputs = {
            "input_ids": ids_BQ,
            "position_ids": positions_BQ,
            "attention_mask": mask_B1QS,
            "past_key_values": cache,
            "use_cache": True,
        }
        if self.engine.head is None:
            last_B: torch.Tensor = self.model(**inputs, logits_to_keep=1).logits[:, -1]
        else:
            last_B = self.model.base_model(**inputs).last_hidden_state[:, -1]
        cache.advance(ids_BQ.shape[1])
        return last_B

    def _logits(self, last_B: torch.Tensor) -> torch.Tensor:
        head = self.engine.head
        return last_B if head is None else head(last_B)

    def _completions(
        self, tokens_BT: torch.Tensor, logprobs_BT: torch.Tensor, lengths_B: torch.Tensor, ends_B: torch.Tensor
    ) -> list[Completion]:
        rows = zip(tokens_BT.tolist(), logprobs_BT.tolist(), lengths_B.tolist(), ends_B.tolist(), strict=True)
        return [
            Completion(
                text="",
                prompt_ids=tuple(self.prompts[row]),
                token_ids=tuple(tokens[:length]),
                logprobs=tuple(logprobs[:length]),
                finish_reason=_FINISH[end],
                version=self.engine.version,
                top_logprobs=tuple(self.tops[row]),
                matched=tokens[length - 1] if end == STOP and tokens[length - 1] in self.stop_ids[row] else None,
            )
            for row, (tokens, logprobs, length, end) in enumerate(rows)
        ]


class _StopTables:
    """Which tokens end which rows."""

    def __init__(self, stop_ids: Sequence[frozenset[int]], of_model: frozenset[int], device: torch.device) -> None:
        self._same = all(ids == of_model for ids in stop_ids)
        widest = len(of_model) if self._same else max(map(len, stop_ids))
        lists = [sorted(of_model)] if self._same else [sorted(ids) for ids in stop_ids]
        padded = [ids + [-1] * (widest - len(ids)) for ids in lists]
        self._ids_BS = torch.tensor(padded, dtype=torch.long, device=device).view(len(lists), widest)

    def ends(self, token_R: torch.Tensor, rows_R: torch.Tensor) -> torch.Tensor:
        """Whether each row's token is one of its stop tokens; ``rows``: the requests of the rows."""
        ids_RS = self._ids_BS if self._same else self._ids_BS[rows_R]
        return (token_R[:, None] == ids_RS).any(dim=-1)


def _continuous(model: Any, stop_ids: frozenset[int], _: int) -> Engine:
    return ContinuousEngine(model, stop_ids)


def _padded(model: Any, stop_ids: frozenset[int], max_batch_tokens: int) -> Engine:
    return PaddedEngine(model, stop_ids, max_batch_tokens=max_batch_tokens)


_BATCHING: dict[str, Callable[[Any, frozenset[int], int], Engine]] = {"padded": _padded, "continuous": _continuous}
"""Engines by name, each made of a model, its stop ids and the largest padded batch in tokens."""


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Weights and activations by name."""


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
    they multiply it, else float32. ``batching`` is a key of ``_BATCHING``, or auto: continuous on cuda, padded on a
    CPU. ``stop_ids`` come on top of those the folder names. Raises ValueError when there is no such model, device, type
    or way of batching.
    """
    from transformers import AutoModelForCausalLM

    weight_files(folder)
    if batching == "auto":
        batching = "continuous" if device == "cuda" else "padded"
    if batching not in _BATCHING:
        raise ValueError(f"rollout.batching={batching}: allowed: auto, {', '.join(_BATCHING)}")
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"rollout.dtype={dtype}: allowed: auto, {', '.join(DTYPES)}")
    if dtype == "auto" and device == "cpu":
        dtype = "bfloat16" if stored_dtype(folder) == "BF16" and cpu_has_bfloat16() else "float32"
    kind = DTYPES.get(dtype, "auto")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, attn_implementation="sdpa").to(device).eval()
    return _BATCHING[batching](model, stop_ids | stop_token_ids(folder), max_batch_tokens)
