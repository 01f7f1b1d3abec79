"""The course of an execution: which of its tests are to be run, by one worker or several, and when the answer is known.

Workers take tests in order and put results in any. What comes out is the same for every number of workers: with
``stop_at_first_failure`` whatever a worker found beyond the first failure is dropped.
"""

from __future__ import annotations

import dataclasses
import threading
import time

from ctrl_hpc.records import Execution, Limits, TestResult, Verdict

_NOT_RUN = TestResult(status="not_run")


class Course:
    """The tests of an execution and their results so far; safe to be used from several threads."""

    def __init__(self, execution: Execution) -> None:
        self.execution = execution
        self._results: list[TestResult | None] = [None] * len(execution.tests)
        self._next, self._stop = 0, len(execution.tests)
        self._first_failure = len(execution.tests)
        """The lowest index of a test that failed so far."""
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._end = float("inf")
        if execution.time_budget_s is not None:
            self._end = time.monotonic() + execution.time_budget_s

    def take(self) -> tuple[int, Limits] | None:
        """The index of the next test and the limits to run it under; None when no more are to be run."""
        with self._changed:
            failed = self._first_failure < len(self._results)
            over = self._error is not None or (failed and self.execution.stop_at_first_failure)
            if over or self._next >= self._stop:
                return None
            left_s = self._end - time.monotonic()
            if left_s <= 0:
                self._stop = self._next + (not failed)
                if not failed:
                    remark = f"the {self.execution.time_budget_s} s for all tests together are spent\n"
                    self._note(self._next, TestResult(status="time_limit", stderr=remark.encode()))
                return None
            index, self._next = self._next, self._next + 1
        limits = self.execution.limits
        if left_s < limits.wall_s:
            limits = dataclasses.replace(limits, wall_s=max(left_s, 0.001))
        return index, limits

    @property
    def left(self) -> int:
        """Tests that nobody has taken yet."""
        return self._stop - self._next

    def put(self, index: int, result: TestResult) -> None:
        """The result of a test that was taken."""
        with self._changed:
            self._note(index, result)
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """A worker cannot go on: :meth:`results` raises what stopped it."""
        with self._changed:
            self._error = error
            self._changed.notify_all()

    def _note(self, index: int, result: TestResult) -> None:
        self._results[index] = result
        if result.status != "accepted":
            self._first_failure = min(self._first_failure, index)

    def verdict(self) -> Verdict:
        """The verdict, once the tests that decide it have ended; those taken by other workers are waited for."""
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or None not in self._results[: self._needed()])
            if self._error is not None:
                raise self._error
            kept = self._results[: self._needed()]
        results = tuple(result or _NOT_RUN for result in [*kept, *[None] * (len(self._results) - len(kept))])
        if self._first_failure == len(results):
            return Verdict(status="accepted", tests=results)
        return _rejected(results, self._first_failure)

    def _needed(self) -> int:
        """How many of the first tests the verdict is made of."""
        if self.execution.stop_at_first_failure:
            return min(self._first_failure + 1, self._stop)
        return self._stop


def _rejected(results: tuple[TestResult, ...], index: int) -> Verdict:
    status = results[index].status
    assert status != "not_run"
    lines = results[index].stderr.decode("utf-8", "replace").strip().splitlines()
    last_lines = [line for line in lines if status == "compile_error" and " error: " in line][:1] or lines[-1:]
    detail = f"test {index + 1} of {len(results)}: {status}"
    if last_lines and status in ("compile_error", "runtime_error", "unsupported", "sandbox_error"):
        detail += f": {last_lines[0][:300]}"
    return Verdict(status=status, tests=results, detail=detail)
