"""The test's side of a call: runs trusted test code against proxies of the solution's functions.

This process never holds the solution's objects, only plain data of exact built-in types, and it lives in another jail
than the solution: no ``__eq__``, patched builtin, memory scan, signal or early exit of the solution reaches it. It
tells how the test went by its exit code, which only this trusted code sets.
"""

from __future__ import annotations

import ast
import builtins
import linecache
import os
import sys
import traceback
import types

from proxies import Channel, SolutionLost, UnsupportedValue

PASSED, ASSERTION, RAISED, UNSUPPORTED, LOST, TEST_ERROR, MISSING = 0, 10, 11, 12, 13, 14, 15
"""Exit codes: all went well; an assertion failed; the solution raised; a value cannot cross; the solution's process
ended; the test raised something else; the solution lacks a name that the test uses."""

TEST_NAME = "test.py"


def _names(tree: ast.AST) -> tuple[list[str], list[str]]:
    """Names that the test reads and does not define: those that are no builtins, and those that are."""
    read = dict.fromkeys(
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    )
    defined: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            defined.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            defined.add(node.id)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, ast.ExceptHandler) and node.name:
            defined.add(node.name)
    free = [name for name in read if name not in defined]
    return [name for name in free if not hasattr(builtins, name)], [name for name in free if hasattr(builtins, name)]


def _bind(channel: Channel, names: list[str], namespace: dict) -> bool:
    """Put the solution's names into the test's namespace; whether there were any."""
    found = False
    for name in names:
        reply = channel.ask({"name": name})
        if "missing" in reply:
            continue
        found = True
        namespace[name] = channel.value(reply, {"name": name})
    return found


def main(source: bytes) -> None:
    """Run the test code; never returns."""
    linecache.cache[TEST_NAME] = (len(source), None, source.decode("utf-8", "replace").splitlines(True), TEST_NAME)
    module = types.ModuleType("test")
    sys.modules["test"] = module
    outcome = _run(source, module.__dict__)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(outcome)


def _run(source: bytes, namespace: dict) -> int:
    channel = Channel()
    try:
        tree = ast.parse(source, TEST_NAME)
        code = compile(tree, TEST_NAME, "exec", dont_inherit=True)
        others, builtin = _names(tree)
        # A builtin's name stands for the solution's function only where the test uses no other name of the solution's:
        # else a solution could replace the ``abs`` or ``all`` that judges it.
        if not _bind(channel, others, namespace) and not others:
            _bind(channel, builtin, namespace)
    except (SyntaxError, ValueError) as error:
        print(f"the test is not valid Python: {error}", file=sys.stderr)
        return UNSUPPORTED
    except (SolutionLost, UnsupportedValue) as error:
        return _failed(error, channel)
    try:
        exec(code, namespace)
    except SystemExit as error:
        if error.code not in (None, 0, False):
            return TEST_ERROR
    except BaseException as error:  # noqa: BLE001 (every way a test can fail has its exit code)
        return _failed(error, channel)
    return PASSED if channel.failure is None else _failed(channel.failure, channel)


def _failed(error: BaseException, channel: Channel) -> int:
    cause = channel.failure or error
    if isinstance(cause, (SolutionLost, UnsupportedValue)):
        print(cause, file=sys.stderr)
        return LOST if isinstance(cause, SolutionLost) else UNSUPPORTED
    _report(error)
    if getattr(error, "from_solution", False):
        return RAISED
    if isinstance(error, AssertionError):
        return ASSERTION
    if isinstance(error, ModuleNotFoundError):
        return UNSUPPORTED
    return MISSING if isinstance(error, NameError) else TEST_ERROR


def _report(error: BaseException) -> None:
    """Print the traceback's lines of the test, not ours."""
    report = traceback.TracebackException.from_exception(error)
    report.stack = traceback.StackSummary.from_list([frame for frame in report.stack if frame.filename == TEST_NAME])
    report.__context__ = None
    report.print()
