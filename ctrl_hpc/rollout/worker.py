"""The thread that owns a model: requests are queued, batched and answered."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

from ctrl_hpc.records import Generation, Sampling
from ctrl_hpc.rollout.decoding import Completion, Decoding, Engine, Follower
from ctrl_hpc.seeds import derive_seed

GATHER_S = 0.002
"""How long the first waiting request waits for company."""
log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Request:
    prompts: Sequence[Sequence[int]]
    sampling: Sequence[Sampling]
    followers: Sequence[Follower]
    future: Future[list[Completion]] = field(default_factory=Future)


@dataclass(slots=True)
class _Update:
    folder: str
    version: int
    future: Future[None] = field(default_factory=Future)


@dataclass(slots=True)
class Totals:
    """What the worker has done since it started."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    busy_s: float = 0.0
    updates: int = 0


class Worker:
    """Serves requests in the order they come, all that wait in one batch; a weight update waits for its turn.

    Whatever goes wrong with a request or an update is that one's error: the thread goes on.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.totals = Totals()
        self._queue: queue.SimpleQueue[_Request | _Update | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name="rollout-worker", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests not yet taken."""
        return self._queue.qsize()

    @property
    def alive(self) -> bool:
        """Whether anything will be answered."""
        return self._thread.is_alive()

    def submit(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[Sampling],
        followers: Sequence[Follower] | None = None,
    ) -> Future[list[Completion]]:
        """A future of one completion a prompt; raises RuntimeError when the thread has ended."""
        request = _Request(prompts, sampling, followers or [Follower() for _ in prompts])
        self._put(request)
        return request.future

    def update(self, folder: str, version: int) -> Future[None]:
        """A future that is done when the weights are loaded; requests submitted later use them."""
        update = _Update(folder, version)
        self._put(update)
        return update.future

    def close(self) -> None:
        """End the thread after what it is doing now."""
        self._queue.put(None)

    def _put(self, item: _Request | _Update) -> None:
        if not self.alive:
            raise RuntimeError("the model's thread has ended; start the server again")
        self._queue.put(item)

    def _loop(self) -> None:
        pending: list[_Request] = []
        while True:
            item: _Request | _Update | bool | None = self._queue.get()
            while isinstance(item, _Request):
                pending.append(item)
                item = self._next_soon()
            if pending:
                self._generate(pending)
                pending = []
            if isinstance(item, _Update):
                self._apply(item)
            elif item is None:
                return

    def _next_soon(self) -> _Request | _Update | bool | None:
        """The next item, waiting a moment for it; False when none came."""
        try:
            return self._queue.get(timeout=GATHER_S)
        except queue.Empty:
            return False

    def _generate(self, requests: list[_Request]) -> None:
        started = time.perf_counter()
        prompts = [prompt for request in requests for prompt in request.prompts]
        sampling = [item for request in requests for item in request.sampling]
        followers = [item for request in requests for item in request.followers]
        try:
            generations = self.engine.generate(prompts, sampling, followers)
        except Exception as error:  # noqa: BLE001 (it is that request's answer)
            self._generate_apart(requests, error)
            return
        finally:
            self.totals.busy_s += time.perf_counter() - started
        self.totals.requests += len(prompts)
        self.totals.prompt_tokens += sum(map(len, prompts))
        self.totals.completion_tokens += sum(len(generation.token_ids) for generation in generations)
        start = 0
        for request in requests:
            end = start + len(request.prompts)
            _resolve(request.future, generations[start:end])
            start = end

    def _generate_apart(self, requests: list[_Request], error: Exception) -> None:
        """A gathered batch failed: the request at fault gets the error, its mates are served."""
        if len(requests) == 1:
            _reject(requests[0].future, error)
            return
        for request in requests:
            for follower in request.followers:
                follower.restart()
            self._generate([request])

    def _apply(self, update: _Update) -> None:
        try:
            self.engine.load_weights(update.folder, update.version)
        except Exception as error:  # noqa: BLE001 (it is that request's answer)
            _reject(update.future, error)
            return
        self.totals.updates += 1
        _resolve(update.future, None)


def _resolve(future: Future[Any], value: Any) -> None:
    if future.set_running_or_notify_cancel():
        future.set_result(value)


def _reject(future: Future[Any], error: Exception) -> None:
    """The users' errors as they are, all others as RuntimeErrors that say their kind, with a line in the log."""
    if not isinstance(error, ValueError):
        log.error("a request failed", exc_info=error)
        if not isinstance(error, RuntimeError):
            error = RuntimeError(f"{type(error).__name__}: {error}")
    if future.set_running_or_notify_cancel():
        future.set_exception(error)


class Service:
    """A worker with its tokenizer: expands ``n``, runs requests, decodes texts."""

    def __init__(self, worker: Worker, tokenizer: Any, model: str) -> None:
        self.worker, self.tokenizer, self.model = worker, tokenizer, model

    async def complete(self, prompts: Sequence[Sequence[int]], sampling: Sequence[Decoding]) -> list[list[Completion]]:
        """``n`` completions for each prompt; sample j of a seeded request uses the seed itself, then derived ones."""
        flat_prompts, flat_sampling = [], []
        for prompt, item in zip(prompts, sampling, strict=True):
            for j in range(item.n):
                seed = item.seed if item.seed is None or j == 0 else derive_seed(item.seed, j)
                flat_prompts.append(prompt)
                flat_sampling.append(replace(item, n=1, seed=seed))
        generations = await asyncio.wrap_future(self.worker.submit(flat_prompts, flat_sampling))
        flat = iter(generations)
        return [[next(flat) for _ in range(item.n)] for item in sampling]

    def texts(self, generations: Sequence[Generation]) -> list[str]:
        """The completions' texts, special tokens left out."""
        return self.tokenizer.batch_decode([list(item.token_ids) for item in generations], skip_special_tokens=True)
