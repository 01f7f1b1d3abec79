"""Which tests of a program are run: up to the first failure, within a time budget, by one worker or several."""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import replace

import pytest

from ctrl_hpc.records import Execution, Limits, StdinTest, TestResult
from ctrl_hpc.sandbox import Sandbox
from ctrl_hpc.sandbox.course import Course
from ctrl_hpc.sandbox.worker import Worker

LIMITS = Limits(cpu_s=0.5, wall_s=1.0, memory_mb=256)
NAP_AND_ECHO = "import time\nnap, answer = input().split()\ntime.sleep(float(nap))\nprint(answer)"


def naps(*tests: tuple[float, str], program: str = NAP_AND_ECHO) -> Execution:
    cases = tuple(StdinTest(stdin=f"{nap} {answer}\n", expected_stdout="yes") for nap, answer in tests)
    return Execution(program=program, tests=cases, limits=LIMITS)


def statuses(sandbox: Sandbox, execution: Execution) -> list[str]:
    return [test.status for test in sandbox.submit(execution).result().tests]


def test_the_verdict_is_the_same_for_every_order_in_which_workers_end() -> None:
    """Four tests, two of them wrong, put in all orders: what is beyond the first failure is dropped."""
    answers = ("accepted", "wrong_answer", "accepted", "runtime_error")
    execution = replace(naps(*[(0, "")] * 4), stop_at_first_failure=True)
    for order in itertools.permutations(range(4)):
        course = Course(execution)
        taken = [course.take() for _ in range(4)]
        assert [item[0] for item in taken if item] == [0, 1, 2, 3]
        for index in order:
            course.put(index, TestResult(status=answers[index]))  # type: ignore[arg-type]
        assert course.take() is None
        verdict = course.verdict()
        assert [test.status for test in verdict.tests] == ["accepted", "wrong_answer", "not_run", "not_run"]
        assert verdict.status == "wrong_answer" and verdict.detail == "test 2 of 4: wrong_answer"


def test_a_failure_of_a_worker_reaches_who_waits() -> None:
    course = Course(naps((0, "yes"), (0, "yes")))
    course.take(), course.take()
    course.put(0, TestResult(status="accepted"))
    threading.Timer(0.05, course.fail, [OSError("the disk is gone")]).start()
    with pytest.raises(OSError, match="the disk is gone"):
        course.verdict()
    assert course.take() is None


def test_an_endless_loop_costs_one_time_limit() -> None:
    execution = naps(*[(0, "yes")] * 10, program="while True: pass")
    with Sandbox(workers=1) as sandbox:
        start = time.monotonic()
        stopped = sandbox.submit(replace(execution, stop_at_first_failure=True)).result()
        spent_s = time.monotonic() - start
    assert [test.status for test in stopped.tests] == ["time_limit"] + ["not_run"] * 9
    assert sum(test.cpu_s for test in stopped.tests) < 2 * LIMITS.cpu_s and spent_s < 10 * LIMITS.cpu_s


@pytest.mark.parametrize("stop", [False, True])
def test_a_time_budget_ends_a_program(stop: bool) -> None:
    """Naps of 0.2 s against a budget of 0.5 s: the third is cut short, what follows is not run."""
    execution = replace(naps(*[(0.2, "yes")] * 4), time_budget_s=0.5, stop_at_first_failure=stop)
    with Sandbox(workers=1) as sandbox:
        verdict = sandbox.submit(execution).result()
        found = [test.status for test in verdict.tests]
        assert verdict.status == "time_limit" and found.count("time_limit") == 1
        cut = found.index("time_limit")
        assert cut in (1, 2) and set(found[:cut]) <= {"accepted"} and set(found[cut + 1 :]) == {"not_run"}
        assert sandbox.submit(replace(execution, time_budget_s=60.0)).result().accepted


def test_a_budget_that_is_spent_between_two_tests_is_a_time_limit_and_never_hides_a_failure() -> None:
    for first, found in (("accepted", ["accepted", "time_limit", "not_run"]), ("wrong_answer", None)):
        course = Course(replace(naps(*[(0, "yes")] * 3), time_budget_s=0.02))
        assert course.take() is not None
        time.sleep(0.03)
        course.put(0, TestResult(status=first))  # type: ignore[arg-type]
        assert course.take() is None
        verdict = course.verdict()
        assert [test.status for test in verdict.tests] == (found or ["wrong_answer", "not_run", "not_run"])
        assert verdict.status == ("time_limit" if found else "wrong_answer")


def test_tests_of_one_program_are_spread_over_free_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    helpers: set[int] = set()
    attempt = Worker._attempt

    def noted(self: Worker, *args: object) -> TestResult:
        helpers.add(id(self))
        return attempt(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(Worker, "_attempt", noted)
    with Sandbox(workers=3) as sandbox:
        while sandbox._idle < 3:
            time.sleep(0.01)
        mixed = naps((0.3, "yes"), (0.3, "no"), (0.0, "yes"), (0.3, "yes"), (0.3, "yes"), (0.0, "no"))
        one_after_the_other = ["accepted", "wrong_answer", "accepted", "accepted", "accepted", "wrong_answer"]
        assert statuses(sandbox, mixed) == one_after_the_other
        assert len(helpers) == 3
        stopped = statuses(sandbox, replace(mixed, stop_at_first_failure=True))
        assert stopped == ["accepted", "wrong_answer"] + ["not_run"] * 4
    assert sandbox.unfinished == 0
