"""Prometheus metrics of the executor service."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

from ctrl_hpc.sandbox.pool import Sandbox

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
