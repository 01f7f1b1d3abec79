"""The executor service: a sandbox behind HTTP, with SandboxFusion's routes beside its own, and its metrics."""

from __future__ import annotations

import asyncio
import json
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from ctrl_hpc import jsonl
from ctrl_hpc.records import Execution, Limits, StdinTest, StoredTests, TestCase, TestResult, Verdict
from ctrl_hpc.sandbox import fusion, judge, rootfs
from ctrl_hpc.sandbox.sandbox import Sandbox
from ctrl_hpc.service import http
from ctrl_hpc.store.tests import TestStore

_BUCKETS = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class _Counts(Collector):
    """The sandbox's own counts, read when they are asked for."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox

    def collect(self) -> list[CounterMetricFamily]:
        """One family a count."""
        counts = self._sandbox.counts
        return [
            CounterMetricFamily("executor_runs", "Executions run.", counts["executions"]),
            CounterMetricFamily("executor_tests", "Tests run.", counts["tests"]),
            CounterMetricFamily("executor_cache_hits", "Verdicts taken from the cache.", counts["cache_hits"]),
            CounterMetricFamily("executor_joined", "Executions that joined one in flight.", counts["joined"]),
        ]


class Metrics:
    """The registry of one service."""

    def __init__(self, sandbox: Sandbox) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Counts(sandbox))
        self._verdicts = Counter("executor_verdicts", "Verdicts given.", ["status"], registry=self._registry)
        self._refused = Counter("executor_refused", "Requests refused, too much waiting.", registry=self._registry)
        self._latency = Histogram(
            "executor_request_seconds", "Time from a request's admission to its answer.", buckets=_BUCKETS,
            registry=self._registry,
        )  # fmt: skip
        waiting = Gauge("executor_queue_length", "Executions that wait or run.", registry=self._registry)
        waiting.set_function(lambda: sandbox.unfinished)
        workers = Gauge("executor_workers", "Programs that run at once.", registry=self._registry)
        workers.set(sandbox.workers)

    def answered(self, statuses: Sequence[str], seconds: float) -> None:
        """Count an answered request's verdicts."""
        for status in statuses:
            self._verdicts.labels(status).inc()
        self._latency.observe(seconds)

    def refused(self) -> None:
        """Count a refused request."""
        self._refused.inc()

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


MAX_BODY_BYTES = 256 << 20
_MAX_WAITING = 1024
"""Executions that may wait or run at once."""
_RETRY_AFTER_S = "1"
_LOCAL_TESTS_BYTES = 4 << 30
"""Compressed tests that a service keeps on its node's own disk."""


class _Full(Exception):
    """More work than may wait."""


class _TestsMissing(Exception):
    """Tests that executions name and that are not here: their hashes."""

    def __init__(self, missing: list[str]) -> None:
        super().__init__(f"{len(missing)} sets of tests are not here, {missing[0][:12]} first; POST them to /tests")
        self.missing = missing


class ExecutorService:
    """A sandbox behind HTTP: admission, metrics, and whether it drains."""

    def __init__(self, sandbox: Sandbox, max_waiting: int = _MAX_WAITING) -> None:
        self.sandbox, self.max_waiting = sandbox, max_waiting
        self.draining = False
        self.host = socket.gethostname()
        self.metrics = Metrics(sandbox)

    async def run(self, executions: list[Execution]) -> list[Verdict]:
        """Verdicts in order. Raises _Full when too much waits; a batch always fits an idle service."""
        self._admit(len(executions))
        start = time.monotonic()
        for execution in executions:
            self.sandbox.check(execution)
        named = {item.tests.sha256 for item in executions if isinstance(item.tests, StoredTests)}
        if missing := sorted(sha256 for sha256 in named if sha256 not in self.sandbox.tests):
            raise _TestsMissing(missing)
        futures = [self.sandbox.submit(execution) for execution in executions]
        try:
            verdicts = await asyncio.gather(*map(asyncio.wrap_future, futures))
        except asyncio.CancelledError:
            for future in futures:
                future.cancel()
            raise
        self.metrics.answered([verdict.status for verdict in verdicts], time.monotonic() - start)
        return verdicts

    async def run_among_files(
        self, body: fusion.RunCodeBody, language: str | None, limits: Limits
    ) -> tuple[TestResult, dict[str, str]]:
        """A program run among its request's files, and the files fetched after it."""
        self._admit(1)
        start = time.monotonic()
        files = {
            path: content for path, content in body.files.items() if content is not None and fusion.IGNORED not in path
        }
        future = self.sandbox.submit_program(
            body.code,
            body.stdin or "",
            limits,
            files,
            body.fetch_files,
            language=language,
            compile_timeout_s=body.compile_timeout,
        )
        result, fetched = await asyncio.wrap_future(future)
        self.metrics.answered([result.status], time.monotonic() - start)
        return result, fetched

    def _admit(self, count: int) -> None:
        waiting = self.sandbox.unfinished
        if self.draining or (waiting and waiting + count > self.max_waiting):
            self.metrics.refused()
            raise _Full


def create_app(
    sandbox: Sandbox,
    *,
    token: str | None = None,
    own_user: bool = False,
    max_waiting: int = _MAX_WAITING,
    max_body_bytes: int = MAX_BODY_BYTES,
    on_started: Callable[[], Awaitable[None]] | None = None,
) -> FastAPI:
    """The HTTP application over a sandbox; ``app.state.service`` is its :class:`ExecutorService`."""
    state = ExecutorService(sandbox, max_waiting)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if on_started is not None:
            await on_started()
        yield
        state.draining = True

    app = FastAPI(title="ctrl-hpc executor", docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = state
    app.add_middleware(
        http.Gate,  # type: ignore[arg-type]
        token=token,
        own_user=own_user,
        max_body_bytes=max_body_bytes,
        open_paths=frozenset({"/health"}),
    )
    _add_error_handlers(app, state)
    _add_routes(app, state)
    return app


def _add_error_handlers(app: FastAPI, state: ExecutorService) -> None:
    @app.exception_handler(http.BodyTooLarge)
    async def too_large(_: Request, error: http.BodyTooLarge) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=413)

    @app.exception_handler(ValueError)
    async def bad_value(_: Request, error: ValueError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, status_code=400)

    @app.exception_handler(RequestValidationError)
    async def bad_body(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse({"detail": f"{where or 'body'}: {first['msg']}"}, status_code=400)

    @app.exception_handler(_TestsMissing)
    async def lacking(_: Request, error: _TestsMissing) -> JSONResponse:
        return JSONResponse({"detail": str(error), "missing": error.missing}, status_code=424)

    @app.exception_handler(_Full)
    async def busy(_: Request, __: _Full) -> JSONResponse:
        status = 503 if state.draining else 429
        return JSONResponse({"detail": "busy"}, status_code=status, headers={"retry-after": _RETRY_AFTER_S})


def _add_routes(app: FastAPI, state: ExecutorService) -> None:
    @app.post("/run_tests")
    async def run_tests(request: Request) -> Response:
        sent = await request.body()
        verdicts = await state.run(await _apart(len(sent), _executions, sent))
        body = json.dumps({"verdicts": jsonl.encode(verdicts)}, separators=(",", ":"))
        return Response(body, media_type="application/json")

    @app.post("/tests")
    async def tests(request: Request) -> JSONResponse:
        content = await request.body()
        await asyncio.to_thread(jsonl.parse, tuple[TestCase, ...], content)
        return JSONResponse({"sha256": await asyncio.to_thread(state.sandbox.tests.add, content)})

    @app.post("/run_code")
    async def run_code(body: fusion.RunCodeBody) -> JSONResponse:
        language = fusion.check_language(body.language, "language")
        compiled = language is not None
        limits = fusion.limits(body.run_timeout, body.memory_limit_MB)
        if body.files or body.fetch_files:
            result, files = await state.run_among_files(body, language, limits)
            return JSONResponse(fusion.run_response(result, state.host, files, compiled=compiled))
        test = StdinTest(stdin=body.stdin or "", expected_stdout="")
        timeout_s = body.compile_timeout if compiled else None
        execution = Execution(
            program=body.code, tests=(test,), limits=limits, language=language, compile_timeout_s=timeout_s
        )
        (verdict,) = await state.run([execution])
        return JSONResponse(fusion.run_response(verdict.tests[0], state.host, compiled=compiled))

    @app.post("/submit")
    async def submit(body: fusion.SubmitBody) -> JSONResponse:
        custom: list[fusion.Block] = []
        if body.config.custom_extract_logic:
            (found,) = await state.run([fusion.extraction(body)])
            custom = fusion.extracted(found)
        execution, code = await _apart(_size(body), partial(fusion.submission, custom=custom), body)
        (verdict,) = await state.run([execution])
        return JSONResponse(fusion.submit_response(body, execution, code, verdict, state.host))

    @app.get("/health")
    async def health() -> JSONResponse:
        status = "draining" if state.draining else "ok" if state.sandbox.alive else "dead"
        answer = {"status": status, "workers": state.sandbox.workers, "waiting": state.sandbox.unfinished}
        return JSONResponse(answer, status_code=200 if status == "ok" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(state.metrics.text(), media_type="text/plain; version=0.0.4")


_LARGE = 1 << 16
"""What takes longer to read than a moment is read in a thread, so that other requests are answered meanwhile."""


async def _apart[A, R](size: int, read: Callable[[A], R], body: A) -> R:
    return await asyncio.to_thread(read, body) if size > _LARGE else read(body)


def _size(body: fusion.SubmitBody) -> int:
    data = body.config.provided_data
    tests = data.get("test") if isinstance(data, dict) else None
    return len(body.completion) + (len(tests) if isinstance(tests, str) else _LARGE)


def _executions(body: bytes) -> list[Execution]:
    """The executions of a request; ValueError names what is wrong with them."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not JSON: {error}") from None
    if not isinstance(data, dict) or not isinstance(data.get("executions"), list):
        raise ValueError("executions: a list is needed")
    return [jsonl.decode(Execution, item, f"executions[{i}]") for i, item in enumerate(data["executions"])]


def serve(
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    workers: int = 2,
    cache_dir: str | Path | None = None,
    token: str | None = None,
    own_user: bool = False,
    on_ready: Callable[[str], None] | None = None,
    max_waiting: int = _MAX_WAITING,
    max_body_bytes: int = MAX_BODY_BYTES,
    drain_s: int = 60,
    judges: Mapping[str, str] | None = None,
    python: str = "",
    packages: Sequence[str] = rootfs.DEFAULT_PACKAGES,
    tests_dir: str | Path | None = None,
    testlib: str = "",
) -> None:
    """Serve until SIGTERM, SIGINT or SIGUSR2, then finish what was accepted (at most ``drain_s``) and return.

    ``judges`` are special ones, ``FILE.py:FUNCTION`` by name; ``on_ready`` gets the URL once the service answers;
    ``python`` and ``packages`` are what programs run with, see :class:`Sandbox`; ``tests_dir`` has the tests that
    executions name, others are taken over HTTP. ``token`` and ``own_user``: see :func:`ctrl_hpc.service.http.access`.
    Raises ValueError when the port is in use or this machine cannot isolate programs.
    """
    token, own_user = http.access(host, token, own_user)
    sock = http.listen(host, port)
    try:
        special = judge.load(judges or {})
        shared = [Path(tests_dir)] if tests_dir is not None else []
        with (
            tempfile.TemporaryDirectory(prefix="ctrl-hpc-tests-") as here,
            TestStore(Path(here), *shared, max_bytes=_LOCAL_TESTS_BYTES) as tests,
            Sandbox(
                workers,
                cache_dir=cache_dir,
                judges=special,
                python=python,
                packages=packages,
                tests=tests,
                testlib=testlib,
            ) as sandbox,
        ):
            app = partial(
                create_app,
                sandbox,
                token=token,
                own_user=own_user,
                max_waiting=max_waiting,
                max_body_bytes=max_body_bytes,
            )
            _until_told(app, sock, on_ready, drain_s)
    finally:
        sock.close()


def _until_told(
    app: Callable[..., FastAPI], sock: socket.socket, on_ready: Callable[[str], None] | None, drain_s: int
) -> None:
    """Serve what ``app(on_started=...)`` makes until a signal ends it. Raises what ``on_ready`` raised."""
    failures: list[Exception] = []

    async def ready() -> None:
        try:
            if on_ready is not None:
                await asyncio.to_thread(on_ready, http.url(sock))
        except Exception as error:  # noqa: BLE001 (raised again once the server has ended)
            failures.append(error)
            server.should_exit = True

    server = http.DrainingServer(http.settings(app(on_started=ready), drain_s=drain_s))
    server.run(sockets=[sock])
    if failures:
        raise failures[0]
