"""Slim verdicts: what they keep, and that hints and feedback read the same in them as in whole ones."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ctrl_hpc import jsonl
from ctrl_hpc.flow.feedback import execution_feedback, hint
from ctrl_hpc.records import (
    AssertTest,
    Execution,
    FunctionTest,
    Limits,
    Problem,
    Solution,
    StdinTest,
    Summary,
    TestResult,
    Verdict,
)
from ctrl_hpc.records.verdicts import answered, fault, slim

TESTS = (
    StdinTest(stdin="12345\n", expected_stdout="1\n"),
    FunctionTest(name="f", args=(1,), expected=2),
    StdinTest(stdin="1\n", expected_stdout="3\n"),
    AssertTest(code="assert f(1) == 2"),
)
PASSED = TestResult(status="accepted", stdout=b"1\n", cpu_s=0.25, wall_s=0.5, peak_memory_mb=9.0)
WRONG = TestResult(status="wrong_answer", stdout=b"a" * 9000, stderr=b"b" * 9000 + b"end", cpu_s=0.5, wall_s=1.0)
CRASH = TestResult(status="runtime_error", stderr=b"ZeroDivisionError: division by zero\n", exit_code=1)
SKIPPED = TestResult(status="not_run")


def test_of_the_results_stay_the_first_failure_and_that_of_the_shortest_input():
    whole = Verdict(status="wrong_answer", tests=(PASSED, WRONG, WRONG, CRASH), detail="not the same")
    found = slim(whole, TESTS)
    assert found.summary == Summary(
        statuses=(("accepted", 1), ("wrong_answer", 2), ("runtime_error", 1)),
        cpu_s=1.25,
        wall_s=2.5,
        peak_memory_mb=9.0,
    )
    assert [test.index for test in found.tests] == [1, 2]
    assert found.tests[0].stdout == b"a" * 2000
    assert found.tests[0].stderr == b"b" * 1997 + b"end"
    assert (found.passed, found.total, found.status, found.detail) == (1, 4, "wrong_answer", "not the same")
    assert (found.result(0), found.result(3)) == (None, None)
    assert slim(found, TESTS) == found


def test_of_accepted_programs_no_result_stays_and_the_record_is_small():
    found = slim(Verdict(status="accepted", tests=(PASSED,) * 1000), [TESTS[0]] * 1000)
    assert found.tests == () and (found.passed, found.total) == (1000, 1000)
    assert len(jsonl.line(found)) < 200
    assert jsonl.decode(Verdict, jsonl.encode(found)) == found


def test_whole_verdicts_are_as_they_were():
    whole = Verdict(status="wrong_answer", tests=(PASSED, WRONG, SKIPPED, SKIPPED))
    assert (whole.passed, whole.total, whole.wall_s, whole.result(1), whole.result(9)) == (1, 4, 1.5, WRONG, None)
    execution = Execution(program="", tests=TESTS, limits=Limits())
    assert answered(execution, whole) is whole
    told = {"status": "accepted", "tests": [{"status": "accepted", "stdout": {"base64": "MQo="}}], "detail": ""}
    assert jsonl.decode(Verdict, told).passed == 1


def test_a_fault_has_the_form_that_was_asked_for():
    whole = fault(Execution(program="", tests=TESTS, limits=Limits()), "lost")
    assert [test.status for test in whole.tests] == ["sandbox_error"] * 4
    asked = fault(Execution(program="", tests=TESTS, limits=Limits(), outputs="shown"), "lost")
    assert (asked.tests, asked.statuses, asked.detail) == ((), ["sandbox_error"] * 4, "lost")


@given(st.lists(st.sampled_from([PASSED, WRONG, CRASH, SKIPPED]), min_size=4, max_size=4))
def test_hints_and_feedback_are_those_of_the_whole_verdict(results):
    cut = [
        TestResult(status=item.status, stdout=item.stdout[:2000], stderr=item.stderr[-2000:], exit_code=item.exit_code)
        for item in results
    ]
    status = next((item.status for item in results if item.status not in ("accepted", "not_run")), "accepted")
    problem = Problem(id="p", source="s", split="train", prompt="p", tests=TESTS)
    told = []
    for verdict in (
        Verdict(status=status, tests=tuple(cut)),
        slim(Verdict(status=status, tests=tuple(results)), TESTS),
    ):
        draft = Solution(id="p/0", problem_id="p", text="", program="f = 1 / 0", verdict=verdict)
        told.append((hint(problem, draft), execution_feedback(problem, draft)))
    assert told[0] == told[1]
