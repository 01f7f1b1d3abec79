"""The thread that owns a model: requests are queued, batched and answered."""

from __future__ import annotations

import asyncio
import logging
import queue
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ctrl_hpc.records import Generation, Sampling
from ctrl_hpc.rollout.decoding import Completion, Decoding, Engine, Follower, TopLogprobs
from ctrl_hpc.seeds import derive_seed

_GATHER_S = 0.002
"""How long the first waiting request waits for company."""
_ENDED = "the model's thread has ended; start the server again"
log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
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


class _Look:
    """Something changed beside the queue: look at what waits."""


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
        self.paused = False
        """Requests wait; weight updates and aborts do not."""
        self._queue: queue.SimpleQueue[_Request | _Update | _Look | None] = queue.SimpleQueue()
        self._open: set[_Request] = set()
        self._lock = threading.Lock()
        self._closed = False
        """Nothing is put into the queue any more but what ends the thread."""
        self._thread = threading.Thread(target=self._run, name="rollout-worker", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Requests not yet taken."""
        return self._queue.qsize()

    @property
    def unanswered(self) -> int:
        """Completions asked for and not yet answered."""
        with self._lock:
            return sum(len(request.prompts) for request in self._open)

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
        """A future of one completion a prompt; raises RuntimeError when the worker is closed."""
        request = _Request(prompts, sampling, followers or [Follower() for _ in prompts])
        request.future.add_done_callback(lambda _: self._forget(request))
        self._put(request)
        return request.future

    def abort(self, rid: str | None = None) -> None:
        """End the completions of a request's id, or all; they are answered with what they have."""
        with self._lock:
            followers = [follower for request in self._open for follower in request.followers]
        for follower in followers:
            if rid is None or follower.rid == rid:
                follower.aborted = True
        self._queue.put(_Look())

    def pause(self) -> None:
        """End all completions and begin none until :meth:`go_on`."""
        self.paused = True
        self.abort()

    def go_on(self) -> None:
        """Serve what waits."""
        self.paused = False
        self._queue.put(_Look())

    def update(self, folder: str, version: int) -> Future[None]:
        """A future that is done when the weights are loaded; requests submitted later use them."""
        update = _Update(folder, version)
        self._put(update)
        return update.future

    def close(self) -> None:
        """End the thread after what it was asked before; whoever asks later is refused."""
        with self._lock:
            self._closed = True
            self._queue.put(None)

    def _put(self, item: _Request | _Update) -> None:
        """Under one lock with :meth:`close`: nothing comes behind the end."""
        with self._lock:
            if self._closed:
                raise RuntimeError(_ENDED)
            if isinstance(item, _Request):
                self._open.add(item)
            self._queue.put(item)

    def _forget(self, request: _Request) -> None:
        with self._lock:
            self._open.discard(request)

    def _run(self) -> None:
        try:
            self._loop()
        finally:
            self._refuse_rest()

    def _refuse_rest(self) -> None:
        """However the thread ends, nobody waits for it in vain."""
        with self._lock:
            self._closed = True
            futures: list[Future[Any]] = [request.future for request in self._open]
        while not self._queue.empty():
            item = self._queue.get()
            if isinstance(item, _Update):
                futures.append(item.future)
        for future in futures:
            if not future.done() and future.set_running_or_notify_cancel():
                future.set_exception(RuntimeError(_ENDED))

    def _loop(self) -> None:
        pending: list[_Request] = []
        while True:
            item: _Request | _Update | _Look | bool | None = self._queue.get()
            while isinstance(item, _Request):
                pending.append(item)
                item = self._next_soon()
            pending = self._without_aborted(pending)
            if pending and (not self.paused or item is None):
                self._generate(pending)
                pending = []
            if isinstance(item, _Update):
                self._apply(item)
            elif item is None:
                return

    def _without_aborted(self, requests: list[_Request]) -> list[_Request]:
        """Answer those that were aborted before anything was decoded; the others."""
        left = []
        for request in requests:
            if all(follower.aborted for follower in request.followers):
                nothing = Completion(text="", finish_reason="abort", version=self.engine.version)
                _resolve(request.future, [replace(nothing, prompt_ids=tuple(prompt)) for prompt in request.prompts])
            else:
                left.append(request)
        return left

    def _next_soon(self) -> _Request | _Update | _Look | bool | None:
        """The next item, waiting a moment for it; False when none came."""
        try:
            return self._queue.get(timeout=_GATHER_S)
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


@dataclass(frozen=True, slots=True)
class Step:
    """A token of a request's completion as it comes."""

    index: int
    """Which of the request's completions, over its prompts and their ``n``."""
    token: int
    logprob: float
    top: TopLogprobs


class TextFollower(Follower):
    """Ends a completion at the first of its stop strings; reports its tokens where somebody wants them."""

    __slots__ = ("_count", "_ids", "_least", "_report", "_reported", "_stops", "_tokenizer", "_window")

    def __init__(
        self,
        tokenizer: Any,
        stops: Sequence[str],
        least: int,
        *,
        rid: str = "",
        report: Callable[[int, float, TopLogprobs], None] | None = None,
    ) -> None:
        """``least``: tokens before which no stop string counts; ``report`` gets each token, its log-prob, the top."""
        super().__init__(rid, watches=bool(stops) or report is not None)
        self._tokenizer, self._stops, self._least = tokenizer, tuple(stops), least
        widest = max((len(stop.encode()) for stop in stops), default=0)
        self._window = widest + 8  # a token has a byte at least, special ones none
        self._ids: list[int] = []
        self._count = self._reported = 0
        self._report = report

    def token(self, token: int, logprob: float, top: TopLogprobs) -> bool:
        """Whether a stop string is in what the last tokens say."""
        self._count += 1
        self._ids = [*self._ids[1 - self._window :], token]
        if self._report is not None and self._count > self._reported:
            self._reported = self._count
            self._report(token, logprob, top)
        if self._count < self._least or not self._stops:
            return False
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        return any(stop in text for stop in self._stops)

    def restart(self) -> None:
        """Begin anew; what is reported already is not again."""
        self._ids, self._count = [], 0


def stop_strings(value: Any) -> tuple[str, ...]:
    """Stop strings: none, one or a list; empty ones stop nothing."""
    texts = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"stop={value!r}: must be a string or a list of strings")
    return tuple(text for text in texts if text)


def cut(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The text up to its first stop string, and that string; the whole text and None where there is none."""
    found = [(at, stop) for stop in stops if (at := text.find(stop)) >= 0]
    return (text[: min(found)[0]], min(found)[1]) if found else (text, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A prompt and what is wanted of it."""

    prompt: Sequence[int]
    decoding: Decoding
    stops: Sequence[str] = ()
    """Stop strings; decoding ends at the first."""
    rid: str = ""
    """By which it can be aborted."""

    def singles(self) -> list[Decoding]:
        """One a completion; sample j of a seeded request uses the seed itself, then derived ones."""
        item = self.decoding
        return [
            replace(item, n=1, seed=item.seed if item.seed is None or j == 0 else derive_seed(item.seed, j))
            for j in range(item.n)
        ]


class RolloutService:
    """A worker with its tokenizer: expands ``n``, runs requests, decodes texts."""

    def __init__(self, worker: Worker, tokenizer: Any, model: str) -> None:
        self.worker, self.tokenizer, self.model = worker, tokenizer, model

    async def complete(self, asked: Sequence[Asked]) -> list[list[Completion]]:
        """``n`` completions for each prompt."""
        followers = [
            TextFollower(self.tokenizer, item.stops, item.decoding.min_tokens, rid=item.rid)
            for item in asked
            for _ in range(item.decoding.n)
        ]
        prompts = [item.prompt for item in asked for _ in range(item.decoding.n)]
        sampling = [single for item in asked for single in item.singles()]
        generations = await asyncio.wrap_future(self.worker.submit(prompts, sampling, followers))
        return _grouped(generations, asked)

    async def stream(self, asked: Sequence[Asked]) -> AsyncIterator[Step | list[list[Completion]]]:
        """Every token as it comes, at last what :meth:`complete` gives; leaving it early aborts the completions."""
        loop = asyncio.get_running_loop()
        steps: asyncio.Queue[Step | Future[list[Completion]]] = asyncio.Queue()

        def put(item: Step | Future[list[Completion]]) -> None:
            loop.call_soon_threadsafe(steps.put_nowait, item)

        def report(index: int, token: int, logprob: float, top: TopLogprobs) -> None:
            put(Step(index, token, logprob, top))

        # A seed, so that a batch decoded anew says the same.
        seeded = [replace(item, decoding=_seeded(item.decoding)) for item in asked]
        prompts = [item.prompt for item in seeded for _ in range(item.decoding.n)]
        followers: list[TextFollower] = []
        for item in seeded:
            for _ in range(item.decoding.n):
                told = partial(report, len(followers))
                least = item.decoding.min_tokens
                followers.append(TextFollower(self.tokenizer, item.stops, least, rid=item.rid, report=told))
        sampling = [single for item in seeded for single in item.singles()]
        self.worker.submit(prompts, sampling, followers).add_done_callback(put)
        try:
            while isinstance(step := await steps.get(), Step):
                yield step
            yield _grouped(step.result(), seeded)
        finally:
            for follower in followers:
                follower.aborted = True

    def texts(self, generations: Sequence[Generation]) -> list[str]:
        """The completions' texts, special tokens left out."""
        return self.tokenizer.batch_decode([list(item.token_ids) for item in generations], skip_special_tokens=True)


def _seeded(decoding: Decoding) -> Decoding:
    return decoding if decoding.seed is not None else replace(decoding, seed=secrets.randbits(62))


def _grouped(generations: Sequence[Completion], asked: Sequence[Asked]) -> list[list[Completion]]:
    flat = iter(generations)
    return [[next(flat) for _ in range(item.decoding.n)] for item in asked]
