"""What an execution tells: feedback for the generator, and the hint that stage I shows the critic."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from typing import Literal

from ctrl_hpc.records import AssertTest, FunctionTest, Problem, Solution, StdinTest, TestCase, TestResult, Verdict
from ctrl_hpc.records.verdicts import asked, shortest

SHOWN_CHARACTERS = 600
"""Longest input, output or message shown; longer ones lose their middle."""


def execution_feedback(problem: Problem, solution: Solution) -> str:
    """How many tests an executed solution passed and, of the failures, the one with the shortest input.

    That is the feedback a program's author gets from an online judge that shows its tests, without any advice.
    """
    verdict = solution.verdict
    assert verdict is not None, f"{solution.id} has not been executed"
    if verdict.accepted:
        return f"All {verdict.total} tests passed."
    lines = [f"{verdict.passed} of {len(problem.tests)} tests passed: {verdict.status.replace('_', ' ')}."]
    failures = [
        number
        for number, status in enumerate(verdict.statuses[: len(problem.tests)])
        if status not in ("accepted", "not_run") and verdict.result(number) is not None
    ]
    if not failures:
        return "\n".join([*lines, verdict.detail]).rstrip()
    number = shortest(failures, problem.tests)
    result = verdict.result(number)
    assert result is not None
    given, expected, actual = case(problem.tests[number], result)
    lines += [f"Input:\n{shown(given)}", f"Expected:\n{shown(expected)}"]
    if result.status == "wrong_answer":
        lines.append(f"Actual:\n{shown(actual)}")
    elif result.status == "compile_error":
        lines.append(f"Error:\n{shown(result.stderr.decode('utf-8', 'replace'))}")
    elif result.status == "runtime_error":
        lines.append(f"Error:\n{shown(last_line(result.stderr))}")
    return "\n".join(lines)


def case(test: TestCase, result: TestResult) -> tuple[str, str, str]:
    """Input, expected and actual output of a test that failed, as text."""
    actual = result.stdout.decode("utf-8", "replace")
    match test:
        case StdinTest():
            return asked(test), test.expected_stdout, actual
        case FunctionTest():
            return asked(test), repr(test.expected), actual or last_line(result.stderr)
        case AssertTest():
            return asked(test), "the assertions hold", last_line(result.stderr) or "an assertion fails"


def last_line(stderr: bytes) -> str:
    """The last line that is not blank: of a traceback, the exception."""
    lines = [line for line in stderr.decode("utf-8", "replace").split("\n") if line.strip()]
    return lines[-1].strip() if lines else ""


def shown(text: str) -> str:
    """A text without its middle when it is too long to be shown."""
    text = text.rstrip("\n")
    if len(text) <= SHOWN_CHARACTERS:
        return text
    half = SHOWN_CHARACTERS // 2
    return f"{text[:half]} ... ({len(text) - 2 * half} characters left out) ... {text[-half:]}"


Kind = Literal["passed", "failed", "partial", "error", "timeout", "unknown"]

_CONTEXT_LINES = 2
"""Lines of code shown before and after the line that failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hint:
    """What the execution showed: every test passed, none did, some did, an exception, or a limit.

    ``unknown`` (an environment fault, or no execution at all) has no text: such a draft teaches nothing.
    """

    kind: Kind
    text: str


def hint(problem: Problem, solution: Solution) -> Hint:
    """The hint that the verdict of an executed solution gives, by the rules of the paper's Table 7.

    All tests passed: praise in brief. None passed: start afresh. Some passed: the first failure's input, expected and
    actual output. A runtime error: the code at fault and the error. A limit exceeded: the code alone.
    """
    verdict = solution.verdict
    if verdict is None or verdict.status in ("sandbox_error", "unsupported"):
        return Hint(kind="unknown", text="")
    if verdict.accepted:
        return Hint(kind="passed", text="All tests passed: the answer is right. Praise it concisely.")
    program = solution.program or ""
    if verdict.status in ("runtime_error", "compile_error"):
        return Hint(kind="error", text=_error_text(program, verdict))
    if verdict.status in ("time_limit", "memory_limit", "output_limit"):
        return Hint(kind="timeout", text=_LIMITS[verdict.status] + "\n" + _fenced(program))
    if verdict.passed == 0:
        return Hint(kind="failed", text="No test passed: the answer is wrong throughout. Advise a fresh restart.")
    return Hint(kind="partial", text=_partial_text(problem, verdict))


_LIMITS = {
    "time_limit": "The program is too slow: it exceeded the time limit.",
    "memory_limit": "The program exceeded the memory limit.",
    "output_limit": "The program printed more than the output limit allows.",
}


def _fenced(code: str) -> str:
    return f"```python\n{code}\n```"


def _first(verdict: Verdict, status: str) -> int | None:
    return next((index for index, found in enumerate(verdict.statuses) if found == status), None)


def _partial_text(problem: Problem, verdict: Verdict) -> str:
    head = f"The answer is wrong: {verdict.passed} of {verdict.total} tests passed."
    index = _first(verdict, "wrong_answer")
    result = verdict.result(index) if index is not None else None
    if index is None or result is None or index >= len(problem.tests):
        return head
    given, expected, actual = case(problem.tests[index], result)
    return f"{head}\nInput:\n{shown(given)}\nExpected:\n{shown(expected)}\nActual:\n{shown(actual)}"


def _error_text(program: str, verdict: Verdict) -> str:
    index = _first(verdict, verdict.status)
    result = verdict.result(index) if index is not None else None
    stderr = result.stderr.decode("utf-8", "replace") if result is not None else ""
    error = _error_message(stderr) or _exit_message(result) or verdict.detail or "the program failed"
    line = error_line(program, stderr)
    if line is None:
        return f"The program fails with an error.\n{_fenced(program)}\nError:\n{shown(error)}"
    lines = program.split("\n")
    block = "\n".join(lines[max(line - 1 - _CONTEXT_LINES, 0) : line + _CONTEXT_LINES])
    where = f"in line {line}: {lines[line - 1].strip()}"
    return f"The program fails with an error {where}\n{_fenced(block)}\nError:\n{shown(error)}"


_FRAME = re.compile(r'^\s+File "(?P<file>[^"]*)", line (?P<line>\d+)')
_OWN_FILES = re.compile(r"^<(?!frozen )[^>]*>$|(^|/)(main|solution|program|code)\.py$")


def error_line(program: str, stderr: str) -> int | None:
    """The 1-based line of ``program`` at which a Python traceback ends; None when the traceback names none.

    The line's number comes from the traceback and its text from the program. (Since Python 3.11 the line above the
    error is a row of carets, not code.) A frame belongs to the program when the code quoted under it is the program's
    line; a frame that quotes none, when its file is one that programs are run from.
    """
    source = program.split("\n")
    found = None
    lines = stderr.split("\n")
    for index, text in enumerate(lines):
        frame = _FRAME.match(text)
        if frame is None or not 1 <= int(frame["line"]) <= len(source):
            continue
        number = int(frame["line"])
        follower = lines[index + 1] if index + 1 < len(lines) else ""
        quoted = follower.strip() if follower.startswith("    ") else ""
        own = quoted == source[number - 1].strip() if quoted else _OWN_FILES.search(frame["file"]) is not None
        if own:
            found = number
    return found


def _error_message(stderr: str) -> str:
    """The message below the last traceback: its first line that is not indented, and what follows."""
    _, mark, tail = stderr.rpartition("Traceback (most recent call last):")
    lines = (tail if mark else stderr).split("\n")
    last_frame = max((index for index, line in enumerate(lines) if _FRAME.match(line)), default=-1)
    rest = lines[last_frame + 1 :]
    while rest and (not rest[0].strip() or rest[0].startswith(" ")):
        rest = rest[1:]
    return "\n".join(rest).strip()


def _exit_message(result: TestResult | None) -> str:
    if result is None:
        return ""
    if result.signal is not None:
        known = {int(item): item.name for item in signal.Signals}
        return f"the process was killed by signal {result.signal} ({known.get(result.signal, 'unknown')})"
    return f"the process ended with exit code {result.exit_code}" if result.exit_code else ""


_TESTS = r"(?:(?:the|its|any|some|all|most|several|of|these|those|given|provided|hidden|unit|\d+)\s+)*"
_MENTIONS = re.compile(
    r"\bhints?\b|\bhinted\b"
    r"|\b(?:private|privileged)\s+(?:note|information|section|feedback)"
    r"|\bexecution\s+(?:results?|feedback|outcomes?|verdicts?)\b"
    r"|\btest\s+results?\b"
    rf"|\btests?(?:\s+cases?)?\s+(?:has\s+|have\s+|were\s+|was\s+|all\s+)*(?:passed|failed)\b"
    rf"|\b(?:pass|passe[sd]|fail(?:s|ed)?)\s+{_TESTS}tests?\b",
    re.IGNORECASE,
)


def mentions_hint(text: str) -> bool:
    """Whether a critique gives away that its writer was shown the execution's result (it must read as if not)."""
    return _MENTIONS.search(text) is not None
