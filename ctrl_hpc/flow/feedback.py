"""Raw execution feedback: what a verdict says, in plain text."""

from __future__ import annotations

from ctrl_hpc.records import AssertTest, FunctionTest, Problem, Solution, StdinTest, TestCase, TestResult

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
        (test, result)
        for test, result in zip(problem.tests, verdict.tests, strict=False)
        if result.status not in ("accepted", "not_run")
    ]
    if not failures:
        return "\n".join([*lines, verdict.detail]).rstrip()
    test, result = min(failures, key=lambda failure: len(case(*failure)[0]))
    asked, expected, actual = case(test, result)
    lines += [f"Input:\n{shown(asked)}", f"Expected:\n{shown(expected)}"]
    if result.status == "wrong_answer":
        lines.append(f"Actual:\n{shown(actual)}")
    elif result.status == "runtime_error":
        lines.append(f"Error:\n{shown(last_line(result.stderr))}")
    return "\n".join(lines)


def case(test: TestCase, result: TestResult) -> tuple[str, str, str]:
    """Input, expected and actual output of a test that failed, as text."""
    actual = result.stdout.decode("utf-8", "replace")
    match test:
        case StdinTest():
            return test.stdin, test.expected_stdout, actual
        case FunctionTest():
            call = f"{test.name}({', '.join(map(repr, test.args))})"
            return call, repr(test.expected), actual or last_line(result.stderr)
        case AssertTest():
            return test.code, "the assertions hold", last_line(result.stderr) or "an assertion fails"


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
