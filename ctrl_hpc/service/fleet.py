"""Clients of an array of services: one event loop in a thread, and the pulse of its servers."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

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


EVERY_S = 3.0
"""Seconds between questions to a service."""
SILENT_S = 15.0
"""A service that has not answered on ``/health`` for so long is taken for lost."""


@dataclass(slots=True)
class _Known:
    """When a service answered last, and the question in flight."""

    answered: float
    asked: float
    question: asyncio.Task[None] | None = None


class Pulse:
    """Asks the services of one batch of work for their health, beside the work."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self._known: dict[str, _Known] = {}

    def silent(self, urls: Iterable[str]) -> set[str]:
        """Those that have not answered for ``SILENT_S``; to be called again and again while they have work."""
        now, wanted = time.monotonic(), set(urls)
        for url in set(self._known) - wanted:
            self._drop(url)
        for url in wanted:
            known = self._known.setdefault(url, _Known(now, now))
            if (known.question is None or known.question.done()) and now - known.asked > EVERY_S:
                known.asked = now
                known.question = asyncio.create_task(self._ask(url, known))
        return {url for url in wanted if now - self._known[url].answered > SILENT_S}

    def close(self) -> None:
        """Withdraw the questions in flight."""
        for url in list(self._known):
            self._drop(url)

    def _drop(self, url: str) -> None:
        question = self._known.pop(url).question
        if question is not None:
            question.cancel()

    async def _ask(self, url: str, known: _Known) -> None:
        try:
            await self._http.get(f"{url.rstrip('/')}/health", timeout=SILENT_S)
        except httpx.HTTPError:
            return
        known.answered = time.monotonic()
