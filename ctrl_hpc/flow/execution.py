"""Execution: the verdicts of programs against their problems' tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ctrl_hpc.config_sections import LimitsConfig
from ctrl_hpc.protocols import Executor
from ctrl_hpc.records import Execution, Limits, Problem, Revision, Solution, TestResult, Verdict


def limits(problem: Problem, default: LimitsConfig) -> Limits:
    """The limits of one test: the problem's where it has some, else the default.

    Wall-clock time grows and shrinks with the CPU time, in the proportion of the default.
    """
    cpu_s = default.cpu_s if problem.cpu_s is None else problem.cpu_s
    return Limits(
        cpu_s=cpu_s,
        wall_s=default.wall_s * cpu_s / default.cpu_s,
        memory_mb=default.memory_mb if problem.memory_mb is None else problem.memory_mb,
        output_bytes=default.output_bytes,
        processes=default.processes,
    )


def execution(problem: Problem, program: str, default: LimitsConfig) -> Execution:
    """What the executor takes: a program with its problem's tests, limits and comparison."""
    return Execution(
        program=program,
        tests=problem.tests,
        limits=limits(problem, default),
        comparison=problem.comparison or "exact",
    )


def no_program(problem: Problem) -> Verdict:
    """The verdict of an answer that holds no program."""
    tests = tuple(TestResult(status="not_run") for _ in problem.tests)
    return Verdict(status="wrong_answer", tests=tests, detail="no program in the answer")


def execute[R: (Solution, Revision)](
    problems_and_records: Sequence[tuple[Problem, R]], executor: Executor, default: LimitsConfig
) -> list[R]:
    """The same records with their verdicts, in order.

    Records that have a verdict (kept drafts) keep it; identical programs of one problem are executed once, all in one
    call of the executor.
    """
    keys = [(problem.id, record.program) for problem, record in problems_and_records]
    todo: dict[tuple[str, str | None], Execution] = {}
    for key, (problem, record) in zip(keys, problems_and_records, strict=True):
        if record.verdict is None and record.program is not None and key not in todo:
            todo[key] = execution(problem, record.program, default)
    verdicts = dict(zip(todo, executor.run_many(list(todo.values())), strict=True)) if todo else {}
    return [
        record
        if record.verdict is not None
        else replace(record, verdict=no_program(problem) if record.program is None else verdicts[key])
        for key, (problem, record) in zip(keys, problems_and_records, strict=True)
    ]
