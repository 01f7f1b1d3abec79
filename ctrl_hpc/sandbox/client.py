"""The executor array as an ``Executor``: executions in, verdicts out, whichever services live or die meanwhile."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from typing import Any, Self

from ctrl_hpc import jsonl
from ctrl_hpc.records import Execution, StoredTests, Verdict
from ctrl_hpc.records.verdicts import fault
from ctrl_hpc.sandbox.languages import COMPILE_S
from ctrl_hpc.service.fleet import Chunk, Fleet
from ctrl_hpc.service.json_client import Fault, Lacking, TooLarge

_MAX_LOSSES = 6
"""Times an execution may be lost with a service, or fault, before its verdict is ``sandbox_error``."""
_CHUNKS_IN_FLIGHT = 4
"""Requests a service has in hand at a time, so that its workers never wait for the network."""
_MAX_CHUNK = 32
"""Executions of a request."""
_MAX_CHUNK_BYTES = 16 << 20


class ExecutorClient:
    """Spreads executions over the live services of an array.

    Work starts with the first service, grows with each that comes, and what a lost one had in hand is given to
    another. A fault is retried elsewhere and never becomes a wrong answer; an execution too large for a service ends
    alone, as ``sandbox_error``. Calls may come from several threads.
    """

    def __init__(
        self, endpoints: Callable[[], Sequence[str]], token: str | None = None, *, patience_s: float = 600.0
    ) -> None:
        """``token``: the services' bearer token; ``patience_s``: longest time without an answer of any."""
        self._fleet = Fleet("executor", endpoints, token=token, patience_s=patience_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; calls in flight in other threads are cancelled."""
        self._fleet.close()

    def run_many(self, executions: Sequence[Execution]) -> list[Verdict]:
        """A verdict for each execution, in order; an environment fault that persists is ``sandbox_error``.

        Raises RuntimeError when none answers for ``patience_s``, ValueError when a service refuses a request.
        """
        if not executions:
            return []
        bodies = [json.dumps(jsonl.encode(execution), separators=(",", ":")) for execution in executions]
        verdicts: dict[int, Verdict] = {}

        async def ask(url: str, chunk: Chunk) -> Sequence[Chunk]:
            body = '{"executions":[' + ",".join(bodies[row] for row in chunk.rows) + "]}"
            timeout_s = sum(_longest(executions[row]) for row in chunk.rows) * _CHUNKS_IN_FLIGHT + 120
            answer = await self._post(url, body, timeout_s, [executions[row] for row in chunk.rows])
            verdicts.update(zip(chunk.rows, _verdicts(url, answer, len(chunk.rows)), strict=True))
            faulty = [row for row in chunk.rows if verdicts[row].status == "sandbox_error"]
            return again(Chunk(faulty, chunk.losses), "") if faulty else []

        def lost(chunk: Chunk, error: Exception) -> list[Chunk]:
            return again(Chunk(chunk.rows, _MAX_LOSSES) if isinstance(error, TooLarge) else chunk, str(error))

        def again(chunk: Chunk, reason: str) -> list[Chunk]:
            """Each alone, to be tried again; after too many losses their ``sandbox_error`` stands."""
            if chunk.losses + 1 < _MAX_LOSSES:
                return [Chunk([row], chunk.losses + 1) for row in chunk.rows]
            for row in chunk.rows:
                verdicts.setdefault(row, fault(executions[row], reason))
            return []

        self._fleet.spread(lambda services: _chunks(bodies, services), ask, lost, _CHUNKS_IN_FLIGHT)
        return [verdicts[row] for row in range(len(executions))]

    async def _post(self, url: str, body: str, timeout_s: float, executions: Sequence[Execution]) -> Any:
        """The answer to a request; what it names and a service lacks is sent there first."""
        try:
            return await self._fleet.post(url, "/run_tests", body, timeout_s)
        except Lacking as error:
            named = {item.tests.sha256: item.tests for item in executions if isinstance(item.tests, StoredTests)}
            for sha256 in error.missing:
                content = await asyncio.to_thread(named[sha256].content) if sha256 in named else None
                if content is None:
                    raise Fault(f"{error}; the tests {sha256[:12]} are not in the run's store") from None
                await self._fleet.post(url, "/tests", content.decode("utf-8", "surrogatepass"), timeout_s)
        try:
            return await self._fleet.post(url, "/run_tests", body, timeout_s)
        except Lacking as error:
            raise Fault(str(error)) from None


def _verdicts(url: str, answer: Any, count: int) -> list[Verdict]:
    try:
        verdicts = [jsonl.decode(Verdict, item) for item in answer["verdicts"]]
    except (ValueError, KeyError, TypeError) as error:
        raise Fault(f"{url}: malformed answer: {error}") from None
    if len(verdicts) != count:
        raise Fault(f"{url}: {len(verdicts)} verdicts for {count} executions")
    return verdicts


def _chunks(bodies: Sequence[str], services: int) -> list[Chunk]:
    """Rows in chunks small enough to keep every service busy, by count and by bytes."""
    most = max(1, min(_MAX_CHUNK, len(bodies) // max(1, services * _CHUNKS_IN_FLIGHT)))
    chunks: list[Chunk] = []
    size = 0
    for row, body in enumerate(bodies):
        if not chunks or len(chunks[-1].rows) >= most or size + len(body) > _MAX_CHUNK_BYTES:
            chunks.append(Chunk([]))
            size = 0
        chunks[-1].rows.append(row)
        size += len(body)
    return chunks


def _longest(execution: Execution) -> float:
    """Seconds an execution may take at most, a jail's restarts included."""
    tests_s = len(execution.tests) * (execution.limits.wall_s + 5.0)
    if execution.language is not None:
        tests_s += 2 * (COMPILE_S if execution.compile_timeout_s is None else execution.compile_timeout_s)
    return tests_s if execution.time_budget_s is None else min(tests_s, execution.time_budget_s + 60.0)
