"""Hints from verdicts (the paper's Table 7), and the detection of critiques that give them away."""

import subprocess
import sys

import pytest

from ctrl_hpc.flow.feedback import error_line, execution_feedback, hint, mentions_hint
from ctrl_hpc.records import AssertTest, FunctionTest, Problem, Solution, StdinTest, TestResult, Verdict

PROGRAM = "n = int(input())\nx = [1]\nprint(x[n])"
TESTS = (StdinTest(stdin="0\n", expected_stdout="1\n"), StdinTest(stdin="5\n", expected_stdout="6\n"))


def problem(*tests):
    return Problem(id="p", source="s", split="test", prompt="?", tests=tests or TESTS)


def solution(status, *tests, program=PROGRAM, detail=""):
    verdict = Verdict(status=status, tests=tests, detail=detail)
    return Solution(id="p/0", problem_id="p", text="...", program=program, verdict=verdict)


OK = TestResult(status="accepted", stdout=b"1\n")


def test_all_passed_asks_for_concise_praise():
    found = hint(problem(), solution("accepted", OK, OK))
    assert found.kind == "passed"
    assert "concise" in found.text


def test_none_passed_asks_for_a_fresh_restart():
    wrong = TestResult(status="wrong_answer", stdout=b"7\n")
    found = hint(problem(), solution("wrong_answer", wrong, wrong))
    assert found.kind == "failed"
    assert "fresh restart" in found.text
    assert "5" not in found.text


def test_an_answer_without_a_program_is_a_failure():
    skipped = TestResult(status="not_run")
    assert hint(problem(), solution("wrong_answer", skipped, skipped, program=None)).kind == "failed"


def test_a_partial_failure_shows_input_expected_and_actual():
    found = hint(problem(), solution("wrong_answer", OK, TestResult(status="wrong_answer", stdout=b"7\n")))
    assert found.kind == "partial"
    assert found.text == "The answer is wrong: 1 of 2 tests passed.\nInput:\n5\nExpected:\n6\nActual:\n7"


def test_a_long_output_loses_its_middle():
    flood = TestResult(status="wrong_answer", stdout=b"a" * 5000)
    text = hint(problem(), solution("wrong_answer", OK, flood)).text
    assert len(text) < 1000
    assert "(4400 characters left out)" in text


@pytest.mark.parametrize(
    ("test", "result", "lines"),
    [
        (
            FunctionTest(name="add", args=(1, "a"), expected=3),
            TestResult(status="wrong_answer", stdout=b"4"),
            "Input:\nadd(1, 'a')\nExpected:\n3\nActual:\n4",
        ),
        (
            AssertTest(code="assert add(1, 2) == 3"),
            TestResult(status="wrong_answer", stderr=b"Traceback\nAssertionError: got 4\n"),
            "Input:\nassert add(1, 2) == 3\nExpected:\nthe assertions hold\nActual:\nAssertionError: got 4",
        ),
    ],
)
def test_partial_failures_of_other_kinds_of_tests(test, result, lines):
    assert hint(problem(TESTS[0], test), solution("wrong_answer", OK, result)).text.endswith(lines)


@pytest.mark.parametrize("status", ["time_limit", "memory_limit", "output_limit"])
def test_a_limit_shows_the_code_only(status):
    found = hint(problem(), solution(status, OK, TestResult(status=status, stdout=b"99")))
    assert found.kind == "timeout"
    assert found.text.endswith(f"\n```python\n{PROGRAM}\n```")
    assert "99" not in found.text


@pytest.mark.parametrize("status", ["sandbox_error", "unsupported"])
def test_an_environment_fault_teaches_nothing(status):
    found = hint(problem(), solution(status))
    assert (found.kind, found.text) == ("unknown", "")


CARETS = b"""Traceback (most recent call last):
  File "/box/solution.py", line 3, in <module>
    print(x[n])
          ~^^^
IndexError: list index out of range
"""


def test_a_runtime_error_shows_the_code_line_not_the_carets():
    found = hint(
        problem(), solution("runtime_error", OK, TestResult(status="runtime_error", stderr=CARETS, exit_code=1))
    )
    assert found.kind == "error"
    assert "in line 3: print(x[n])\n" in found.text
    assert "^" not in found.text
    assert found.text.endswith("Error:\nIndexError: list index out of range")


PROGRAMS = {
    "nested call": ("def f(a):\n    return a / 0\n\nprint(f(1) + f(\n    2))", 2),
    "several anchors": ("d = {}\nprint(d['a']['b'] + d['c'])", 2),
    "error raised in the library": ("import json\n\njson.loads('{')", 3),
    "syntax error": ("x = 1\nif x\n    print(x)", 2),
    "chained": ("try:\n    1 / 0\nexcept ZeroDivisionError:\n    int('a')", 4),
    "raised by hand": ("x = 1\nraise ValueError(\n    'several\\nlines')", 2),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_line_is_found_in_real_tracebacks(name, tmp_path):
    program, line = PROGRAMS[name]
    for file in ("solution.py", "anything.py"):
        (tmp_path / file).write_text(program)
        stderr = subprocess.run([sys.executable, str(tmp_path / file)], capture_output=True, text=True).stderr
        assert error_line(program, stderr) == line
    executed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stderr
    assert error_line(program, executed) == line


def test_a_frame_of_another_file_is_not_the_programs():
    stderr = 'Traceback (most recent call last):\n  File "/usr/lib/runner.py", line 2, in run\nValueError: x\n'
    assert error_line(PROGRAM, stderr) is None


def test_a_crash_without_a_traceback_tells_the_signal():
    crash = TestResult(status="runtime_error", signal=11)
    assert "signal 11 (SIGSEGV)" in hint(problem(), solution("runtime_error", OK, crash)).text
    leave = TestResult(status="runtime_error", exit_code=3)
    assert "exit code 3" in hint(problem(), solution("runtime_error", OK, leave)).text


@pytest.mark.parametrize(
    "text",
    [
        "According to the hint, the loop is wrong.",
        "As the Hints say",
        "The execution results show a wrong value.",
        "Since all test cases passed, this is right.",
        "It passes all the hidden unit tests.",
        "2 tests failed.",
        "The code fails some of the tests.",
    ],
)
def test_critiques_that_give_the_hint_away(text):
    assert mentions_hint(text)


@pytest.mark.parametrize(
    "text",
    [
        "The loop ends one step early; the last element is never added.",
        "Shinty is a game.",
        "Test the condition n > 0 before the division.",
        "Consider the case n = 0, where this fails.",
        "The execution time grows with n squared.",
    ],
)
def test_critiques_that_only_reason(text):
    assert not mentions_hint(text)


def test_raw_feedback_shows_the_failure_with_the_shortest_input():
    tests = (
        StdinTest(stdin="1 2 3\n", expected_stdout="6\n"),
        StdinTest(stdin="1\n", expected_stdout="1\n"),
        StdinTest(stdin="\n", expected_stdout="0\n"),
    )
    wrong = TestResult(status="wrong_answer", stdout=b"9\n")
    text = execution_feedback(problem(*tests), solution("wrong_answer", wrong, wrong, OK))
    assert text == "1 of 3 tests passed: wrong answer.\nInput:\n1\nExpected:\n1\nActual:\n9"


def test_raw_feedback_of_other_verdicts():
    assert execution_feedback(problem(), solution("accepted", OK, OK)) == "All 2 tests passed."
    crash = TestResult(status="runtime_error", stderr=CARETS, exit_code=1)
    assert execution_feedback(problem(), solution("runtime_error", crash, OK)).endswith(
        "\nError:\nIndexError: list index out of range"
    )
    slow = TestResult(status="time_limit", stdout=b"half")
    text = execution_feedback(problem(), solution("time_limit", slow, OK))
    assert text == "1 of 2 tests passed: time limit.\nInput:\n0\nExpected:\n1"
    skipped = TestResult(status="not_run")
    none = solution("wrong_answer", skipped, skipped, program=None, detail="no program in the answer")
    assert execution_feedback(problem(), none) == "0 of 2 tests passed: wrong answer.\nno program in the answer"
