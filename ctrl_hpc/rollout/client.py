"""The rollout array as a ``Generator``: chats in, completions out, whichever servers live or die meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from ctrl_hpc.records import Chat, Generation, Sampling
from ctrl_hpc.rollout.chat import chat_ids
from ctrl_hpc.rollout.openai_client import OpenAIGenerator
from ctrl_hpc.seeds import derive_seed
from ctrl_hpc.service.fleet import LoopThread, Pulse

__all__ = ["OpenAIGenerator", "RolloutClient"]

POLL_S = 0.5
"""Seconds between looks at which servers are alive."""
COOL_DOWN_S = (0.5, 8.0)
"""Shortest and longest time a server that failed is not asked; it doubles with every failure in a row."""
MAX_FAULTS = 5
"""A batch that this many servers answered with an internal error is not tried again."""


@dataclass(slots=True)
class _Chunk:
    """Requests that travel together: rows of the answer, prompts and sampling parameters."""

    rows: list[int]
    faults: int = 0


@dataclass(slots=True)
class _Server:
    """What the client knows of an endpoint."""

    version: int | None = None
    """Weight version it is known to hold."""
    failures: int = 0
    not_before: float = 0.0
    in_hand: int = 0
    """Requests that it answers now, of all calls."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class _Fault(Exception):
    """A server answered with an internal error, or with weights of another version."""


class RolloutClient:
    """Spreads completions over the live servers of an array.

    ``endpoints`` is asked anew all the time: work starts with the first server, grows with each that comes, and what
    a lost server had in hand is given to another. After ``update_weights`` only answers of that version count; a
    server that registers later, or was restarted, loads it first. Calls may come from several threads: each gives a
    server one request at a time, the least loaded server first. ``update_weights`` comes between calls.

    Seeded completions do not depend on which server, or which batch, decodes them: completion j of chat i has the
    seed ``derive_seed(sampling.seed, i, j)``, chats counted from ``sampling.first``.
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
    ) -> None:
        """``max_in_flight``: completions a call asks of a server at a time; ``patience_s``: longest time without a
        server; ``token``: bearer token of the servers."""
        self._endpoints, self._tokenizer, self._role = endpoints, tokenizer, role
        self._tokenizing = threading.Lock()
        """A tokenizer is for one thread at a time."""
        self._max_in_flight, self._patience_s = max_in_flight, patience_s
        self._servers: dict[str, _Server] = {}
        self._folder: str | None = None
        self.version = 0
        """The last weight version handed to ``update_weights``."""
        self._thread = LoopThread(f"{role}-client")
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)
        headers = {"authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(timeout_s, connect=5.0), limits=limits, headers=headers, trust_env=False
        )

    def complete(self, chats: Sequence[Chat], sampling: Sampling) -> list[list[Generation]]:
        """``sampling.n`` completions for each chat, in order.

        Raises RuntimeError when no server is alive for ``patience_s`` or servers keep failing, ValueError when a
        server refuses the request.
        """
        if not chats:
            return []
        with self._tokenizing:
            prompts: list[list[int]] = [chat_ids(self._tokenizer, chat) for chat in chats]
        requests = [
            (prompt, self._parameters(sampling, i, j))
            for i, prompt in enumerate(prompts, sampling.first)
            for j in range(sampling.n)
        ]
        flat = self._thread.run(self._spread(requests))
        return [flat[i * sampling.n : (i + 1) * sampling.n] for i in range(len(chats))]

    def update_weights(self, folder: str, version: int) -> int:
        """Let every live server load a Hugging Face folder; returns how many did.

        Servers that cannot be reached now load it before they are asked again. Raises ValueError when a server
        refuses the weights.
        """
        self._folder, self.version = str(Path(folder).resolve()), version
        return self._thread.run(self._push())

    def close(self) -> None:
        """Close the connections; calls in flight in other threads are cancelled."""
        self._thread.close(self._http.aclose())

    def _parameters(self, sampling: Sampling, i: int, j: int) -> dict[str, Any]:
        out: dict[str, Any] = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_new_tokens": sampling.max_tokens,
        }
        if sampling.seed is not None:
            out["sampling_seed"] = derive_seed(sampling.seed, i, j)
        return out

    async def _spread(self, requests: list[tuple[list[int], dict[str, Any]]]) -> list[Generation]:
        """Give chunks to idle live servers until every request is answered."""
        wanted = self.version if self._folder is not None else None
        answers: list[Generation | None] = [None] * len(requests)
        live = list(self._endpoints())
        size = min(self._max_in_flight, -(-len(requests) // max(1, len(live))))
        rows = range(len(requests))
        pending = deque(_Chunk(list(rows[start : start + size])) for start in range(0, len(requests), size))
        running: dict[asyncio.Task[list[Generation]], tuple[str, _Chunk]] = {}
        alone_since = time.monotonic()
        pulse = Pulse(self._http)
        try:
            while pending or running:
                silent = pulse.silent({url for url, _ in running.values()})
                live = [url for url in self._endpoints() if url not in silent]
                if live:
                    alone_since = time.monotonic()
                elif time.monotonic() - alone_since > self._patience_s:
                    raise RuntimeError(f"no {self._role} server has been alive for {self._patience_s:.0f} s")
                self._cancel_lost(running, live)
                for url in self._idle(live, running):
                    if pending:
                        chunk = pending.popleft()
                        work = self._ask(url, [requests[row] for row in chunk.rows], wanted)
                        running[asyncio.create_task(work)] = (url, chunk)
                if not running:
                    await asyncio.sleep(POLL_S / 5)
                    continue
                done, _ = await asyncio.wait(running, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    url, chunk = running.pop(task)
                    if not self._settle(task, url, chunk, answers):
                        pending.appendleft(chunk)
        finally:
            pulse.close()
            for task in running:
                task.cancel()
        assert all(answer is not None for answer in answers)
        return answers  # type: ignore[return-value]

    def _idle(self, live: list[str], running: dict[asyncio.Task[list[Generation]], tuple[str, _Chunk]]) -> list[str]:
        busy = {url for url, _ in running.values()}
        now = time.monotonic()
        servers = {url: self._servers.setdefault(url, _Server()) for url in live}
        idle = [url for url, server in servers.items() if url not in busy and server.not_before <= now]
        return sorted(idle, key=lambda url: servers[url].in_hand)

    def _cancel_lost(
        self, running: dict[asyncio.Task[list[Generation]], tuple[str, _Chunk]], live: Sequence[str]
    ) -> None:
        """Give up on servers whose registration is gone or stale: their tasks end as cancelled."""
        for task, (url, _) in running.items():
            if url not in live:
                task.cancel()

    def _settle(
        self, task: asyncio.Task[list[Generation]], url: str, chunk: _Chunk, answers: list[Generation | None]
    ) -> bool:
        """Store a finished chunk; False when it must be asked again."""
        server = self._servers[url]
        error = None if task.cancelled() else task.exception()
        if not task.cancelled() and error is None:
            server.failures = 0
            for row, generation in zip(chunk.rows, task.result(), strict=True):
                answers[row] = generation
            return True
        if error is not None and not isinstance(error, (httpx.TransportError, _Fault)):
            raise error
        server.version = None
        server.not_before = time.monotonic() + min(COOL_DOWN_S[1], COOL_DOWN_S[0] * 2**server.failures)
        server.failures += 1
        if isinstance(error, _Fault):
            chunk.faults += 1
            if chunk.faults >= MAX_FAULTS:
                raise RuntimeError(f"{self._role} server {url} keeps failing: {error}")
        return False

    async def _ask(
        self, url: str, requests: list[tuple[list[int], dict[str, Any]]], wanted: int | None
    ) -> list[Generation]:
        """One ``/generate`` request, after the wanted weights are loaded there."""
        await self._bring_up_to_date(url)
        body = {
            "input_ids": [prompt for prompt, _ in requests],
            "sampling_params": [parameters for _, parameters in requests],
            "return_logprob": True,
        }
        server = self._servers[url]
        server.in_hand += len(requests)
        try:
            answers = _json(await self._http.post(f"{url}/generate", json=body), url)
        finally:
            server.in_hand -= len(requests)
        if len(answers) != len(requests):
            raise _Fault(f"{len(requests)} prompts, but {len(answers)} answers")
        out = [_generation(prompt, answer) for (prompt, _), answer in zip(requests, answers, strict=True)]
        if wanted is not None and any(item.version != wanted for item in out):
            raise _Fault(f"it answered with other weights than version {wanted}")
        return out

    async def _bring_up_to_date(self, url: str) -> None:
        server = self._servers.setdefault(url, _Server())
        async with server.lock:
            folder, version = self._folder, self.version
            if folder is None or server.version == version:
                return
            body = {"model_path": folder, "weight_version": str(version)}
            _json(await self._http.post(f"{url}/update_weights_from_disk", json=body), url)
            server.version = version

    async def _push(self) -> int:
        """Every live server loads at the same time; none that is lost meanwhile, or hangs, is waited for."""
        loading = {asyncio.create_task(self._bring_up_to_date(url)): url for url in self._endpoints()}
        running, pulse = dict(loading), Pulse(self._http)
        try:
            while running:
                silent = pulse.silent(running.values())
                live = [url for url in self._endpoints() if url not in silent]
                for task, url in running.items():
                    if url not in live:
                        task.cancel()
                done, _ = await asyncio.wait(running, timeout=POLL_S)
                for task in done:
                    del running[task]
        finally:
            pulse.close()
            for task in running:
                task.cancel()
        errors = [None if task.cancelled() else task.exception() for task in loading]
        for error in errors:
            if error is not None and not isinstance(error, (httpx.TransportError, _Fault)):
                raise error
        return sum(error is None and not task.cancelled() for error, task in zip(errors, loading, strict=True))


def _json(response: httpx.Response, url: str) -> Any:
    """The body of a good answer; a refusal is a ValueError, a server's fault a ``_Fault``."""
    if response.status_code < 300:
        return response.json()
    message = response.text[:500]
    if "json" in response.headers.get("content-type", ""):
        data = response.json()
        error = data.get("error", data) if isinstance(data, dict) else data
        message = str(error.get("message", error) if isinstance(error, dict) else error)[:500]
    if response.status_code in (408, 425, 429) or response.status_code >= 500:
        raise _Fault(f"HTTP {response.status_code}: {message}")
    raise ValueError(f"{url}{response.request.url.path}: {message}")


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
