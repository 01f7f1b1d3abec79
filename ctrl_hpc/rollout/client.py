"""The rollout array as a ``Generator``: chats in, completions out, whichever servers live or die meanwhile."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ctrl_hpc.records import Chat, Critique, Generation, Sampling
from ctrl_hpc.rollout.chat import chat_ids, room_after
from ctrl_hpc.rollout.choices import Choices
from ctrl_hpc.rollout.confidence import judgement_probability
from ctrl_hpc.rollout.thinking import (
    CLOSED_BY_FORCE,
    Thinking,
    opens_thought,
    too_long,
    within_budget,
    without_thought,
)
from ctrl_hpc.seeds import derive_seed
from ctrl_hpc.service.fleet import Chunk, Fleet
from ctrl_hpc.service.json_client import Busy, Fault, Lost

_MAX_FAULTS = 5
"""A batch that this many servers answered with an internal error is not tried again."""


class Aborted(Lost):
    """A server ended completions before they were done: it was told to, or paused."""


type Request = tuple[list[int], dict[str, Any]]
"""A prompt's token ids and its sampling parameters."""


class RolloutClient:
    """Spreads completions over the live servers of an array.

    Work starts with the first server, grows with each that comes, and what a lost server had in hand is given to
    another. After ``update_weights`` only answers of that version count; a server that registers later, or was
    restarted, loads it first. Calls may come from several threads: each gives a server one request at a time.
    ``update_weights`` comes between calls.

    Seeded completions do not depend on which server, or which batch, decodes them: completion j of chat i has the
    seed ``derive_seed(sampling.seed, i, j)``, chats counted by ``sampling.number``.
    """

    def __init__(
        self,
        endpoints: Callable[[], Sequence[str]],
        tokenizer: Any,
        *,
        max_in_flight: int = 512,
        patience_s: float = 600.0,
        timeout_s: float = 3600.0,
        role: str = "rollout",
        token: str | None = None,
        thinking: Thinking | None = None,
    ) -> None:
        """``max_in_flight``: completions a call asks of a server at a time; ``patience_s``: longest time without an
        answer of any; ``timeout_s``: of one request; ``token``: bearer token of the servers; ``thinking``: None: as the
        template does of itself.

        Raises ValueError where the tokenizer's template cannot do what ``thinking`` asks.
        """
        self._thinking = thinking or Thinking()
        if tokenizer is not None:
            self._thinking.check(tokenizer, f"{role}.thinking" if role == "critic" else f"{role}_thinking")
        self._fleet = Fleet(f"{role} server", endpoints, token=token, patience_s=patience_s, timeout_s=timeout_s)
        self._tokenizer, self._max_in_flight = tokenizer, max_in_flight
        self._patience_s = patience_s
        self._tokenizing = threading.Lock()
        """A tokenizer is for one thread at a time."""
        self._folder: str | None = None
        self._held: dict[str, int] = {}
        """The weight version that a server is known to hold."""
        self._loading: dict[str, asyncio.Lock] = {}
        self.version = 0
        """The last weight version handed to ``update_weights``."""

    def complete(self, chats: Sequence[Chat], sampling: Sampling) -> list[list[Generation]]:
        """``sampling.n`` completions for each chat, in order.

        What a server aborts is asked again. Raises RuntimeError when no server answers for ``patience_s``, servers
        keep failing, or abort everything for so long; ValueError when a server refuses the request.
        """
        if not chats:
            return []
        with self._tokenizing:
            prompts: list[list[int]] = [
                chat_ids(
                    self._tokenizer,
                    chat,
                    continue_final_message=chat[-1].role == "assistant",
                    **self._thinking.switch,
                )
                for chat in chats
            ]
        asked = replace(sampling, max_tokens=sampling.max_tokens + self._thinking.room)
        requests = [
            (prompt, _parameters(asked, None if seed is None else derive_seed(seed, sampling.number(i), j)))
            for seed in [sampling.seed]
            for i, prompt in enumerate(prompts)
            for j in range(sampling.n)
        ]
        flat = self._without_thoughts(requests, sampling, self._answers(requests))
        return [flat[i * sampling.n : (i + 1) * sampling.n] for i in range(len(chats))]

    def extend(
        self,
        chats: Sequence[Chat],
        begun: Sequence[Generation],
        text: str,
        sampling: Sequence[Sampling],
        choices: Sequence[str] = (),
    ) -> list[Generation]:
        """Each completion, ``text``, and what follows, as one: the tokens so far are kept, but for an end of turn.

        One completion each, by its sampling's own seed. Of ``choices`` one is drawn, by the token that decides, whose
        log-prob is among them; where it is cut by ``top_p`` and the like, too. Errors as :meth:`complete`, and
        ValueError for a text that leaves no token.
        """
        with self._tokenizing:
            follow = Choices.of(self._tokenizer, text, choices)
            special = frozenset(self._tokenizer.all_special_ids)
        room = room_after(text, follow.n_tokens, [how.max_tokens for how in sampling])
        open_ended = [_without_end(item, special) for item in begun]
        only = {"logit_bias": {str(token): bias for token, bias in follow.biases}, "max_new_tokens": 1}
        requests = [
            (
                [*item.prompt_ids, *item.token_ids, *follow.forced],
                _parameters(replace(how, max_tokens=left), how.seed) | (only if choices else {}),
            )
            for item, how, left in zip(open_ended, sampling, room, strict=True)
        ]
        answers = [follow.whole(rest) for rest in self._answers(requests)]
        return [_joined(item, text, follow.forced, rest) for item, rest in zip(open_ended, answers, strict=True)]

    def probability(self, found: Critique, prefix: str) -> float | None:
        """As :class:`ctrl_hpc.records.Confident` says, by the verdict's own token: servers tell of no others."""
        with self._tokenizing:
            return judgement_probability(found, prefix, self._tokenizer)

    def _without_thoughts(
        self, requests: Sequence[Request], sampling: Sampling, answers: Sequence[Generation]
    ) -> list[Generation]:
        """The answers alone; where asked for, thoughts beyond their budget are ended by force and then answered.

        Not those that ended for want of positions: nothing can follow them.
        """
        out = list(answers)
        with self._tokenizing:
            opened = [opens_thought(self._tokenizer, prompt) for prompt, _ in requests]
            cut = [
                row
                for row, item in enumerate(answers)
                if self._thinking.close
                and too_long(item, self._thinking.tokens, opened=opened[row], tokenizer=self._tokenizer)
                and not (item.finish_reason == "length" and len(item.token_ids) <= self._thinking.tokens)
            ]
            closing = tuple(self._tokenizer(CLOSED_BY_FORCE, add_special_tokens=False)["input_ids"])
            special = frozenset(self._tokenizer.all_special_ids)
            begun = [
                within_budget(_without_end(answers[row], special), self._thinking.tokens, self._tokenizer)
                for row in cut
            ]
        again = []
        for row, item in zip(cut, begun, strict=True):
            seed = None if sampling.seed is None else derive_seed(requests[row][1]["sampling_seed"], 1)
            again.append(([*item.prompt_ids, *item.token_ids, *closing], _parameters(sampling, seed)))
        for row, item, rest in zip(cut, begun, self._answers(again) if again else [], strict=True):
            out[row] = _joined(item, CLOSED_BY_FORCE, closing, rest)
        with self._tokenizing:
            return [
                without_thought(item, opened=opened[row], tokenizer=self._tokenizer) for row, item in enumerate(out)
            ]

    def _answers(self, requests: Sequence[Request]) -> list[Generation]:
        """The answers to requests, in order, by whichever servers live."""
        answers: dict[int, Generation] = {}
        aborts: list[float] = []
        """When servers aborted completions, since the last answer."""
        wanted = self.version if self._folder is not None else None

        def cut(servers: int) -> list[Chunk]:
            rows = range(len(requests))
            size = min(self._max_in_flight, -(-len(rows) // max(1, servers)))
            return [Chunk(list(rows[at : at + size])) for at in rows[::size]]

        async def ask(url: str, chunk: Chunk) -> list[Chunk]:
            found = await self._ask(url, [requests[row] for row in chunk.rows], wanted)
            answers.update(zip(chunk.rows, found, strict=True))
            aborts.clear()
            return []

        def lost(chunk: Chunk, error: Exception) -> list[Chunk]:
            if not isinstance(error, Lost):
                raise error
            if isinstance(error, Aborted):
                aborts.append(time.monotonic())
                if len(aborts) >= _MAX_FAULTS and aborts[-1] - aborts[0] > self._patience_s:
                    raise RuntimeError(f"for {self._patience_s:.0f} s servers have aborted whatever they did: {error}")
            losses = chunk.losses + isinstance(error, Fault)  # one that died took no notice of what it was asked
            if losses >= _MAX_FAULTS:
                raise RuntimeError(f"servers keep failing: {error}")
            return [Chunk(chunk.rows, losses)]

        self._fleet.spread(cut, ask, lost)
        return [answers[row] for row in range(len(requests))]

    def update_weights(self, folder: str, version: int) -> int:
        """Let every live server load a Hugging Face folder; returns how many did.

        Servers that cannot be reached now load it before they are asked again. Raises ValueError when a server
        refuses the weights.
        """
        self._folder, self.version = str(Path(folder).resolve()), version
        return self._fleet.everyone(self._bring_up_to_date)

    def close(self) -> None:
        """Close the connections; calls in flight in other threads are cancelled."""
        self._fleet.close()

    async def _ask(self, url: str, requests: Sequence[Request], wanted: int | None) -> list[Generation]:
        """One ``/generate`` request, after the wanted weights are loaded there."""
        body = {
            "input_ids": [prompt for prompt, _ in requests],
            "sampling_params": [parameters for _, parameters in requests],
            "return_logprob": True,
        }
        try:
            await self._bring_up_to_date(url)
            out = _generations(url, requests, await self._fleet.post(url, "/generate", json.dumps(body)))
            if any(item.finish_reason == "abort" for item in out):
                raise Aborted(f"{url} aborted completions")
            if wanted is not None and any(item.version != wanted for item in out):
                raise Fault(f"{url} answered with other weights than version {wanted}")
        except Aborted:
            raise  # the server has its weights still
        except (Busy, Lost, asyncio.CancelledError):
            self._held.pop(url, None)
            raise
        return out

    async def _bring_up_to_date(self, url: str) -> None:
        async with self._loading.setdefault(url, asyncio.Lock()):
            folder, version = self._folder, self.version
            if folder is None or self._held.get(url) == version:
                return
            body = {"model_path": folder, "weight_version": str(version)}
            await self._fleet.post(url, "/update_weights_from_disk", json.dumps(body))
            self._held[url] = version


def _without_end(begun: Generation, special: frozenset[int]) -> Generation:
    """A completion without the control tokens that end it."""
    ids = begun.token_ids
    while ids and ids[-1] in special:
        ids = ids[:-1]
    return replace(begun, token_ids=ids, logprobs=begun.logprobs[: len(ids)])


def _joined(begun: Generation, text: str, forced: tuple[int, ...], rest: Generation) -> Generation:
    start = len(begun.token_ids)
    return replace(
        rest,
        text=begun.text + text + rest.text,
        prompt_ids=begun.prompt_ids,
        token_ids=(*begun.token_ids, *forced, *rest.token_ids),
        logprobs=(*begun.logprobs, *(0.0 for _ in forced), *rest.logprobs),
        forced=(start, start + len(forced)),
        thought=begun.thought,
        thought_tokens=begun.thought_tokens,
    )


def _parameters(sampling: Sampling, seed: int | None) -> dict[str, Any]:
    """SGLang's parameters; those that change nothing are named, because a server may have other defaults."""
    out: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "max_new_tokens": sampling.max_tokens,
    }
    if seed is not None:
        out["sampling_seed"] = seed
    return out


def _generations(url: str, requests: Sequence[Request], answers: Any) -> list[Generation]:
    try:
        return [_generation(prompt, answer) for (prompt, _), answer in zip(requests, answers, strict=True)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Fault(f"{url}: malformed answer: {type(error).__name__}: {error}") from None


def _generation(prompt: list[int], answer: dict[str, Any]) -> Generation:
    meta = answer["meta_info"]
    version = str(meta.get("weight_version", 0))
    triples = meta.get("output_token_logprobs") or []
    return Generation(
        text=answer["text"],
        prompt_ids=tuple(prompt),
        token_ids=tuple(answer.get("output_ids") or [token for _, token, *_ in triples]),
        logprobs=tuple(float(logprob) for logprob, *_ in triples),
        finish_reason=meta["finish_reason"]["type"],
        version=int(version) if version.isdigit() else 0,
    )
