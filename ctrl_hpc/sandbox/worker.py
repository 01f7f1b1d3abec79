"""A worker: runs one execution at a time in its own jails and judges it."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
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
from ctrl_hpc.sandbox.course import Course
from ctrl_hpc.sandbox.inside import plain
from ctrl_hpc.sandbox.jail import (
    CANNOT_EXECUTE,
    Ended,
    Jail,
    JailFault,
    Kind,
    Reason,
    executable,
    memory_file,
    reopened,
)
from ctrl_hpc.sandbox.languages import Binaries, Built, Language
from ctrl_hpc.sandbox.memory import Hierarchy, MemoryGroup, Watchdog
from ctrl_hpc.sandbox.nsjail import Purpose

_ATTEMPTS = 2
"""A test whose jail broke is run once more in a new one; a second fault is reported as ``sandbox_error``."""
_FAREWELL_S = 0.25
"""How long a solution may take to flush and leave once the test that called it is over."""
_CHECK_EXTRA_S = 2.0
"""The test's process outlives the solution's limits by this, so that the solution's limit strikes first."""
_TESTS_WORTH_PRELOADING = 8
"""From so many tests on, loading modules once for all costs less than each test loading what it uses."""
_CHECK_EXTRA_MB = 128
"""The test's process holds what the solution answers, and this much of its own."""
_ROOM = 2
_FETCHED_BYTES = 24 << 20
_LIMITS_OF_MOVES = Limits(cpu_s=10.0, wall_s=30.0, output_bytes=_FETCHED_BYTES)
_CHECKER_COMPILE_S = 30.0
_LIMITS_OF_CHECKERS = Limits(cpu_s=10.0, wall_s=30.0, memory_mb=1024, output_bytes=1 << 16)
_CHECKER_STATUS: dict[int, TestStatus] = {
    0: "accepted",
    1: "wrong_answer",
    2: "wrong_answer",  # of another form
    4: "wrong_answer",  # more than is asked for
    7: "wrong_answer",  # a part of the points
    8: "wrong_answer",  # the output ends too early
}
"""Status by testlib's exit codes; 3, a checker that fails, and all others are no judgement."""
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


class Role(Enum):
    """What a worker's jails are for."""

    PROGRAM = "programs in Python"
    TEST = "tests that call them"
    NATIVE = "binaries"
    COMPILER = "compilers"
    CHECKER = "checkers of outputs"


_PURPOSES = {
    Role.PROGRAM: Purpose.PYTHON,
    Role.TEST: Purpose.PYTHON,
    Role.NATIVE: Purpose.NATIVE,
    Role.COMPILER: Purpose.COMPILER,
    Role.CHECKER: Purpose.NATIVE,
}


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
        self._root = root
        self._binaries = binaries or Binaries(rootfs.default_parent() / "binaries")
        self._watchdog = watchdog
        self._group = MemoryGroup(hierarchy) if hierarchy is not None else None
        self._fresh = fresh
        self._judges = judges or {}
        self._tests = 1
        self._jails: dict[Role, Jail] = {}

    def jail(self, role: Role = Role.PROGRAM) -> Jail:
        """The jail for programs, or for another role; started when it is not there. Raises JailFault."""
        if role not in self._jails:
            python = _PURPOSES[role] is Purpose.PYTHON
            preload = python and (not self._fresh or self._tests >= _TESTS_WORTH_PRELOADING)
            group = self._group if role in (Role.PROGRAM, Role.NATIVE) else None
            jail = Jail(self._root, self._watchdog, group, preload=preload, purpose=_PURPOSES[role])
            self._jails[role] = jail
        return self._jails[role]

    def close(self) -> None:
        """End the jails and remove the cgroup."""
        self._end_jails()
        if self._group is not None:
            self._group.close()
            self._group = None

    def _end_jails(self) -> None:
        while self._jails:
            self._jails.popitem()[1].close()

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
        self._tests = len(execution.tests)
        try:
            source = self._source(execution)
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
            self._end_if_fresh()

    def _end_if_fresh(self) -> None:
        if self._fresh:
            self._end_jails()

    def _source(self, execution: Execution) -> bytes | Built:
        """What is run: the program's text, or what came of its compilation."""
        language = languages.language(execution.language)
        if language is None:
            return _source(execution.program, execution.preamble or "")
        return self.build(execution.language or "", execution.program, {}, execution.compile_timeout_s)

    def build(self, name: str, program: str, files: dict[str, str], timeout_s: float | None) -> Built:
        """The binary of a program among files (base64 by path), kept from before or made now."""
        key = languages.key(name, program, files, timeout_s)
        known = self._binaries.get(key)
        if known is not None:
            return known
        with self._binaries.building(key):
            known = self._binaries.get(key)
            if known is not None:
                return known
            built = Built(compiled=TestResult(status="not_run"))
            for _ in range(_ATTEMPTS):
                try:
                    built = self._compile(languages.LANGUAGES[name], program, files, timeout_s)
                    break
                except (JailFault, OSError, MemoryError) as error:
                    built = Built(compiled=self._lost(error))
            if built.compiled.status not in ("accepted", "sandbox_error"):
                built = Built(compiled=dataclasses.replace(built.compiled, status="compile_error"))
            self._binaries.put(key, built)
            return built

    def _compile(self, language: Language, program: str, files: dict[str, str], timeout_s: float | None) -> Built:
        limits = languages.limits(language, timeout_s)
        jail = self.jail(Role.COMPILER)
        request = "\0".join(language.command).encode()
        put = files | {language.source: base64.b64encode(_encode(program)).decode("ascii")}
        with (
            _files(json.dumps(put).encode(), b"", b"", b"") as sources,
            _files(request, b"", b"", b"") as run,
            _files(json.dumps([languages.BINARY]).encode(), b"", b"", b"") as got,
        ):
            placed = jail.run(Kind.PUT, sources.given, _LIMITS_OF_MOVES, keep=True)
            ended = jail.run(Kind.EXECUTE, run.given, limits, keep=True)
            compiled = _result(ended, run, limits)
            taken = jail.run(Kind.FETCH, got.given, _LIMITS_OF_MOVES)
            self._replace_if_dirty(taken, Role.COMPILER)
            if placed.exit_code != 0:
                raise ValueError("files: they do not fit into the working folder")
            if compiled.exit_code == CANNOT_EXECUTE:
                raise JailFault(compiled.stderr.decode("utf-8", "replace"))
            content, _ = got.contents(2, _FETCHED_BYTES)
        if compiled.status == "accepted":
            binary = json.loads(content).get(languages.BINARY) if taken.exit_code == 0 else None
            if binary is not None:
                return Built(compiled=compiled, binary=base64.b64decode(binary))
            remark = b"the compiler made no binary, or one that is too large\n"
            compiled = dataclasses.replace(compiled, exit_code=1, stderr=compiled.stderr + remark)
        elif compiled.status != "runtime_error":
            remark = f"the compiler reached its {compiled.status.replace('_', ' ')}\n".encode()
            code = None if compiled.status == "time_limit" else 1
            compiled = dataclasses.replace(compiled, exit_code=code, stderr=compiled.stderr + remark)
        return Built(compiled=dataclasses.replace(compiled, status="compile_error", exit_code=compiled.exit_code))

    def _attempt(self, source: bytes | Built, test: TestCase, limits: Limits, execution: Execution) -> TestResult:
        comparison = execution.comparison
        lost = TestResult(status="not_run")
        if isinstance(source, Built) and source.binary is None:
            return source.compiled
        for _ in range(_ATTEMPTS):
            try:
                if isinstance(test, StdinTest):
                    return self._run_stdin(source, test, limits, execution)
                if isinstance(source, Built):
                    return TestResult(status="unsupported", stderr=b"functions are called in Python alone\n")
                if isinstance(test, FunctionTest):
                    return self._run_function(source, test, limits, comparison)
                return self._run_assert(source, test, limits)
            except (JailFault, OSError, MemoryError) as error:
                lost = self._lost(error)
        return lost

    def _lost(self, error: Exception) -> TestResult:
        """What a test earns whose jail broke: the program's own failure where the jail's end shows it to be."""
        self._end_jails()
        status: TestStatus = error.cause if isinstance(error, JailFault) else "sandbox_error"
        return TestResult(status=status, stderr=(str(error) or type(error).__name__).encode("utf-8", "replace"))

    def run_program(
        self,
        execution: Execution,
        stdin: str,
        files: dict[str, str],
        fetch: Sequence[str],
    ) -> tuple[TestResult, dict[str, str]]:
        """Run a program among files (base64 by path); its result, and the fetched files that are there."""
        fetched: dict[str, str] = {}
        source: bytes | Built = _source(execution.program)
        self._tests, limits = 1, execution.limits
        if languages.language(execution.language) is not None:
            source = self.build(execution.language or "", execution.program, files, execution.compile_timeout_s)
            if source.binary is None:
                self._end_if_fresh()
                return source.compiled, {}
        role = Role.NATIVE if isinstance(source, Built) else Role.PROGRAM
        try:
            with (
                _files(json.dumps(files).encode(), b"", b"", b"") as put,
                _program(source, _encode(stdin)) as run,
                _files(json.dumps(list(fetch)).encode(), b"", b"", b"") as got,
            ):
                placed = self.jail(role).run(Kind.PUT, put.given, _LIMITS_OF_MOVES, keep=True)
                result = _result(self.jail(role).run(_kind(source), run.given, limits, keep=True), run, limits)
                taken = self._run(Kind.FETCH, got, _LIMITS_OF_MOVES, role)
                if taken.exit_code == 0:
                    fetched = json.loads(got.contents(2, _FETCHED_BYTES)[0])
        except (JailFault, OSError, MemoryError) as error:
            return self._lost(error), {}
        self._end_if_fresh()
        if placed.exit_code != 0:
            raise ValueError("files: they do not fit into the working folder")
        return result, fetched

    def _run(self, kind: Kind, files: _Files, limits: Limits, role: Role = Role.PROGRAM) -> Ended:
        ended = self.jail(role).run(kind, files.given, limits)
        self._replace_if_dirty(ended, role)
        return ended

    def _replace_if_dirty(self, ended: Ended, role: Role = Role.PROGRAM) -> None:
        if ended.dirty:
            self._jails.pop(role).close()

    def _run_stdin(self, source: bytes | Built, test: StdinTest, limits: Limits, execution: Execution) -> TestResult:
        stdin, expected = _encode(test.stdin), _encode(test.expected_stdout)
        limits = _with_room(limits, len(expected))
        role = Role.NATIVE if isinstance(source, Built) else Role.PROGRAM
        if role is Role.NATIVE and limits.memory_mb < _LEAST_NATIVE_MB:
            limits = dataclasses.replace(limits, memory_mb=_LEAST_NATIVE_MB)
        with _program(source, stdin) as files:
            result = _result(self._run(_kind(source), files, limits, role), files, limits)
        if result.status == "accepted" and execution.checker is not None:
            return self._checked(result, execution.checker, stdin, expected)
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

    def _checked(self, result: TestResult, checker: str, stdin: bytes, expected: bytes) -> TestResult:
        """The result as a checker in C++ says, which is run as ``checker input output answer``, as testlib's are."""
        library = {"testlib.h": base64.b64encode(self._testlib.encode()).decode("ascii")} if self._testlib else {}
        built = self.build(languages.CHECKERS, checker, library, _CHECKER_COMPILE_S)
        if built.binary is None:
            status: TestStatus = "sandbox_error" if built.compiled.status == "sandbox_error" else "unsupported"
            remark = b"the checker does not compile: " + built.compiled.stderr[:2000] + b"\n"
            return dataclasses.replace(result, status=status, stderr=result.stderr + remark)
        texts = {"input": stdin, "output": result.stdout, "answer": expected}
        put = {name: base64.b64encode(text).decode("ascii") for name, text in texts.items()}
        arguments = "\0".join(["checker", *texts]).encode()
        jail = self.jail(Role.CHECKER)
        with _files(json.dumps(put).encode(), b"", b"", b"") as texts_given, _files(arguments, b"", b"", b"") as run:
            run.give(executable(built.binary))
            placed = jail.run(Kind.PUT, texts_given.given, _LIMITS_OF_MOVES, keep=True)
            ended = jail.run(Kind.EXECUTE, run.given, _LIMITS_OF_CHECKERS)
            said = (run.contents(3, 2000)[0].strip() or run.contents(2, 2000)[0].strip()) + b"\n"
        self._replace_if_dirty(ended, Role.CHECKER)
        code = ended.exit_code
        if placed.exit_code != 0 or code is None or code not in _CHECKER_STATUS:
            said = said if placed.exit_code == 0 else b"input, output and answer are too large for a checker\n"
            return dataclasses.replace(result, status="unsupported", stderr=result.stderr + b"checker: " + said)
        status = _CHECKER_STATUS[code]
        if status == "accepted":
            return result
        return dataclasses.replace(result, status=status, stderr=result.stderr + b"checker: " + said)

    def _run_function(self, source: bytes, test: FunctionTest, limits: Limits, comparison: str) -> TestResult:
        try:
            request = {"name": test.name, "method": True, "args": [plain.encode(item) for item in test.args]}
            limits = _with_room(limits, len(plain.dumps(test.expected)))
        except plain.Unsupported as error:
            return TestResult(status="unsupported", stderr=f"argument of {test.name}: {error}".encode())
        with _files(source, b"", b"", b"", json.dumps(request).encode() + b"\n", b"") as files:
            result = _result(self._run(Kind.SERVE, files, limits), files, limits)
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
        with _files(source, b"", b"", b"") as ours, _files(_encode(test.code), b"", b"", b"") as theirs:
            with _pipes(2) as ((request_read, request_write), (reply_read, reply_write)):
                self.jail().submit(Kind.SERVE, [*ours.given, request_read, reply_write], limits)
                self.jail(Role.TEST).submit(Kind.CHECK, [*theirs.given, reply_read, request_write], check_limits)
            checked = self.jail(Role.TEST).wait(check_limits.wall_s + 30)
            self._replace_if_dirty(checked, Role.TEST)
            served = self._dismiss(limits)
            self._replace_if_dirty(served)
            result = _result(served, ours, limits)
            report, _ = theirs.contents(3, 1 << 16)
        return _judge_check(result, served, checked, report)

    def _dismiss(self, limits: Limits) -> Ended:
        """Wait for the solution's process, which sees its channel close; end it if it stays."""
        try:
            return self.jail().wait(_FAREWELL_S)
        except TimeoutError:
            self.jail().cancel()
            return self.jail().wait(limits.wall_s + 30)


def _encode(text: str) -> bytes:
    """Text as bytes: what JSON cannot say is said by surrogates, those that stand for no byte are kept as they are."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def _kind(source: bytes | Built) -> Kind:
    return Kind.EXECUTE if isinstance(source, Built) else Kind.RUN


class _Files:
    """A job's anonymous files: source, stdin, stdout, stderr[, request, reply]."""

    def __init__(self) -> None:
        self._own: list[int] = []
        self.given: list[int] = []
        """Descriptors for the jail, which may read the first two and the fifth, and write the others."""

    def add(self, content: bytes, writable: bool) -> None:
        """One more file."""
        self._own.append(memory_file("job", content))
        self.given.append(reopened(self._own[-1], writable))

    def give(self, fd: int) -> None:
        """Hand over a descriptor that is nobody else's."""
        self.given.append(fd)

    def contents(self, index: int, limit: int) -> tuple[bytes, int]:
        """The first ``limit`` bytes of a file, and its size."""
        size = os.fstat(self._own[index]).st_size
        return (os.pread(self._own[index], min(size, limit), 0) if size else b""), size

    def close(self) -> None:
        """Close them all."""
        for fd in [*self._own, *self.given]:
            os.close(fd)


_WRITABLE = (False, False, True, True, False, True)


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
def _program(source: bytes | Built, stdin: bytes) -> Iterator[_Files]:
    """The files of a program that reads ``stdin``."""
    with _files(languages.BINARY.encode() if isinstance(source, Built) else source, stdin, b"", b"") as files:
        if isinstance(source, Built):
            assert source.binary is not None
            files.give(executable(source.binary))
        yield files


@contextmanager
def _files(*contents: bytes) -> Iterator[_Files]:
    files = _Files()
    try:
        for content, writable in zip(contents, _WRITABLE, strict=False):
            files.add(content, writable)
        yield files
    finally:
        files.close()


@contextmanager
def _pipes(count: int) -> Iterator[list[tuple[int, int]]]:
    pairs = [os.pipe() for _ in range(count)]
    try:
        yield pairs
    finally:
        for fd in sum(pairs, ()):
            os.close(fd)


def _result(ended: Ended, files: _Files, limits: Limits) -> TestResult:
    """What the program did, ``accepted`` standing for "nothing wrong so far"."""
    stdout, stdout_size = files.contents(2, limits.output_bytes)
    stderr, stderr_size = files.contents(3, limits.output_bytes)
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
