"""The executor array as an ``Executor``: executions in, verdicts out, whichever services live or die meanwhile."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import httpx

from ctrl_hpc import jsonl
from ctrl_hpc.records import Execution, TestResult, Verdict
from ctrl_hpc.service.fleet import LoopThread, Pulse

POLL_S = 0.25
"""Seconds between looks at which services are alive."""
COOL_DOWN_S = (0.25, 8.0)
"""Shortest and longest time a service that failed is not asked; it doubles with every failure in a row."""
MAX_LOSSES = 6
"""Times an execution may be lost with a service, or fault, before its verdict is ``sandbox_error``."""
CHUNKS_IN_FLIGHT = 4
"""Requests a service has in hand at a time, so that its workers never wait for the network."""
MAX_CHUNK = 32
"""Executions of a request."""
_MAX_CHUNK_BYTES = 16 << 20
_REFUSED = (400, 401, 403, 404, 405, 413, 422)
_BUSY = (429, 503)


@dataclass(slots=True)
class _Chunk:
    """Executions that travel together: their rows in the answer, and how often they were lost."""

    rows: list[int]
    losses: int = 0


@dataclass(slots=True)
class _Endpoint:
    """What the client knows of a service."""

    failures: int = 0
    not_before: float = 0.0
    in_hand: int = 0
    """Requests that it answers now, of all calls."""

    def failed(self, wait_s: float = 0.0) -> None:
        """Leave the service alone for a while, longer with every failure in a row."""
        shortest, longest = COOL_DOWN_S
        self.not_before = time.monotonic() + max(wait_s, min(longest, shortest * 2**self.failures))
        self.failures += 1


class _Lost(Exception):
    """A service did not answer, or answered with an internal error."""


class _Unreachable(Exception):
    """A service takes no connection: no work was lost with it."""


class _Busy(Exception):
    """A service has too much waiting, or drains."""

    def __init__(self, wait_s: float) -> None:
        super().__init__()
        self.wait_s = wait_s


class ExecutorClient:
    """Spreads executions over the live services of an array.

    ``endpoints`` is asked anew all the time: work starts with the first service, grows with each that comes, and what
    a lost one had in hand is given to another. A fault is retried elsewhere and never becomes a wrong answer. Calls may
    come from several threads.
    """

    def __init__(
        self,
        endpoints: Callable[[], Sequence[str]],
        token: str | None = None,
        *,
        patience_s: float = 600.0,
        connect_timeout_s: float = 5.0,
    ) -> None:
        """``token``: the services' bearer token; ``patience_s``: longest time without an answer."""
        self._endpoints, self._patience_s = endpoints, patience_s
        self._thread = LoopThread("executor-client")
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=connect_timeout_s),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0),
            headers={"authorization": f"Bearer {token}"} if token else {},
            trust_env=False,
        )
        self._known: dict[str, _Endpoint] = {}

    def __enter__(self) -> ExecutorClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run_many(self, executions: Sequence[Execution]) -> list[Verdict]:
        """A verdict for each execution, in order; an environment fault that persists is ``sandbox_error``.

        Raises RuntimeError when none answers for ``patience_s``, ValueError when a service refuses a request.
        """
        return self._thread.run(self._spread(list(executions))) if executions else []

    def close(self) -> None:
        """Close the connections; calls in flight in other threads are cancelled."""
        self._thread.close(self._http.aclose())

    async def _spread(self, executions: list[Execution]) -> list[Verdict]:
        """Give chunks to live services until every execution has a verdict."""
        bodies = [json.dumps(jsonl.encode(execution), separators=(",", ":")) for execution in executions]
        verdicts: list[Verdict | None] = [None] * len(executions)
        pending = deque(_chunks(bodies, len(self._endpoints())))
        running: dict[asyncio.Task[list[Verdict]], tuple[str, _Chunk]] = {}
        heard = time.monotonic()
        pulse = Pulse(self._http)
        try:
            while pending or running:
                silent = pulse.silent({url for url, _ in running.values()})
                live = [url for url in self._endpoints() if url not in silent]
                if not running and time.monotonic() - heard > self._patience_s:
                    raise RuntimeError(f"no executor has answered for {self._patience_s:.0f} s")
                _cancel_lost(running, live)
                for url in self._free(live, running):
                    if not pending:
                        break
                    chunk = pending.popleft()
                    timeout_s = sum(_longest(executions[row]) for row in chunk.rows) * CHUNKS_IN_FLIGHT + 120
                    work = self._ask(url, [bodies[row] for row in chunk.rows], timeout_s)
                    running[asyncio.create_task(work)] = (url, chunk)
                done = await _first(running)
                for task in done:
                    url, chunk = running.pop(task)
                    if task.cancelled() or not isinstance(task.exception(), _Unreachable):
                        heard = time.monotonic()
                    pending.extend(self._settle(task, url, chunk, executions, verdicts))
        finally:
            pulse.close()
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        return [verdict for verdict in verdicts if verdict is not None]

    def _free(self, live: list[str], running: dict[asyncio.Task[list[Verdict]], tuple[str, _Chunk]]) -> list[str]:
        """Services that may take more of this call now, each as often as it may, the least loaded first."""
        now = time.monotonic()
        loads = dict.fromkeys(live, 0)
        for url, _ in running.values():
            if url in loads:
                loads[url] += 1
        ready = [url for url in live if self._known.setdefault(url, _Endpoint()).not_before <= now]
        slots = [
            (self._known[url].in_hand - loads[url] + load, url)
            for url in ready
            for load in range(loads[url], 1 if self._known[url].failures else CHUNKS_IN_FLIGHT)
        ]
        return [url for _, url in sorted(slots)]

    async def _ask(self, url: str, bodies: list[str], timeout_s: float) -> list[Verdict]:
        content = '{"executions":[' + ",".join(bodies) + "]}"
        self._known[url].in_hand += 1
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._http.post(
                    f"{url.rstrip('/')}/run_tests", content=content, headers={"content-type": "application/json"}
                )
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise _Unreachable(f"{url}: {error}") from None
        except (httpx.HTTPError, TimeoutError) as error:
            raise _Lost(f"{url}: {error or type(error).__name__}") from None
        finally:
            self._known[url].in_hand -= 1
        if response.status_code in _BUSY:
            raise _Busy(_seconds(response.headers.get("retry-after")))
        if response.status_code in _REFUSED:
            raise ValueError(f"executor {url} refuses: {response.status_code} {response.text[:300]}")
        if response.status_code != 200:
            raise _Lost(f"{url}: status {response.status_code} {response.text[:300]}")
        try:
            verdicts = [jsonl.decode(Verdict, item) for item in response.json()["verdicts"]]
        except (ValueError, KeyError, TypeError) as error:
            raise _Lost(f"{url}: malformed answer: {error}") from None
        if len(verdicts) != len(bodies):
            raise _Lost(f"{url}: {len(verdicts)} verdicts for {len(bodies)} executions")
        return verdicts

    def _settle(
        self,
        task: asyncio.Task[list[Verdict]],
        url: str,
        chunk: _Chunk,
        executions: list[Execution],
        verdicts: list[Verdict | None],
    ) -> list[_Chunk]:
        """Take a finished request's verdicts; what must be tried again is returned."""
        known = self._known.setdefault(url, _Endpoint())
        error = None if task.cancelled() else task.exception()
        if isinstance(error, ValueError):
            raise error
        if isinstance(error, (_Busy, _Unreachable)):
            known.failed(error.wait_s if isinstance(error, _Busy) else 0.0)
            return [chunk]
        if error is not None and not isinstance(error, _Lost):
            raise error
        if error is not None or task.cancelled():
            known.failed()
            reason = str(error) if error is not None else f"{url}: the service is gone"
            return _again(chunk, reason, executions, verdicts)
        known.failures = 0
        faulty = []
        for row, verdict in zip(chunk.rows, task.result(), strict=True):
            verdicts[row] = verdict
            if verdict.status == "sandbox_error":
                faulty.append(row)
        if not faulty:
            return []
        known.failed()
        return _again(_Chunk(faulty, chunk.losses), "", executions, verdicts)


def _chunks(bodies: Sequence[str], services: int) -> list[_Chunk]:
    """Rows in chunks small enough to keep every service busy, by count and by bytes."""
    most = max(1, min(MAX_CHUNK, len(bodies) // max(1, services * CHUNKS_IN_FLIGHT)))
    chunks: list[_Chunk] = []
    size = 0
    for row, body in enumerate(bodies):
        if not chunks or len(chunks[-1].rows) >= most or size + len(body) > _MAX_CHUNK_BYTES:
            chunks.append(_Chunk([]))
            size = 0
        chunks[-1].rows.append(row)
        size += len(body)
    return chunks


def _again(chunk: _Chunk, reason: str, executions: list[Execution], verdicts: list[Verdict | None]) -> list[_Chunk]:
    """The chunk's executions, each alone, to be tried again; after too many losses their ``sandbox_error`` stands."""
    if chunk.losses + 1 < MAX_LOSSES:
        return [_Chunk([row], chunk.losses + 1) for row in chunk.rows]
    for row in chunk.rows:
        if verdicts[row] is None:
            tests = tuple(TestResult(status="sandbox_error") for _ in executions[row].tests)
            verdicts[row] = Verdict(status="sandbox_error", tests=tests, detail=reason)
    return []


def _cancel_lost(running: dict[asyncio.Task[list[Verdict]], tuple[str, _Chunk]], live: Sequence[str]) -> None:
    for task, (url, _) in running.items():
        if url not in live:
            task.cancel()


async def _first(running: dict[asyncio.Task[list[Verdict]], tuple[str, _Chunk]]) -> set[asyncio.Task[list[Verdict]]]:
    if not running:
        await asyncio.sleep(POLL_S)
        return set()
    done, _ = await asyncio.wait(running, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
    return done


def _longest(execution: Execution) -> float:
    """Seconds an execution may take at most, a jail's restarts included."""
    return len(execution.tests) * (execution.limits.wall_s + 5.0)


def _seconds(text: str | None) -> float:
    return float(text) if text is not None and text.isdigit() else 0.0
