"""What of a verdict is kept: every test's status, the times, and the failures that hints and feedback show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby

from ctrl_hpc.records import (
    AssertTest,
    Execution,
    FunctionTest,
    StdinTest,
    Summary,
    TestCase,
    TestResult,
    TestStatus,
    Verdict,
)

_KEPT_BYTES = 2000
"""Bytes of a shown failure's stdout (its beginning) and of its stderr (its end) that are kept."""
_NO_FAILURE = ("accepted", "not_run")


def answered(execution: Execution, verdict: Verdict) -> Verdict:
    """The verdict in the form that an execution asks for."""
    return slim(verdict, execution.tests) if execution.outputs == "shown" else verdict


def slim(verdict: Verdict, tests: Sequence[TestCase]) -> Verdict:
    """The verdict with, of its tests' results, the failures that are shown: the first one, and that of shortest input.

    Outputs are cut to :data:`_KEPT_BYTES`. A verdict that is slim already stays as it is.
    """
    if verdict.summary is not None:
        return verdict
    results = verdict.tests
    summary = Summary(
        statuses=runs(result.status for result in results),
        cpu_s=round(sum(result.cpu_s for result in results), 6),
        wall_s=round(sum(result.wall_s for result in results), 6),
        peak_memory_mb=max((result.peak_memory_mb for result in results), default=0.0),
    )
    failures = [number for number, result in enumerate(results) if result.status not in _NO_FAILURE]
    shown = {failures[0], shortest(failures, tests)} if failures else set()
    kept = tuple(
        replace(
            results[number],
            stdout=results[number].stdout[:_KEPT_BYTES],
            stderr=results[number].stderr[-_KEPT_BYTES:],
            index=number,
        )
        for number in sorted(shown)
    )
    return replace(verdict, tests=kept, summary=summary)


def fault(execution: Execution, detail: str) -> Verdict:
    """The verdict on an execution that no executor could judge."""
    total = len(execution.tests)
    if execution.outputs == "shown":
        return unrun(total, "sandbox_error", Verdict(status="sandbox_error", detail=detail))
    results = (TestResult(status="sandbox_error"),) * total
    return Verdict(status="sandbox_error", tests=results, detail=detail)


def unrun(total: int, status: TestStatus, verdict: Verdict) -> Verdict:
    """A slim verdict on ``total`` tests that all have one status and no result."""
    return replace(verdict, summary=Summary(statuses=((status, total),) if total else ()))


def runs(statuses: Iterable[TestStatus]) -> tuple[tuple[TestStatus, int], ...]:
    """Statuses in order, run-length encoded."""
    return tuple((status, len(list(group))) for status, group in groupby(statuses))


def shortest(failures: Sequence[int], tests: Sequence[TestCase]) -> int:
    """The first of some tests, by number, whose input is the shortest."""
    return min(failures, key=lambda number: len(asked(tests[number])))


def asked(test: TestCase) -> str:
    """The input of a test, as text."""
    match test:
        case StdinTest():
            return test.stdin
        case FunctionTest():
            return f"{test.name}({', '.join(map(repr, test.args))})"
        case AssertTest():
            return test.code
