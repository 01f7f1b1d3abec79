"""The test's side of a call: runs trusted test code against proxies of the solution's functions.

This process never holds the solution's objects, only plain data of exact built-in types, and it lives in another jail
than the solution: no ``__eq__``, patched builtin, memory scan, signal or early exit of the solution reaches it. It
tells how the test went by its exit code, which only this trusted code sets.
"""

from __future__ import annotations

import ast
import builtins
import importlib
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


_LIBRARY = {
    "math": "ceil comb copysign cos degrees dist e exp fabs factorial floor fmod frexp fsum gcd hypot inf isclose"
    " isfinite isinf isnan isqrt lcm ldexp log log10 log2 modf nan perm pi pow prod radians sin sqrt tan tau trunc",
    "collections": "ChainMap Counter OrderedDict defaultdict deque namedtuple",
    "itertools": "accumulate chain combinations combinations_with_replacement compress count cycle dropwhile"
    " filterfalse groupby islice pairwise permutations product repeat starmap takewhile tee zip_longest",
    "functools": "cache cached_property cmp_to_key lru_cache partial reduce singledispatch total_ordering wraps",
    "operator": "add and_ attrgetter contains eq floordiv ge getitem gt index is_ is_not itemgetter le lt methodcaller"
    " mod mul ne neg not_ or_ sub truediv truth xor",
    "statistics": "fmean geometric_mean harmonic_mean mean median mode multimode pstdev pvariance quantiles stdev"
    " variance",
    "heapq": "heapify heappop heappush heappushpop heapreplace merge nlargest nsmallest",
    "bisect": "bisect bisect_left bisect_right insort insort_left insort_right",
    "copy": "copy deepcopy",
    "re": "compile escape findall finditer fullmatch match search split sub subn",
    "random": "choice choices randint random randrange sample seed shuffle uniform",
    "string": "ascii_letters ascii_lowercase ascii_uppercase digits hexdigits printable punctuation whitespace",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal getcontext",
    "fractions": "Fraction",
    "typing": "Any Callable Dict Generator Iterable Iterator List Optional Sequence Set Tuple Union",
    "unittest": "TestCase mock skip",
    "contextlib": "contextmanager redirect_stdout suppress",
    "io": "BytesIO StringIO",
    "json": "dumps loads",
    "sys": "maxsize stdout",
    "time": "perf_counter sleep",
    "numpy": "allclose array array_equal isclose ndarray testing",
}
_LIBRARIES: dict[str, list[str]] = {}
"""What tests use of the library, and programs import for them: the modules by the name."""
for _module, _text in _LIBRARY.items():
    for _name in _text.split():
        _LIBRARIES.setdefault(_name, []).append(_module)
_MODULES = {"np": "numpy", "numpy": "numpy", "dt": "datetime"}
"""Modules that are none of the standard library's, and usual names of some."""


class _Names:
    """The names that a test reads and does not define, and how it uses them."""

    def __init__(self, tree: ast.AST) -> None:
        nodes = list(ast.walk(tree))
        read = dict.fromkeys(node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load))
        defined = _defined(nodes)
        self.free = [name for name in read if name not in defined]
        self._nodes = nodes
        self.modules = [name for name in self.free if _module_of(name) and self._is_base(name)]
        rest = [name for name in self.free if name not in self.modules]
        self.builtins = [name for name in rest if hasattr(builtins, name)]
        self.library = [name for name in rest if name in _LIBRARIES and name not in self.builtins]
        self.others = [name for name in rest if name not in self.builtins and name not in self.library]

    def _uses(self, name: str) -> int:
        return sum(isinstance(node, ast.Name) and node.id == name for node in self._nodes)

    def _is_base(self, name: str) -> bool:
        """Whether all that the test does with a name is to take attributes of it."""
        bases = [node.value for node in self._nodes if isinstance(node, ast.Attribute)]
        return sum(isinstance(base, ast.Name) and base.id == name for base in bases) == self._uses(name)

    def judges(self, name: str, asked: list[str]) -> bool:
        """Whether a name may judge: it is more than called with values that stand in the test."""
        calls = [node for node in self._nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        plain_calls = 0
        for call in calls:
            if call.func.id == name:  # type: ignore[attr-defined]
                inner = [
                    node.id
                    for part in [*call.args, *call.keywords]
                    for node in ast.walk(part)
                    if isinstance(node, ast.Name)
                ]
                plain_calls += all(hasattr(builtins, other) and other not in asked for other in inner)
        return plain_calls < self._uses(name)


def _module_of(name: str) -> str | None:
    return name if name in sys.stdlib_module_names else _MODULES.get(name)


def _defined(nodes: list[ast.AST]) -> set[str]:
    defined: set[str] = set()
    for node in nodes:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            defined.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            defined.add(node.id)
        elif isinstance(node, ast.arg):
            defined.add(node.arg)
        elif isinstance(node, (ast.ExceptHandler, ast.MatchAs, ast.MatchStar)) and node.name:
            defined.add(node.name)
        elif isinstance(node, ast.MatchMapping) and node.rest:
            defined.add(node.rest)
    return defined


def _bind(channel: Channel, names: _Names, namespace: dict) -> None:
    """Put the solution's names into the test's namespace.

    A name that the library or Python has too may be what a test judges with (``isclose``, ``Counter``, ``abs``), and a
    solution must not answer for it: it stands for the solution's where the test uses no other name of the solution's,
    or only calls it with values that stand in the test. What a program merely imported is the library's here as well.
    """
    for name in names.modules:
        if "missing" not in channel.ask({"name": name}):
            namespace[name] = importlib.import_module(_module_of(name) or "")
    asked = names.library or ([] if names.others else names.builtins)
    only = len(names.others) + len(asked) == 1
    for name in [*names.others, *asked]:
        modules = _LIBRARIES.get(name, [])
        reply = channel.ask({"name": name, "modules": modules})
        if "missing" in reply:
            continue
        if name in asked and not only and reply.get("library") in modules:
            namespace[name] = getattr(importlib.import_module(reply["library"]), name)
        elif name in asked and not only and names.judges(name, asked):
            channel.unsupported(f"the test does not tell whether it means the solution's {name}, or judges by another")
        else:
            namespace[name] = channel.value(reply, {"name": name})


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
        _bind(channel, _Names(tree), namespace)
    except (SyntaxError, ValueError) as error:
        print(f"the test is not valid Python: {error}", file=sys.stderr)
        return UNSUPPORTED
    except BaseException as error:  # noqa: BLE001 (as below)
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
