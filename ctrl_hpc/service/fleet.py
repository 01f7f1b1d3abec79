"""Work spread over the live servers of an array: given to whoever is free, taken back from whoever is lost."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import heapq
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from ctrl_hpc.service.json_client import Busy, JsonClient, Lost, TooLarge

R = TypeVar("R")


class LoopThread:
    """Runs coroutines for any number of threads; Ctrl-C while waiting cancels the coroutine."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()
        self._lock = threading.Lock()
        self._closed = False

    def run(self, coroutine: Coroutine[Any, Any, R]) -> R:
        """The coroutine's result.

        Raises concurrent.futures.CancelledError when the loop is closed before it is there, RuntimeError after that.
        """
        future: concurrent.futures.Future[R]
        with self._lock:
            if self._closed:
                coroutine.close()
                raise RuntimeError(f"{self._thread.name} is closed")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self, last: Coroutine[Any, Any, None] | None = None) -> None:
        """End the loop: coroutines that still run are cancelled, and who waits for them is told; then ``last`` runs."""
        with self._lock:
            if self._closed:
                if last is not None:
                    last.close()
                return
            self._closed = True
        asyncio.run_coroutine_threadsafe(self._end(last), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self, last: Coroutine[Any, Any, None] | None) -> None:
        running = asyncio.all_tasks() - {asyncio.current_task()}
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        if last is not None:
            await last


POLL_S = 0.25
"""Seconds between looks at which servers are alive; a look that takes long is followed by a longer rest."""
COOL_DOWN_S = (0.25, 8.0)
"""Shortest and longest time a server that failed is not asked; it doubles with every failure in a row."""
QUESTION_S = 3.0
"""A server that has had work for so long without a sign of life is asked for its health."""
SILENT_S = 15.0
"""A server that has answered nothing for so long, not even ``/health``, is taken for lost until it does."""


@dataclass(slots=True)
class Chunk:
    """Requests that travel together: their rows in the answer, and how often they were lost."""

    rows: list[int]
    losses: int = 0


type Ask = Callable[[str, Chunk], Awaitable[Sequence[Chunk]]]
type OnLoss = Callable[[Chunk, Exception], Sequence[Chunk]]


@dataclass(slots=True, eq=False)
class _Server:
    """What is known of a server."""

    failures: int = 0
    """In a row."""
    not_before: float = 0.0
    lanes: int = 0
    """How many requests it is asked at a time, by all calls."""
    in_hand: set[asyncio.Timeout] = field(default_factory=set)
    """The requests that it has now; each can be taken back."""
    heard: float = 0.0
    """Its last sign of life, or when it got work after it had none."""
    silent: bool = False
    question: asyncio.Task[None] | None = None
    asked: float = 0.0

    def failed(self, wait_s: float = 0.0) -> None:
        """Leave it alone for a while, longer with every failure in a row."""
        shortest, longest = COOL_DOWN_S
        self.not_before = time.monotonic() + max(wait_s, min(longest, shortest * 2 ** min(self.failures, 30)))
        self.failures += 1

    def take_back(self) -> None:
        """Have what it has in hand end as lost."""
        while self.in_hand:
            self.in_hand.pop().reschedule(0.0)


@dataclass(slots=True, eq=False)
class _Call:
    """One batch of work."""

    pending: deque[Chunk]
    ask: Ask
    lost: OnLoss
    at_once: int
    lanes: Counter[str] = field(default_factory=Counter)
    """How many chunks each server is asked at a time."""
    n_lanes: int = 0
    """Of all servers."""
    in_hand: int = 0
    """Chunks that some server has."""
    heard: float = field(default_factory=time.monotonic)
    changed: asyncio.Event = field(default_factory=asyncio.Event)


class Fleet:
    """The servers of a role. ``endpoints`` is asked anew all the time, in a thread: they come, go, and come back.

    Calls may come from several threads. A server that gets free takes the next chunk, so that the cost of a chunk does
    not depend on how many servers there are; each has its own connections.
    """

    def __init__(
        self,
        role: str,
        endpoints: Callable[[], Sequence[str]],
        *,
        token: str | None = None,
        patience_s: float = 600.0,
        timeout_s: float | None = None,
    ) -> None:
        """``token``: bearer token of the servers; ``patience_s``: longest time without an answer of any;
        ``timeout_s``: longest time of one request, None for no limit."""
        self._role, self._endpoints = role, endpoints
        self._patience_s, self._timeout_s = patience_s, timeout_s
        self._thread = LoopThread(f"{role}-client")
        self._discovery = ThreadPoolExecutor(1, thread_name_prefix=f"{role}-discovery")
        self._http = JsonClient(role, token)
        self._looking: asyncio.Task[None] | None = None
        self._next_look = self._next_watch = 0.0
        self._live: dict[str, None] = {}
        self._servers: dict[str, _Server] = {}
        self._calls: set[_Call] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; calls in flight in other threads are cancelled."""
        self._thread.close(self._http.close())
        self._discovery.shutdown(wait=False, cancel_futures=True)

    def spread(self, cut: Callable[[int], Iterable[Chunk]], ask: Ask, lost: OnLoss, at_once: int = 1) -> None:
        """Have the chunks that ``cut`` makes for a number of servers asked, ``at_once`` of each server at a time.

        ``ask`` gets a server's URL and a chunk, keeps the answers and returns what is to be asked again; ``lost`` gets
        a chunk and its Lost, or, of a single row, its TooLarge (more rows are halved). Raises what they raise, and
        RuntimeError when no server answers for ``patience_s``.
        """
        self._thread.run(self._spread(cut, ask, lost, at_once))

    async def _spread(self, cut: Callable[[int], Iterable[Chunk]], ask: Ask, lost: OnLoss, at_once: int) -> None:
        await self._first_look()
        call = _Call(deque(cut(len(self._live))), ask, lost, at_once)
        self._calls.add(call)
        try:
            async with asyncio.TaskGroup() as lanes:
                while call.pending or call.in_hand:
                    self._watch()
                    for url in self._free(call):
                        self._servers[url].lanes += 1
                        call.lanes[url] += 1
                        call.n_lanes += 1
                        lanes.create_task(self._lane(call, url, self._servers[url]))
                    if not call.n_lanes and time.monotonic() - call.heard > self._patience_s:
                        raise RuntimeError(f"no {self._role} has answered for {self._patience_s:.0f} s")
                    await _until(call.changed, POLL_S)
                    call.changed.clear()
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            self._calls.discard(call)

    def _free(self, call: _Call) -> list[str]:
        """The servers that may take more of this call now, each as often as it may, the least loaded first."""
        if not call.pending:
            return []
        slots, now = [], time.monotonic()
        for url in self._live:
            server = self._servers.setdefault(url, _Server())
            if server.not_before <= now and not server.silent:
                more = (1 if server.failures else call.at_once) - call.lanes[url]
                slots += [(server.lanes + k, url) for k in range(more)]
        return [url for _, url in heapq.nsmallest(len(call.pending), slots)]

    async def _lane(self, call: _Call, url: str, server: _Server) -> None:
        """Ask a server chunk after chunk, until none is left or it fails."""
        try:
            while call.pending:
                chunk = call.pending.popleft()
                call.in_hand += 1
                again = await self._attempt(call, url, server, chunk)
                call.in_hand -= 1
                call.pending.extend(again)
                if again:
                    call.changed.set()
                if server.failures:
                    break
        finally:
            server.lanes -= 1
            call.lanes[url] -= 1
            call.n_lanes -= 1
            call.changed.set()

    async def _attempt(self, call: _Call, url: str, server: _Server, chunk: Chunk) -> Sequence[Chunk]:
        """Ask a chunk; what is to be asked again."""
        try:
            async with self._in_hand(url, server):
                again = await call.ask(url, chunk)
        except Busy as busy:
            server.failed(busy.wait_s or 0.0)
            call.heard = call.heard if busy.wait_s is None else time.monotonic()
            return [chunk]
        except TooLarge as error:
            middle = len(chunk.rows) // 2
            parts = (chunk.rows[:middle], chunk.rows[middle:])
            return [Chunk(rows, chunk.losses) for rows in parts] if middle else call.lost(chunk, error)
        except Lost as error:
            server.failed()
            call.heard = time.monotonic()
            return call.lost(chunk, error)
        call.heard = time.monotonic()
        if again:
            server.failed()
        else:
            server.failures = 0
        return again

    @asynccontextmanager
    async def _in_hand(self, url: str, server: _Server) -> AsyncIterator[None]:
        """While a server has a request: Lost as soon as the server is."""
        if not server.in_hand and not server.silent:
            server.heard = time.monotonic()
        request = asyncio.timeout(None)
        try:
            async with request:
                server.in_hand.add(request)
                yield
        except TimeoutError:
            raise Lost(f"{url}: the server is {'silent' if server.silent else 'gone'}") from None
        finally:
            server.in_hand.discard(request)

    def everyone(self, ask: Callable[[str], Awaitable[object]]) -> int:
        """Ask every live server the same; how many answered. None that is lost meanwhile, or hangs, is waited for.

        Raises what ``ask`` raises, but for Busy and Lost.
        """
        return self._thread.run(self._everyone(ask))

    async def _everyone(self, ask: Callable[[str], Awaitable[object]]) -> int:
        await self._first_look()
        told = [asyncio.create_task(self._tell(url, ask)) for url in self._live]
        try:
            while waiting := [task for task in told if not task.done()]:
                self._watch()
                await asyncio.wait(waiting, timeout=POLL_S)
        finally:
            for task in told:
                task.cancel()
        return sum([task.result() for task in told])

    async def _tell(self, url: str, ask: Callable[[str], Awaitable[object]]) -> bool:
        server = self._servers.setdefault(url, _Server())
        server.lanes += 1
        try:
            async with self._in_hand(url, server):
                await ask(url)
        except (Busy, Lost):
            return False
        finally:
            server.lanes -= 1
        return True

    async def post(self, url: str, path: str, content: str, timeout_s: float | None = None) -> Any:
        """The JSON that a server answers to JSON; ``timeout_s``: longest time, the fleet's where None.

        For use in ``ask``. Raises Busy, Lost, and ValueError where the server refuses.
        """
        answer = await self._http.post(url, path, content, timeout_s or self._timeout_s)
        if url in self._servers:
            self._servers[url].heard = time.monotonic()
        return answer

    async def _first_look(self) -> None:
        if self._looking is not None and self._looking.done():
            self._looking = None  # of an earlier call
        await self._look()

    async def _look(self) -> None:
        """Find out who is alive; the thread may wait for the disk, the loop does not."""
        began = time.monotonic()
        live = await asyncio.get_running_loop().run_in_executor(self._discovery, self._endpoints)
        now = time.monotonic()
        self._next_look = now + max(POLL_S, 10 * (now - began))
        self._live = dict.fromkeys(live)
        for url, server in list(self._servers.items()):
            if url not in self._live:
                server.take_back()
                if not server.lanes:
                    del self._servers[url]
        for call in self._calls:
            call.changed.set()

    def _watch(self) -> None:
        """Now and then: begin a look at who is alive, and listen to those that have work."""
        now = time.monotonic()
        if now < self._next_watch:
            return
        self._next_watch = now + POLL_S
        if self._looking is not None and self._looking.done():
            looked, self._looking = self._looking, None
            with contextlib.suppress(OSError):  # a disk that fails: who was there is asked on, as long as they answer
                looked.result()
        if self._looking is None and now >= self._next_look:
            self._looking = asyncio.create_task(self._look())
        for url, server in self._servers.items():
            if server.in_hand or server.silent:
                self._listen(url, server, now)

    def _listen(self, url: str, server: _Server, now: float) -> None:
        """Ask a server that says nothing for its health; take its work back when it does not even answer that."""
        if now - server.heard > SILENT_S and not server.silent:
            server.silent = True
            server.take_back()
        if now - max(server.heard, server.asked) > QUESTION_S and (server.question is None or server.question.done()):
            server.asked = now
            server.question = asyncio.create_task(self._question(url, server))

    async def _question(self, url: str, server: _Server) -> None:
        if await self._http.is_there(url, SILENT_S):
            server.heard, server.silent = time.monotonic(), False


async def _until(event: asyncio.Event, timeout_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
