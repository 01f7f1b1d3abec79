"""HumanEval: every canonical solution is accepted, mutants are judged as by plain Python, verdicts do not vary."""

from __future__ import annotations

import human_eval_problems
import pytest

from ctrl_hpc.records import Limits
from ctrl_hpc.sandbox import Sandbox

LIMITS = Limits(cpu_s=human_eval_problems.CPU_S, wall_s=60.0, memory_mb=512)
MUTANTS_EACH, MUTANTS = 4, 520


@pytest.mark.slow
def test_canonical_solutions_are_accepted_ten_times_over() -> None:
    """164 of 164, and the same over ten repeats with all workers busy."""
    problems = human_eval_problems.problems()
    with Sandbox(workers=2) as sandbox:
        verdicts = sandbox.run_many([(program, [test], LIMITS) for _ in range(10) for _, program, test in problems])
    rejected = {problems[i % 164][0]: verdict.detail for i, verdict in enumerate(verdicts) if not verdict.accepted}
    assert len(problems) == 164 and rejected == {}


@pytest.mark.slow
def test_mutants_are_judged_as_by_plain_execution() -> None:
    cases = [
        (mutant, test)
        for seed, (function, program, test) in enumerate(human_eval_problems.problems())
        for mutant in human_eval_problems.mutants(program, function, MUTANTS_EACH, seed)
    ][:MUTANTS]
    assert len(cases) == MUTANTS
    expected = human_eval_problems.judged_plainly(cases)
    with Sandbox(workers=2) as sandbox:
        verdicts = sandbox.run_many([(program, [test], LIMITS) for program, test in cases])
    assert 25 < sum(expected) < len(cases) - 25
    different = [
        f"plain: {passes}, here: {verdict.status} {verdict.detail}\n{program}"
        for (program, _), passes, verdict in zip(cases, expected, verdicts, strict=True)
        if passes != verdict.accepted
    ]
    assert different == []
