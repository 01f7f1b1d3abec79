"""The test's side of a call: runs trusted test code against proxies of the solution's functions.

This process never holds the solution's objects, only plain data of exact built-in types, and it lives in another jail
than the solution: no ``__eq__``, patched builtin, memory scan, signal or early exit of the solution reaches it. It
tells how the test went by its exit code, which only this trusted code sets.
"""

from __future__ import annotations

import ast
import builtins
import json
import linecache
import os
import sys
import traceback
import types
from collections.abc import Callable

import plain

PASSED, ASSERTION, RAISED, UNSUPPORTED, LOST, TEST_ERROR, MISSING = 0, 10, 11, 12, 13, 14, 15
"""Exit codes: all went well; an assertion failed; the solution raised; a value cannot cross; the solution's process
ended; the test raised something else; the solution lacks a name that the test uses."""

TEST_NAME = "test.py"
_REPLY_FD, _REQUEST_FD = 3, 4
_MAX_REPLY_BYTES = 32 << 20


class SolutionLost(BaseException):
    """The solution's process ended, or sent something that is no answer."""


class UnsupportedValue(BaseException):
    """A value cannot cross; not an Exception, so that no ``except Exception`` of a test takes it for an answer."""


class Channel:
    """Requests to the solution, one at a time. ``failure`` keeps the first loss, which no test code can undo."""

    def __init__(self) -> None:
        self._replies = os.fdopen(_REPLY_FD, "rb")
        self._requests = os.fdopen(_REQUEST_FD, "wb")
        self.failure: BaseException | None = None

    def ask(self, request: dict) -> dict:
        """The solution's reply to a request."""
        if self.failure is not None:
            raise self.failure
        try:
            self._requests.write(json.dumps(request, separators=(",", ":")).encode() + b"\n")
            self._requests.flush()
            line = self._replies.readline(_MAX_REPLY_BYTES)
            reply = json.loads(line)
        except (OSError, ValueError, RecursionError):
            raise self._lost() from None
        if not line.endswith(b"\n") or not isinstance(reply, dict):
            raise self._lost()
        return reply

    def _lost(self) -> BaseException:
        self.failure = SolutionLost("the solution's process ended before it answered")
        return self.failure

    def value(self, reply: dict) -> object:
        """The value of a reply; raises what the solution raised."""
        try:
            if "value" in reply:
                return plain.decode(reply["value"])
            if "raise" in reply:
                raise _exception(reply)
            reason = str(reply.get("unsupported", "malformed reply"))
        except (plain.Unsupported, ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
            if getattr(error, "from_solution", False):
                raise
            reason = str(error)
        self.failure = UnsupportedValue(reason)
        raise self.failure


def _exception(reply: dict) -> Exception:
    """The solution's exception: a built-in one by name, with plain arguments, or a new class of that name."""
    name = str(reply["raise"])
    found = getattr(builtins, name, None)
    if not (isinstance(found, type) and issubclass(found, Exception)):
        found = type(name[:100], (Exception,), {})
    arguments = [plain.decode(item) for item in reply.get("args", [])]
    try:
        error = found(*arguments)
    except TypeError:
        error = type(name[:100], (Exception,), {})(*arguments)
    error.from_solution = True  # type: ignore[attr-defined]
    return error


def _proxy(channel: Channel, name: str) -> Callable[..., object]:
    def call(*args: object, **kwargs: object) -> object:
        try:
            sent = [plain.encode(item) for item in args]
            sent_by_name = {key: plain.encode(item) for key, item in kwargs.items()}
        except plain.Unsupported as error:
            channel.failure = UnsupportedValue(f"argument of {name}: {error}")
            raise channel.failure from None
        return channel.value(channel.ask({"name": name, "args": sent, "kwargs": sent_by_name}))

    call.__name__ = call.__qualname__ = name
    return call


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
        namespace[name] = _proxy(channel, name) if reply.get("callable") is True else channel.value(reply)
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
