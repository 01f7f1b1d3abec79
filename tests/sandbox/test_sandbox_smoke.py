"""The sandbox class: stdin, assert and function tests, in order, early stop, and what it refuses."""

from collections.abc import Iterator

import pytest

from ctrl_hpc.records import AssertTest, Execution, FunctionTest, Limits, StdinTest
from ctrl_hpc.sandbox import Sandbox

LIMITS = Limits(cpu_s=2.0, wall_s=4.0, memory_mb=256)
DOUBLE = "print(int(input()) * 2)"


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(workers=2) as sandbox:
        yield sandbox


def test_stdin_tests_report_output_and_resources(sandbox: Sandbox) -> None:
    verdict = sandbox.run_tests(DOUBLE, [StdinTest(stdin="2\n", expected_stdout="4\n")], LIMITS)
    assert verdict.status == "accepted" and (verdict.passed, verdict.total) == (1, 1) and verdict.detail == ""
    (test,) = verdict.tests
    assert (test.stdout, test.stderr, test.exit_code, test.signal) == (b"4\n", b"", 0, None)
    assert 0 < test.cpu_s < 2 and 0 < test.wall_s < 4 and 5 < test.peak_memory_mb < 60


def test_all_tests_run_unless_asked_to_stop(sandbox: Sandbox) -> None:
    tests = [StdinTest(stdin=f"{n}\n", expected_stdout=f"{out}\n") for n, out in ((1, 2), (2, 5), (3, 6))]
    verdict = sandbox.run_tests(DOUBLE, tests, LIMITS)
    assert [test.status for test in verdict.tests] == ["accepted", "wrong_answer", "accepted"]
    assert verdict.status == "wrong_answer" and verdict.passed == 2
    assert verdict.detail == "test 2 of 3: wrong_answer"
    stopped = sandbox.run_tests(DOUBLE, tests, LIMITS, stop_at_first_failure=True)
    assert [test.status for test in stopped.tests] == ["accepted", "wrong_answer", "not_run"]


def test_slim_verdicts_hold_the_failures_that_are_shown(sandbox: Sandbox) -> None:
    tests = tuple(StdinTest(stdin=f"{n}\n", expected_stdout=f"{n}\n") for n in (0, 100, 20, 3))
    run = Execution(program=DOUBLE, tests=tests, limits=LIMITS, outputs="shown")
    (verdict,) = sandbox.run_many([run])
    assert (verdict.status, verdict.passed, verdict.total) == ("wrong_answer", 1, 4)
    assert [(test.index, test.stdout) for test in verdict.tests] == [(1, b"200\n"), (3, b"6\n")]
    assert verdict.detail == "test 2 of 4: wrong_answer" and 0 < verdict.wall_s < 16


def test_run_many_keeps_order_and_takes_both_forms(sandbox: Sandbox) -> None:
    tasks = [(f"print({n})", [StdinTest(stdin="", expected_stdout=f"{n % 7}")], LIMITS) for n in range(20)]
    tasks.append(Execution(program="print(1)", tests=(StdinTest(stdin="", expected_stdout="1"),), limits=LIMITS))
    accepted = [verdict.accepted for verdict in sandbox.run_many(tasks)]
    assert accepted == [n < 7 for n in range(20)] + [True]


def test_assert_and_function_tests(sandbox: Sandbox) -> None:
    add, subtract = "def add(a, b): return a + b", "def add(a, b): return a - b"
    tests = [AssertTest(code="assert add(1, 2) == 3"), FunctionTest(name="add", args=(1, 2), expected=3)]
    assert sandbox.run_tests(add, tests, LIMITS).accepted
    assert [test.status for test in sandbox.run_tests(subtract, tests, LIMITS).tests] == ["wrong_answer"] * 2


def test_refusals(sandbox: Sandbox) -> None:
    assert sandbox.run_tests(DOUBLE, [], LIMITS).status == "unsupported"
    with pytest.raises(ValueError, match="comparison: 'fuzzy' is not one of exact, float"):
        sandbox.run_tests(DOUBLE, [StdinTest(stdin="", expected_stdout="")], LIMITS, comparison="fuzzy")
    with pytest.raises(ValueError, match="workers: 0"):
        Sandbox(workers=0)
