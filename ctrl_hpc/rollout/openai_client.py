"""Any OpenAI-compatible endpoint as a ``Generator``: vLLM, SGLang, or a commercial API."""

from __future__ import annotations

import asyncio
import os
import random
import re
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import httpx

from ctrl_hpc.jsonl import well_formed
from ctrl_hpc.records import Chat, Generation, Message, Sampling
from ctrl_hpc.rollout.thinking import CLOSE, Thinking, split
from ctrl_hpc.seeds import derive_seed
from ctrl_hpc.service.fleet import LoopThread

_FINISH = {"stop": "stop", "length": "length", "eos": "stop"}
_NO_ANSWER = (ValueError, LookupError, TypeError, AttributeError)
"""What reading an answer raises that holds no completion: an error in its place, a page, nothing."""
_REFUSES_SEVERAL = re.compile(
    r"""["'`]n["'`]|\bn\b\s*(?:=|>|must|should|is|has|parameter)|\bmultiple (?:choices|completions)"""
)
"""How an endpoint says that it gives one completion at a time."""
_RETRIED = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
_UNREACHABLE_S = 4.0
"""An endpoint that has never answered is given up when it cannot be connected to for so long."""
_SHOWN_CHARACTERS = 300
"""Of an answer that is no completion, what is told."""


@dataclass(slots=True)
class Usage:
    """What the endpoint says was used, and its price."""

    requests: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    """In the currency of the prices given."""


class OpenAIGenerator:
    """Asks ``URL/chat/completions``, a request a chat, many at once.

    Calls may come from several threads: they share the limits. Rate limits and server faults are retried with
    exponential back-off and full jitter, ``Retry-After`` respected.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key_env: str = "OPENAI_API_KEY",
        max_in_flight: int = 32,
        requests_per_min: float | None = None,
        max_tries: int = 8,
        timeout_s: float = 600.0,
        price_in: float = 0.0,
        price_out: float = 0.0,
        thinking: Thinking | None = None,
    ) -> None:
        """``url`` is the endpoint's base (with or without ``/v1``); prices are for a million tokens."""
        base = url.rstrip("/")
        self._url = f"{base if base.endswith('/v1') else base + '/v1'}/chat/completions"
        self._model, self._key_env, self._max_tries = model, key_env, max_tries
        self._slots = asyncio.Semaphore(max_in_flight)
        self._interval_s = 60.0 / requests_per_min if requests_per_min else 0.0
        self._next_start = 0.0
        self._limit_name = "max_tokens"
        self._singly = False
        self._reached = False
        self._prices = (price_in, price_out)
        self._thinking = thinking or Thinking()
        self._jitter = random.Random()
        self._lock = threading.Lock()
        self.usage = Usage()
        """Totals since the generator was made."""
        key = os.environ.get(key_env)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._thread = LoopThread("openai-client")
        self._http = httpx.AsyncClient(timeout=httpx.Timeout(timeout_s, connect=_UNREACHABLE_S), headers=headers)

    def complete(self, chats: Sequence[Chat], sampling: Sampling) -> list[list[Generation]]:
        """``sampling.n`` completions for each chat, in order.

        Raises ValueError when the endpoint refuses a request, RuntimeError when it keeps failing.
        """
        seeds = [
            None if sampling.seed is None else derive_seed(sampling.seed, sampling.number(i)) for i in range(len(chats))
        ]
        bodies = [self._body(seed, chat, sampling) for seed, chat in zip(seeds, chats, strict=True)]
        return self._thread.run(self._every(bodies))

    def extend(
        self,
        chats: Sequence[Chat],
        begun: Sequence[Generation],
        text: str,
        sampling: Sequence[Sampling],
        choices: Sequence[str] = (),
    ) -> list[Generation]:
        """Each completion, ``text``, and what follows, as one; for endpoints that continue a message (vLLM, SGLang).

        One completion each, by its sampling's own seed; ``choices`` are left to the model, whose tokens are not known.
        Errors as :meth:`complete`.
        """
        longer = [_with_answer(chat, item.text + text) for chat, item in zip(chats, begun, strict=True)]
        bodies = [self._body(how.seed, chat, replace(how, n=1)) for chat, how in zip(longer, sampling, strict=True)]
        rests = [generations[0] for generations in self._thread.run(self._every(bodies))]
        return [
            replace(rest, text=item.text + text + rest.text, thought=item.thought)
            for item, rest in zip(begun, rests, strict=True)
        ]

    def close(self) -> None:
        """Close the connections; calls in flight in other threads are cancelled."""
        self._thread.close(self._http.aclose())

    def spent(self) -> dict[str, float]:
        """The totals so far, under the names of metrics."""
        with self._lock:
            usage = self.usage
            return {
                "generator/requests": float(usage.requests),
                "generator/retries": float(usage.retries),
                "generator/prompt_tokens": float(usage.prompt_tokens),
                "generator/completion_tokens": float(usage.completion_tokens),
                "generator/cost": usage.cost,
            }

    async def _every(self, bodies: Sequence[dict[str, Any]]) -> list[list[Generation]]:
        async def one(body: dict[str, Any]) -> list[Generation]:
            async with self._slots:
                return await self._one(body)

        tasks = [asyncio.create_task(one(body)) for body in bodies]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    def _body(self, seed: int | None, chat: Chat, sampling: Sampling) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": message.role, "content": message.content} for message in chat],
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens + self._thinking.room,
            "n": sampling.n,
        }
        if self._thinking.switch:
            body["chat_template_kwargs"] = self._thinking.switch
        if seed is not None:
            body["seed"] = seed
        if chat[-1].role == "assistant":
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        return body

    async def _one(self, body: dict[str, Any]) -> list[Generation]:
        """The ``n`` completions of a request; asked for one by one where the endpoint refuses or ignores ``n``."""
        found = await self._ask(body) if body["n"] == 1 or not self._singly else []
        while len(found) < body["n"]:
            one = body | {"n": 1}
            if "seed" in body:
                one["seed"] = derive_seed(body["seed"], len(found))
            found += await self._ask(one)
        return found[: body["n"]]

    async def _ask(self, body: dict[str, Any]) -> list[Generation]:
        """One request's completions: at least one, or none where several at a time are refused."""
        attempt, started = 0, time.monotonic()
        while attempt < self._max_tries:
            await self._wait_turn()
            sent = self._named(body)
            try:
                response = await self._http.post(self._url, json=sent)
            except httpx.TransportError as error:
                problem, wait_s = f"{type(error).__name__}: {error}", 0.0
                unconnected = isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout))
                if unconnected and not self._reached and time.monotonic() - started + 0.5 * 2**attempt > _UNREACHABLE_S:
                    raise RuntimeError(f"{self._url} cannot be reached: {problem}") from None
            else:
                self._reached = True
                problem, wait_s = f"HTTP {response.status_code}: {_line(response.text)}", 0.0
                if response.status_code < 300:
                    try:
                        return self._read(response.json())
                    except _NO_ANSWER:
                        problem += " (no completion)"
                elif self._learns(response, sent):
                    if self._singly and body["n"] > 1:
                        return []
                    continue
                else:
                    wait_s = self._wait_s(response, problem)
            attempt += 1
            if attempt < self._max_tries:
                with self._lock:
                    self.usage.retries += 1
                await asyncio.sleep(wait_s + self._jitter.uniform(0.0, min(60.0, 0.25 * 2**attempt)))
        problem = " ".join(problem.split())
        raise RuntimeError(f"{self._url} failed {self._max_tries} times; the last answer: {problem}")

    def _named(self, body: dict[str, Any]) -> dict[str, Any]:
        """The request, with its limit under the name that the endpoint takes."""
        return {self._limit_name if name == "max_tokens" else name: value for name, value in body.items()}

    def _learns(self, response: httpx.Response, sent: dict[str, Any]) -> bool:
        """Whether a refusal tells of a form of the request that the endpoint takes instead, which is then used."""
        if response.status_code not in (400, 422):
            return False
        if "max_completion_tokens" in response.text and "max_tokens" in sent:
            self._limit_name = "max_completion_tokens"
            return True
        if sent["n"] > 1 and _REFUSES_SEVERAL.search(response.text):
            self._singly = True
            return True
        return False

    def _wait_s(self, response: httpx.Response, problem: str) -> float:
        """Seconds to wait before asking again; raises ValueError where that is of no use."""
        if response.status_code in (401, 403):
            raise ValueError(f"{self._url}: {problem}; the key is read from ${self._key_env}")
        if response.status_code not in _RETRIED:
            raise ValueError(f"{self._url}: {problem}")
        return _retry_after(response)

    async def _wait_turn(self) -> None:
        """Keep to the rate limit: requests start at least ``60 / requests_per_min`` seconds apart."""
        with self._lock:
            start = max(time.monotonic(), self._next_start)
            self._next_start = start + self._interval_s
        await asyncio.sleep(max(0.0, start - time.monotonic()))

    def _generation(self, choice: Any) -> Generation:
        """The answer of a choice; its thought, which a server may have put in a field of its own, beside."""
        if choice.get("finish_reason") == "abort":
            raise ValueError("aborted by the server")
        message, finish = choice["message"], _FINISH.get(str(choice.get("finish_reason")), "abort")
        text = _text(message.get("content"))
        thought = _text(message.get("reasoning_content") or message.get("reasoning")) or None
        cut = thought is not None and not text and finish == "length"
        if thought is None:
            within = self._thinking.mode == "on" and finish == "length" and CLOSE not in text
            thought, text, cut = split(text, opened=within, thinks=True)
        return Generation(text=text, finish_reason=finish, thought=thought, thought_cut=cut)  # type: ignore[arg-type]

    def _read(self, data: Any) -> list[Generation]:
        """The completions of an answer; raises what :data:`_NO_ANSWER` holds for what is none."""
        choices = sorted(data["choices"], key=lambda choice: choice.get("index") or 0)
        found = [self._generation(choice) for choice in choices]
        if not found:
            raise ValueError("no choices")
        used = data.get("usage") or {}
        tokens = (int(used.get("prompt_tokens") or 0), int(used.get("completion_tokens") or 0))
        with self._lock:
            self.usage.requests += 1
            self.usage.prompt_tokens += tokens[0]
            self.usage.completion_tokens += tokens[1]
            self.usage.cost += sum(count * price / 1e6 for count, price in zip(tokens, self._prices, strict=True))
        return found


def _text(content: Any) -> str:
    """A message's content: text, or a list of parts of which those of text count; such that it can be sent again."""
    if isinstance(content, list):
        content = "".join(part.get("text") or "" for part in content)
    if not isinstance(content, str | None):
        raise TypeError(f"content: {type(content).__name__}")
    return well_formed(content or "")


def _line(text: str) -> str:
    """An answer in one line, its beginning when it is long (an HTML page)."""
    return " ".join(text.split())[:_SHOWN_CHARACTERS]


def _with_answer(chat: Chat, text: str) -> Chat:
    """The chat with an answer that is open; one that it ends with already is longer then."""
    if chat[-1].role == "assistant":
        return (*chat[:-1], Message(role="assistant", content=chat[-1].content + text))
    return (*chat, Message(role="assistant", content=text))


def _retry_after(response: httpx.Response) -> float:
    """Seconds the endpoint asks to wait; 0 when it does not say."""
    value = response.headers.get("retry-after", "")
    return min(120.0, float(value)) if value.replace(".", "", 1).isdigit() else 0.0
