"""A worker: runs one execution at a time in its own jails and judges it."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from ctrl_hpc.records import (
    AssertTest,
    Execution,
    FunctionTest,
    Limits,
    StdinTest,
    TestCase,
    TestResult,
    TestStatus,
    Verdict,
)
from ctrl_hpc.sandbox import judge
from ctrl_hpc.sandbox.inside import plain
from ctrl_hpc.sandbox.jail import Ended, Jail, JailFault, Kind, Reason, memory_file
from ctrl_hpc.sandbox.memory import Hierarchy, MemoryGroup, Watchdog

_ATTEMPTS = 2
"""A test whose jail broke is run once more in a new one; a second fault is reported as ``sandbox_error``."""
_FAREWELL_S = 0.25
"""How long a solution may take to flush and leave once the test that called it is over."""
_CHECK_EXTRA_S = 2.0
"""The test's process outlives the solution's limits by this, so that the solution's limit strikes first."""
_TESTS_WORTH_PRELOADING = 8
"""From so many tests on, loading modules once for all costs less than each test loading what it uses."""
_CHECK_MEMORY_MB = 1024
_ROOM = 2
_FETCHED_BYTES = 24 << 20
_CHECK_STATUS: dict[int | None, TestStatus] = {
    0: "accepted",
    10: "wrong_answer",
    11: "runtime_error",
    12: "unsupported",
    13: "runtime_error",
    14: "wrong_answer",
    15: "runtime_error",
}
"""Status by the exit code of the test's process, see ``inside/checker.py``."""


class Worker:
    """Owns a jail for programs and one for tests that call them, kept warm between programs unless ``fresh``."""

    def __init__(
        self,
        root: Path,
        watchdog: Watchdog,
        hierarchy: Hierarchy | None,
        fresh: bool = False,
        judges: Mapping[str, judge.Comparison] | None = None,
    ) -> None:
        """``hierarchy``: where this worker makes its cgroup, None where none can be made; ``judges``: special ones."""
        self._root = root
        self._watchdog = watchdog
        self._group = MemoryGroup(hierarchy) if hierarchy is not None else None
        self._fresh = fresh
        self._judges = judges or {}
        self._tests = 1
        self._jails: dict[bool, Jail] = {}

    def jail(self, trusted: bool = False) -> Jail:
        """The jail for programs, or for tests' own code; started when it is not there. Raises JailFault."""
        if trusted not in self._jails:
            preload = not self._fresh or self._tests >= _TESTS_WORTH_PRELOADING
            self._jails[trusted] = (
                Jail(self._root, preload=preload)
                if trusted
                else Jail(self._root, self._watchdog, self._group, preload=preload)
            )
        return self._jails[trusted]

    def close(self) -> None:
        """End the jails and remove the cgroup."""
        self._end_jails()
        if self._group is not None:
            self._group.close()
            self._group = None

    def _end_jails(self) -> None:
        while self._jails:
            self._jails.popitem()[1].close()

    def execute(self, execution: Execution) -> Verdict:
        """Run and judge all tests, or those up to the first failure."""
        if not execution.tests:
            return Verdict(status="unsupported", detail="there are no tests")
        source = _source(execution.program, execution.preamble or "")
        self._tests = len(execution.tests)
        results: list[TestResult] = []
        first_failure = -1
        for index, test in enumerate(execution.tests):
            if first_failure >= 0 and execution.stop_at_first_failure:
                results.append(TestResult(status="not_run"))
                continue
            results.append(self._attempt(source, test, execution.limits, execution.comparison))
            if results[-1].status != "accepted" and first_failure < 0:
                first_failure = index
        if self._fresh:
            self._end_jails()
        if first_failure < 0:
            return Verdict(status="accepted", tests=tuple(results))
        return _rejected(results, first_failure)

    def _attempt(self, source: bytes, test: TestCase, limits: Limits, comparison: str) -> TestResult:
        fault = ""
        for _ in range(_ATTEMPTS):
            try:
                if isinstance(test, StdinTest):
                    return self._run_stdin(source, test, limits, comparison)
                if isinstance(test, FunctionTest):
                    return self._run_function(source, test, limits, comparison)
                return self._run_assert(source, test, limits)
            except JailFault as error:
                fault = str(error)
                self._end_jails()
        return TestResult(status="sandbox_error", stderr=fault.encode())

    def run_program(
        self, program: str, stdin: str, limits: Limits, files: dict[str, str], fetch: Sequence[str]
    ) -> tuple[TestResult, dict[str, str]]:
        """Run a program among files (base64 by path); its result, and the fetched files that are there."""
        source, fetched = _source(program), {}
        self._tests = 1
        limits_of_moves = Limits(cpu_s=10.0, wall_s=30.0, output_bytes=_FETCHED_BYTES)
        try:
            with (
                _files(json.dumps(files).encode(), b"", b"", b"") as put,
                _files(source, _encode(stdin), b"", b"") as run,
                _files(json.dumps(list(fetch)).encode(), b"", b"", b"") as got,
            ):
                placed = self.jail().run(Kind.PUT, put, limits_of_moves, keep=True)
                result = _result(self.jail().run(Kind.RUN, run, limits, keep=True), run, limits)
                taken = self._run(Kind.FETCH, got, limits_of_moves)
                if taken.exit_code == 0:
                    fetched = json.loads(_contents(got[2], _FETCHED_BYTES)[0])
        except JailFault as error:
            self._end_jails()
            return TestResult(status="sandbox_error", stderr=str(error).encode()), {}
        if self._fresh:
            self._end_jails()
        if placed.exit_code != 0:
            raise ValueError("files: they do not fit into the working folder")
        return result, fetched

    def _run(self, kind: Kind, fds: Sequence[int], limits: Limits) -> Ended:
        ended = self.jail().run(kind, fds, limits)
        self._replace_if_dirty(ended)
        return ended

    def _replace_if_dirty(self, ended: Ended) -> None:
        if ended.dirty:
            self._jails.pop(False).close()

    def _run_stdin(self, source: bytes, test: StdinTest, limits: Limits, comparison: str) -> TestResult:
        stdin, expected = _encode(test.stdin), _encode(test.expected_stdout)
        limits = _with_room(limits, len(expected))
        with _files(source, stdin, b"", b"") as fds:
            result = _result(self._run(Kind.RUN, fds, limits), fds, limits)
        if result.status == "accepted":
            rule = judge.rule(comparison, self._judges)
            try:
                same = rule.compare(result.stdout, expected, stdin)
            except Exception as error:
                if comparison not in self._judges:
                    raise
                remark = f"judge {comparison} failed: {type(error).__name__}: {error}"
                return dataclasses.replace(result, status="sandbox_error", stderr=remark.encode())
            if not same:
                return _not_the_same(result, rule)
        return result

    def _run_function(self, source: bytes, test: FunctionTest, limits: Limits, comparison: str) -> TestResult:
        try:
            request = {"name": test.name, "method": True, "args": [plain.encode(item) for item in test.args]}
            limits = _with_room(limits, len(plain.dumps(test.expected)))
        except plain.Unsupported as error:
            return TestResult(status="unsupported", stderr=f"argument of {test.name}: {error}".encode())
        with _files(source, b"", b"", b"", json.dumps(request).encode() + b"\n", b"") as fds:
            result = _result(self._run(Kind.SERVE, fds, limits), fds, limits)
            if result.status != "accepted":
                return result
            reply, size = _contents(fds[5], limits.output_bytes)
        if size > limits.output_bytes:
            return dataclasses.replace(result, status="output_limit")
        rule = judge.rule(comparison, self._judges)
        status, remark = _judge_reply(reply, test, rule)
        if status == "wrong_answer":
            return _not_the_same(result, rule)
        return dataclasses.replace(result, status=status, stderr=result.stderr + remark.encode())

    def _run_assert(self, source: bytes, test: AssertTest, limits: Limits) -> TestResult:
        """The solution serves calls in one jail while the test makes them from another."""
        check_limits = Limits(
            cpu_s=limits.cpu_s + _CHECK_EXTRA_S,
            wall_s=limits.wall_s + _CHECK_EXTRA_S,
            memory_mb=_CHECK_MEMORY_MB,
            processes=4,
        )
        with _files(source, b"", b"", b"") as ours, _files(_encode(test.code), b"", b"", b"") as theirs:
            with _pipes(2) as ((request_read, request_write), (reply_read, reply_write)):
                self.jail().submit(Kind.SERVE, [*ours, request_read, reply_write], limits)
                self.jail(trusted=True).submit(Kind.CHECK, [*theirs, reply_read, request_write], check_limits)
            checked = self.jail(trusted=True).wait(check_limits.wall_s + 30)
            served = self._dismiss(limits)
            self._replace_if_dirty(served)
            result = _result(served, ours, limits)
            report, _ = _contents(theirs[3], 1 << 16)
        return _judge_check(result, served, checked, report)

    def _dismiss(self, limits: Limits) -> Ended:
        """Wait for the solution's process, which sees its channel close; end it if it stays."""
        try:
            return self.jail().wait(_FAREWELL_S)
        except TimeoutError:
            self.jail().cancel()
            return self.jail().wait(limits.wall_s + 30)


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _source(program: str, preamble: str = "") -> bytes:
    """What a jail takes as source: the preamble, which holds no zero byte, one such byte, the program."""
    return preamble.encode() + b"\0" + program.encode("utf-8", "surrogatepass")


def _with_room(limits: Limits, expected_bytes: int) -> Limits:
    """The limits with room for an output :data:`_ROOM` times as long as the expected one."""
    room = min(_ROOM * expected_bytes, judge.MOST_OUTPUT_BYTES)
    return limits if room <= limits.output_bytes else dataclasses.replace(limits, output_bytes=room)


def _not_the_same(result: TestResult, rule: judge.Rule) -> TestResult:
    if not rule.several_answers:
        return dataclasses.replace(result, status="wrong_answer")
    remark = b"several answers are right, and no judge that knows them is configured\n"
    return dataclasses.replace(result, status="unsupported", stderr=result.stderr + remark)


@contextmanager
def _files(*contents: bytes) -> Iterator[list[int]]:
    fds: list[int] = []
    try:
        for content in contents:
            fds.append(memory_file("job", content))
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


@contextmanager
def _pipes(count: int) -> Iterator[list[tuple[int, int]]]:
    pairs = [os.pipe() for _ in range(count)]
    try:
        yield pairs
    finally:
        for fd in sum(pairs, ()):
            os.close(fd)


def _contents(fd: int, limit: int) -> tuple[bytes, int]:
    """The first ``limit`` bytes of a file, and its size."""
    size = os.fstat(fd).st_size
    return (os.pread(fd, min(size, limit), 0) if size else b""), size


def _result(ended: Ended, fds: Sequence[int], limits: Limits) -> TestResult:
    """What the program did, ``accepted`` standing for "nothing wrong so far"."""
    stdout, stdout_size = _contents(fds[2], limits.output_bytes)
    stderr, stderr_size = _contents(fds[3], limits.output_bytes)
    return TestResult(
        status=judge.failure(ended, max(stdout_size, stderr_size), limits) or "accepted",
        stdout=stdout,
        stderr=stderr,
        exit_code=ended.exit_code,
        signal=ended.signal,
        cpu_s=ended.cpu_s,
        wall_s=ended.wall_s,
        peak_memory_mb=ended.peak_memory_mb,
    )


def _judge_reply(reply: bytes, test: FunctionTest, rule: judge.Rule) -> tuple[TestStatus, str]:
    """Status and a remark for stderr, from what the solution's process answered to the one call."""
    try:
        answer = json.loads(reply)
        if not isinstance(answer, dict):
            raise plain.Unsupported("malformed reply")
        if "value" in answer:
            same = judge.same_result(answer["value"], test.expected, rule)
            return ("accepted", "") if same else ("wrong_answer", "")
    except (plain.Unsupported, ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
        if not reply:
            return "runtime_error", f"the program ended before {test.name} returned\n"
        return "unsupported", f"{error}\n"
    if "missing" in answer:
        return "runtime_error", f"NameError: the program does not define {test.name}\n"
    if "raise" in answer:
        return "runtime_error", ""
    return "unsupported", f"{str(answer.get('unsupported'))[:200]}\n"


def _judge_check(result: TestResult, served: Ended, checked: Ended, report: bytes) -> TestResult:
    """The status of an assert test, from how the solution's and the test's processes ended."""
    status = _CHECK_STATUS.get(checked.exit_code, "wrong_answer")
    if checked.reason in (Reason.CPU_LIMIT, Reason.WALL_LIMIT):
        status = "time_limit"
    own_failure = result.status not in ("accepted", "runtime_error")
    if own_failure or (result.status == "runtime_error" and served.reason != Reason.CANCELLED and status != "accepted"):
        status = result.status
    return dataclasses.replace(result, status=status, stderr=result.stderr + report)


def _rejected(results: list[TestResult], index: int) -> Verdict:
    status = results[index].status
    assert status != "not_run"
    last_lines = results[index].stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
    detail = f"test {index + 1} of {len(results)}: {status}"
    if last_lines and status in ("runtime_error", "unsupported", "sandbox_error"):
        detail += f": {last_lines[0][:300]}"
    return Verdict(status=status, tests=tuple(results), detail=detail)
