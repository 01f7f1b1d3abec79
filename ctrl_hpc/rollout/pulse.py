"""Whether services that have work in hand still answer: one that hangs keeps its connections open and says nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass

import httpx

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
