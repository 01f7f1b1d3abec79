"""The tests of EvalPlus (HumanEval+, MBPP+), which compare results by ``assertion(out, exp, atol)`` with numpy.

The sandbox has the standard library alone, so that those helpers are replaced by ones of the same meaning.
"""

from __future__ import annotations

import ast

HELPERS = """
def is_floats(x):
    return isinstance(x, float) or (isinstance(x, (list, tuple)) and all(isinstance(i, float) for i in x))


def _close(out, exp, atol):
    if isinstance(exp, (list, tuple)):
        same = isinstance(out, (list, tuple)) and len(out) == len(exp)
        return same and all(_close(a, b, atol) for a, b in zip(out, exp))
    if isinstance(exp, (int, float)) and isinstance(out, (int, float)):
        return out == exp or out != out and exp != exp or abs(out - exp) <= atol + 1e-07 * abs(exp)
    return out == exp


def assertion(out, exp, atol):
    if atol == 0 and is_floats(exp):
        atol = 1e-6
    assert out == exp or (atol != 0 and _close(out, exp, atol))

"""
"""``assertion`` passes equal values and, where floats are expected, those within ``atol + 1e-7 * |expected|``."""
_REPLACED = ("is_floats", "assertion")


class NeedsNumpy(ValueError):
    """A test that uses numpy for more than its helpers."""


def without_numpy(test: str, where: str) -> str:
    """A test with its helpers replaced; raises NeedsNumpy when it uses numpy beyond them."""
    try:
        tree = ast.parse(test)
    except SyntaxError as error:
        raise ValueError(f"{where}: test: not Python: {error.msg} in line {error.lineno}") from None
    kept = [node for node in tree.body if not _is_helper(node)]
    names = {node.id for statement in kept for node in ast.walk(statement) if isinstance(node, ast.Name)}
    if names & {"np", "numpy"}:
        raise NeedsNumpy(f"{where}: test: uses numpy beyond its helpers, which the sandbox does not have")
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    helpers = HELPERS if defined & set(_REPLACED) else ""
    return helpers + ast.unparse(ast.Module(body=kept, type_ignores=[])) + "\n"


def _is_helper(node: ast.stmt) -> bool:
    if isinstance(node, ast.Import):
        return all(name.name == "numpy" for name in node.names)
    if isinstance(node, ast.ImportFrom):
        return node.module is not None and node.module.split(".")[0] == "numpy"
    return isinstance(node, ast.FunctionDef) and node.name in _REPLACED
