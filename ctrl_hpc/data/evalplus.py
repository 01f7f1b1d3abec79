"""The tests of EvalPlus (HumanEval+, MBPP+; Liu et al. 2023) as they are published, made to run without numpy.

Every problem's own oracle is kept: most compare by ``assertion(out, exp, atol)``, 13 of MBPP+ by rules of their own.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from typing import Any

NUMPY = '''
class np:
    """What the tests use of numpy, over numbers and their lists and tuples."""

    class ndarray:
        dtype = None

    float32, float64, inf, nan = "float32", "float64", float("inf"), float("nan")

    def allclose(a, b, rtol=1e-05, atol=1e-08, equal_nan=False):
        (shape_a, flat_a), (shape_b, flat_b) = np._array(a), np._array(b)
        pairs = np._broadcast(shape_a, flat_a, shape_b, flat_b)
        return all(np._near(x, y, rtol, atol, equal_nan) for x, y in pairs)

    class testing:
        def assert_allclose(actual, desired, rtol=1e-07, atol=0, equal_nan=True):
            if np._array(actual)[0] and np._array(desired)[0]:
                assert np._array(actual)[0] == np._array(desired)[0], "shapes differ"
            assert np.allclose(actual, desired, rtol, atol, equal_nan)

    def _near(x, y, rtol, atol, equal_nan):
        if x != x or y != y:
            return equal_nan and x != x and y != y
        if abs(y) == np.inf or abs(x) == np.inf:
            return x == y
        return abs(x - y) <= atol + rtol * abs(y)

    def _array(value):
        """Shape and flat items; rows of unequal lengths and what is no number are errors, as in numpy."""
        if isinstance(value, (list, tuple, range)):
            parts = [np._array(item) for item in value]
            if any(part[0] != parts[0][0] for part in parts):
                raise ValueError("rows of unequal lengths")
            return (len(parts), *(parts[0][0] if parts else ())), [item for part in parts for item in part[1]]
        if not isinstance(value, (bool, int, float, complex)):
            raise TypeError("not a number: " + type(value).__name__)
        return (), [value]

    def _broadcast(shape_a, flat_a, shape_b, flat_b):
        size = max(len(shape_a), len(shape_b))
        shapes = [(1,) * (size - len(shape)) + shape for shape in (shape_a, shape_b)]
        for x, y in zip(*shapes):
            if x != y and 1 not in (x, y):
                raise ValueError("shapes cannot be broadcast together")

        def walk(depth, at_a, at_b):
            if depth == size:
                yield flat_a[at_a], flat_b[at_b]
                return
            x, y = shapes[0][depth], shapes[1][depth]
            for i in range(y if x == 1 else x):
                yield from walk(depth + 1, at_a * x + (i if x > 1 else 0), at_b * y + (i if y > 1 else 0))

        return list(walk(0, 0, 0))


'''
"""``numpy.allclose`` and ``numpy.testing.assert_allclose`` in plain Python, broadcasting and all."""
_KNOWN = {"ndarray", "float32", "float64", "inf", "nan", "allclose", "testing"}
_ORACLE = """
def assertion(out, exp, atol):
    if out == exp:
        return
    if isinstance(exp, float) or isinstance(exp, (list, tuple)) and exp and all(isinstance(x, float) for x in exp):
        atol = atol or 1e-6
    assert atol != 0 and type(out) == type(exp), f"out: {out}, exp: {exp}"
    assert not isinstance(exp, (list, tuple)) or len(out) == len(exp), f"out: {out}, exp: {exp}"
    assert np.allclose(out, exp, rtol=1e-07, atol=atol), f"out: {out}, exp: {exp}"


"""
_CLOSE = re.compile(r"^([ ]+)(assert np\.allclose\(out, exp\b)", re.MULTILINE)
_SAME_SHAPE = "assert type(out) == type(exp) and (not isinstance(exp, (list, tuple)) or len(out) == len(exp))\n"
_POLYNOMIAL = re.compile(r"_poly\(\s*\*\s*candidate\(\s*\*\s*inp\s*\)\s*,\s*inp\s*\)")


class NeedsNumpy(ValueError):
    """A test that uses more of numpy than is known."""


def without_numpy(test: str, where: str) -> str:
    """A test that takes what it uses of numpy from :data:`NUMPY`; its own oracle stays.

    Three faults of the published texts are mended, as EvalPlus's evaluator does: the oracle of HumanEval/32 takes the
    root for the polynomial, those of three problems of MBPP+ compute whether a result is right without saying so, and
    where an error is allowed ``[1]`` would be close to ``1``.
    Raises NeedsNumpy when it uses more of numpy.
    """
    test = _POLYNOMIAL.sub("abs(_poly(*inp, candidate(*inp)))", test)
    test = _CLOSE.sub(lambda found: f"{found[1]}{_SAME_SHAPE}{found[1]}{found[2]}", test)
    try:
        tree = ast.parse(test)
    except (SyntaxError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        raise ValueError(f"{where}: test: not Python: {getattr(error, 'msg', error)} in line {line}") from None
    used = {name for name in _numpy_names(tree) if name not in _KNOWN}
    if used:
        raise NeedsNumpy(f"{where}: test: uses numpy beyond its helpers ({', '.join(sorted(used))})")
    lines = test.splitlines(keepends=True)
    for node in reversed(tree.body):
        if _is_numpy_import(node):
            lines[node.lineno - 1 : node.end_lineno] = []
        elif isinstance(node, ast.FunctionDef) and node.name == "assertion" and _is_silent(node):
            lines.insert(node.end_lineno or node.lineno, "    assert exact_match\n")
    return (NUMPY if any(True for _ in _numpy_names(tree)) else "") + "".join(lines)


def _numpy_names(tree: ast.AST) -> Iterator[str]:
    """What code uses of numpy."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("np", "numpy"):
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "numpy":
            yield from (item.name for item in node.names)


def _is_numpy_import(node: ast.stmt) -> bool:
    if isinstance(node, ast.Import):
        return all(name.name == "numpy" for name in node.names)
    return isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "numpy"


def _is_silent(function: ast.FunctionDef) -> bool:
    """Whether an oracle neither asserts nor raises."""
    nodes = list(ast.walk(function))
    says = any(isinstance(node, (ast.Assert, ast.Raise)) for node in nodes)
    return not says and any(isinstance(node, ast.Name) and node.id == "exact_match" for node in nodes)


def differential(entry_point: str, reference: str, inputs: Sequence[Any], atol: float) -> str:
    """Test code that compares a function with a reference program's on inputs: EvalPlus's own release holds these."""
    call = f"{entry_point}(*copy.deepcopy(inp))"
    compared = (
        f"    assert abs(_space['poly'](*inp, {call})) <= {atol!r}\n"
        if entry_point == "find_zero"
        else f"    assertion({call}, _reference(*copy.deepcopy(inp)), {atol!r})\n"
    )
    return (
        f"import copy\n\ninf, nan = float('inf'), float('nan')\n{NUMPY}{_ORACLE}"
        f"_space = {{}}\nexec({reference!r}, _space)\n_reference = _space[{entry_point!r}]\n"
        f"for inp in {list(inputs)!r}:\n{compared}"
    )
