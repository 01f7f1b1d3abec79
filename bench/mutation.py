"""Programs that differ from a right one at one place of one function."""

from __future__ import annotations

import ast
import random
from collections.abc import Iterator

_COMPARISONS = [ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq]
_OPERATORS = [ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod]


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
