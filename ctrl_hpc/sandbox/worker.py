"""A worker: runs one execution at a time in its own jails and judges it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
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
from ctrl_hpc.sandbox import judge, languages, rootfs
from ctrl_hpc.sandbox.checkers import checked
from ctrl_hpc.sandbox.compiler import FETCHED_BYTES, LIMITS_OF_MOVES, Compiler
from ctrl_hpc.sandbox.course import Course
from ctrl_hpc.sandbox.inside import plain
from ctrl_hpc.sandbox.jail import Ended, Jail, Kind, Reason
from ctrl_hpc.sandbox.jails import ATTEMPTS, FAULTS, Jails, Role
from ctrl_hpc.sandbox.job_files import encode, job_files, pipes, program_files, result_of, source_of
from ctrl_hpc.sandbox.languages import Binaries, Built
from ctrl_hpc.sandbox.memory import Hierarchy, Watchdog

_FAREWELL_S = 0.25
"""How long a solution may take to flush and leave once the test that called it is over."""
_CHECK_EXTRA_S = 2.0
"""The test's process outlives the solution's limits by this, so that the solution's limit strikes first."""
_CHECK_EXTRA_MB = 128
"""The test's process holds what the solution answers, and this much of its own."""
_ROOM = 2
_LEAST_NATIVE_MB = 10
"""A binary's peak memory is not told apart from that of the process that became it, below this."""
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
        binaries: Binaries | None = None,
        testlib: str = "",
    ) -> None:
        """``hierarchy``: where this worker makes its cgroup, None where none can be made; ``judges``: special ones.

        ``testlib``: the text of ``testlib.h``, for checkers that include it.
        """
        self._testlib = testlib
        self._judges = judges or {}
        self._jails = Jails(root, watchdog, hierarchy, fresh)
        self._compiler = Compiler(self._jails, binaries or Binaries(rootfs.default_parent() / "binaries"))

    def start(self) -> None:
        """Start the jail for programs. Raises JailFault."""
        self._jails.get()

    def close(self) -> None:
        """End the jails and remove the cgroup."""
        self._jails.close()

    def execute(self, execution: Execution, recruit: Callable[[Course], None] | None = None) -> Verdict:
        """Run and judge all tests, or those up to the first failure; ``recruit`` may find workers that help."""
        if not execution.tests:
            return Verdict(status="unsupported", detail="there are no tests")
        course = Course(execution)
        self.help(course, recruit)
        return course.verdict()

    def help(self, course: Course, recruit: Callable[[Course], None] | None = None) -> None:
        """Run tests of a program until none is left to be taken."""
        execution = course.execution
        try:
            source = self._source(execution)
            if isinstance(source, bytes):
                asserts = [encode(test.code) for test in execution.tests if isinstance(test, AssertTest)]
                called = any(not isinstance(test, StdinTest) for test in execution.tests)
                self._jails.expect(b"\n".join([source, *asserts]), called=called)
            while (taken := course.take()) is not None:
                index, limits = taken
                if recruit is not None and course.left:
                    recruit(course)
                result = self._attempt(source, execution.tests[index], limits, execution)
                course.put(index, result)
        except BaseException as error:
            course.fail(error)
            raise
        finally:
            self._jails.end_if_fresh()

    def _source(self, execution: Execution) -> bytes | Built:
        """What is run: the program's text, or what came of its compilation."""
        language = languages.language(execution.language)
        if language is None:
            return source_of(execution.program, execution.preamble or "")
        return self._compiler.build(execution.language or "", execution.program, {}, execution.compile_timeout_s)

    def _attempt(self, source: bytes | Built, test: TestCase, limits: Limits, execution: Execution) -> TestResult:
        comparison = execution.comparison
        lost = TestResult(status="not_run")
        if isinstance(source, Built) and source.binary is None:
            return source.compiled
        for _ in range(ATTEMPTS):
            try:
                if isinstance(test, StdinTest):
                    return self._run_stdin(source, test, limits, execution)
                if isinstance(source, Built):
                    return TestResult(status="unsupported", stderr=b"functions are called in Python alone\n")
                if isinstance(test, FunctionTest):
                    return self._run_function(source, test, limits, comparison)
                return self._run_assert(source, test, limits)
            except FAULTS as error:
                lost = self._jails.lost(error)
        return lost

    def run_program(
        self,
        execution: Execution,
        stdin: str,
        files: dict[str, str],
        fetch: Sequence[str],
    ) -> tuple[TestResult, dict[str, str]]:
        """Run a program among files (base64 by path); its result, and the fetched files that are there."""
        fetched: dict[str, str] = {}
        source: bytes | Built = source_of(execution.program)
        limits = execution.limits
        if languages.language(execution.language) is not None:
            source = self._compiler.build(
                execution.language or "", execution.program, files, execution.compile_timeout_s
            )
            if source.binary is None:
                self._jails.end_if_fresh()
                return source.compiled, {}
        self._jails.expect(b"")  # the files may be modules: nothing is imported before they are there
        role = Role.NATIVE if isinstance(source, Built) else Role.PROGRAM
        try:
            with (
                job_files(json.dumps(files).encode()) as put,
                program_files(source, encode(stdin)) as run,
                job_files(json.dumps(list(fetch)).encode()) as got,
            ):
                placed = self._jails.run(Kind.PUT, put, LIMITS_OF_MOVES, role, keep=True)
                result = result_of(self._jails.run(_kind(source), run, limits, role, keep=True), run, limits)
                taken = self._jails.run(Kind.FETCH, got, LIMITS_OF_MOVES, role)
                if taken.exit_code == 0:
                    fetched = json.loads(got.contents(2, FETCHED_BYTES)[0])
        except FAULTS as error:
            return self._jails.lost(error), {}
        self._jails.end_if_fresh()
        if placed.exit_code != 0:
            raise ValueError("files: they do not fit into the working folder")
        return result, fetched

    def _run_stdin(self, source: bytes | Built, test: StdinTest, limits: Limits, execution: Execution) -> TestResult:
        stdin, expected = encode(test.stdin), encode(test.expected_stdout)
        limits = _with_room(limits, len(expected))
        role = Role.NATIVE if isinstance(source, Built) else Role.PROGRAM
        if role is Role.NATIVE and limits.memory_mb < _LEAST_NATIVE_MB:
            limits = dataclasses.replace(limits, memory_mb=_LEAST_NATIVE_MB)
        with program_files(source, stdin) as files:
            result = result_of(self._jails.run(_kind(source), files, limits, role), files, limits)
        if result.status == "accepted" and execution.checker is not None:
            return checked(
                result,
                execution.checker,
                stdin,
                expected,
                jails=self._jails,
                compiler=self._compiler,
                testlib=self._testlib,
            )
        if result.status == "accepted":
            comparison = execution.comparison
            rule = judge.rule(comparison, self._judges)
            try:
                same = rule.compare(result.stdout, expected, stdin)
            except (Exception, SystemExit) as error:  # noqa: BLE001 (an output that cannot be judged is the program's)
                remark = f"{comparison} cannot judge this output: {type(error).__name__}: {error}"
                return dataclasses.replace(result, status="unsupported", stderr=remark.encode("utf-8", "replace"))
            if not same:
                return _not_the_same(result, rule)
        return result

    def _run_function(self, source: bytes, test: FunctionTest, limits: Limits, comparison: str) -> TestResult:
        try:
            request = {"name": test.name, "method": True, "args": [plain.encode(item) for item in test.args]}
            limits = _with_room(limits, len(plain.dumps(test.expected)))
        except plain.Unsupported as error:
            return TestResult(status="unsupported", stderr=f"argument of {test.name}: {error}".encode())
        with job_files(source, b"", json.dumps(request).encode() + b"\n", b"") as files:
            result = result_of(self._jails.run(Kind.SERVE, files, limits), files, limits)
            if result.status != "accepted":
                return result
            reply, size = files.contents(5, limits.output_bytes)
        if size > limits.output_bytes:
            return dataclasses.replace(result, status="output_limit")
        rule = judge.rule(comparison, self._judges)
        status, remark = _judge_reply(reply, test, rule)
        if status == "wrong_answer":
            return _not_the_same(result, rule)
        return dataclasses.replace(result, status=status, stderr=result.stderr + remark.encode("utf-8", "replace"))

    def _run_assert(self, source: bytes, test: AssertTest, limits: Limits) -> TestResult:
        """The solution serves calls in one jail while the test makes them from another."""
        check_limits = Limits(
            cpu_s=limits.cpu_s + _CHECK_EXTRA_S,
            wall_s=limits.wall_s + _CHECK_EXTRA_S,
            memory_mb=limits.memory_mb + _CHECK_EXTRA_MB,
            processes=4,
        )
        program, tester = self._jails.get(), self._jails.get(Role.TEST)
        with job_files(source) as ours, job_files(encode(test.code)) as theirs:
            with pipes(2) as ((request_read, request_write), (reply_read, reply_write)):
                program.submit(Kind.SERVE, [*ours.given, request_read, reply_write], limits)
                tester.submit(Kind.CHECK, [*theirs.given, reply_read, request_write], check_limits)
            ended = tester.wait(check_limits.wall_s + 30)
            self._jails.replace_if_dirty(ended, Role.TEST)
            served = _dismissed(program, limits)
            self._jails.replace_if_dirty(served)
            result = result_of(served, ours, limits)
            report, _ = theirs.contents(3, 1 << 16)
        return _judge_check(result, served, ended, report)


def _dismissed(program: Jail, limits: Limits) -> Ended:
    """Wait for the solution's process, which sees its channel close; end it if it stays."""
    try:
        return program.wait(_FAREWELL_S)
    except TimeoutError:
        program.cancel()
        return program.wait(limits.wall_s + 30)


def _kind(source: bytes | Built) -> Kind:
    return Kind.EXECUTE if isinstance(source, Built) else Kind.RUN


def _with_room(limits: Limits, expected_bytes: int) -> Limits:
    """The limits with room for an output :data:`_ROOM` times as long as the expected one."""
    room = min(_ROOM * expected_bytes, judge.MOST_OUTPUT_BYTES)
    return limits if room <= limits.output_bytes else dataclasses.replace(limits, output_bytes=room)


def _not_the_same(result: TestResult, rule: judge.Rule) -> TestResult:
    if not rule.several_answers:
        return dataclasses.replace(result, status="wrong_answer")
    remark = b"several answers are right, and no judge that knows them is configured\n"
    return dataclasses.replace(result, status="unsupported", stderr=result.stderr + remark)


def _judge_reply(reply: bytes, test: FunctionTest, rule: judge.Rule) -> tuple[TestStatus, str]:
    """Status and a remark for stderr, from what the solution's process answered to the one call."""
    if not reply:
        return "runtime_error", f"the program ended before {test.name} returned\n"
    if reply.count(b",") + reply.count(b"[") + reply.count(b"{") > plain.MAX_ITEMS:
        return "unsupported", f"{test.name} returns more than {plain.MAX_ITEMS} items\n"
    try:
        answer = json.loads(reply)
        if not isinstance(answer, dict):
            raise plain.Unsupported("malformed reply")
        if "value" in answer:
            same = judge.same_result(answer["value"], test.expected, rule)
            return ("accepted", "") if same else ("wrong_answer", "")
    except Exception as error:  # noqa: BLE001 (whatever a program answers is its own doing, never a fault of ours)
        return "unsupported", f"{error or type(error).__name__}\n"
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
    elif checked.out_of_memory:
        status = "memory_limit"
    own_failure = result.status not in ("accepted", "runtime_error")
    if own_failure or (result.status == "runtime_error" and served.reason != Reason.CANCELLED and status != "accepted"):
        status = result.status
    return dataclasses.replace(result, status=status, stderr=result.stderr + report)
