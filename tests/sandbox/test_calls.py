"""Function and assert tests: what crosses between a solution and its test, and how each failure is told."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ctrl_hpc.records import AssertTest, FunctionTest, Limits, TestResult
from ctrl_hpc.sandbox import Sandbox

pytestmark = pytest.mark.slow

LIMITS = Limits(cpu_s=2.0, wall_s=30.0, memory_mb=128, output_bytes=100_000)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(workers=1) as sandbox:
        yield sandbox


def check(sandbox: Sandbox, program: str, code: str) -> TestResult:
    return sandbox.run_tests(program, [AssertTest(code=code)], LIMITS).tests[0]


def call(sandbox: Sandbox, program: str, *args: Any, expected: Any, comparison: str = "exact") -> TestResult:
    test = FunctionTest(name="f", args=args, expected=expected)
    return sandbox.run_tests(program, [test], LIMITS, comparison=comparison).tests[0]


HOLD = tomllib.loads((Path(__file__).parent / "asserts_that_hold.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", HOLD)
def test_asserts_that_hold(sandbox: Sandbox, name: str) -> None:
    result = check(sandbox, HOLD[name]["program"], HOLD[name]["test"])
    assert result.status == "accepted", result


@pytest.mark.parametrize(
    ("program", "code", "status", "said"),
    [
        ("def f(): return 1", "assert f() == 2, 'not two'", "wrong_answer", b"AssertionError: not two"),
        ("def f(): return None", "assert len(f()) == 2", "wrong_answer", b"TypeError"),
        ("def f(): return [1]", "assert f()[1] == 2", "wrong_answer", b"IndexError"),
        ("def f(): raise KeyError('k')", "assert f() == 2", "runtime_error", b"KeyError: 'k'"),
        ("def f(): return 1 // 0", "f()", "runtime_error", b"line 1, in f"),
        ("def g(): return 1", "assert f() == 2", "runtime_error", b"NameError: name 'f' is not defined"),
        ("class Solution:\n  def f(self): return 2", "assert f() == 2", "runtime_error", b"NameError: name 'f' is not"),
        ("def f(: pass", "assert f() == 2", "runtime_error", b"SyntaxError"),
        ("raise ValueError('at import')", "assert f() == 2", "runtime_error", b"ValueError: at import"),
        (
            "import os\ndef f(): os.kill(os.getpid(), 9)",
            "assert f() == 2",
            "runtime_error",
            b"ended before it answered",
        ),
        ("def f():\n    while True: pass", "assert f() == 2", "time_limit", b""),
        ("while True: pass", "assert f() == 2", "time_limit", b""),
        ("def f(): return 1", "while True: f()", "time_limit", b""),
        ("def f(): return [0] * (1 << 40)", "assert f() == 2", "memory_limit", b"MemoryError"),
        ("def f(): return 'x' * (140 << 20)", "assert len(f()) == 2", "memory_limit", b""),
        ("def f():\n    while True: print('x' * 10 ** 6)", "assert f() == 2", "output_limit", b""),
        ("class f: pass", "assert f() == 2", "unsupported", b"eq of an object of the solution's cannot cross"),
        ("class f: pass", "assert f()", "unsupported", b"bool of an object"),
        ("class f: pass", "assert isinstance(1, f)", "unsupported", b"instancecheck of an object"),
        ("class f: x = 1", "assert f.x == 1", "unsupported", b"f.x of the solution's class"),
        ("class f: pass", "assert f().x == 1", "wrong_answer", b"AttributeError: x"),
        ("class f: x = object()", "assert f().x == 1", "unsupported", b"a value of type object cannot cross"),
        ("def f(): return object()", "assert f() == 2", "unsupported", b"a value of type object cannot cross"),
        ("def f(): return lambda: 1", "assert f() == 2", "unsupported", b"type function cannot cross"),
        ("def f(g): return g(1)", "assert f(lambda x: x) == 1", "unsupported", b"argument of f"),
        ("x = []\nx.append(x)\ndef f(): return x", "assert f() == 2", "unsupported", b"nested too deeply"),
        ("def f(): return object()", "try: f()\nexcept Exception: pass", "unsupported", b"cannot cross"),
        ("def f(): return object()", "try: f()\nexcept: pass", "unsupported", b"cannot cross"),
        ("import os\ndef f(): os._exit(0)", "try: f()\nexcept: pass", "runtime_error", b"ended before it answered"),
        ("def f(): return 1", "assert f( == 1", "unsupported", b"the test is not valid Python"),
        ("def f(): return 1", "import no_such_module", "unsupported", b"No module named"),
        ("def f(): return 1", "import sys; sys.exit(1)", "wrong_answer", b""),
    ],
)
def test_asserts_that_do_not_hold(sandbox: Sandbox, program: str, code: str, status: str, said: bytes) -> None:
    result = check(sandbox, program, code)
    assert result.status == status and said in result.stderr, result
    assert b"/runner/" not in result.stderr


@pytest.mark.parametrize(
    ("program", "args", "expected", "status"),
    [
        ("def f(a, b): return a + b", (1, 2), 3, "accepted"),
        ("def f(a, b): return a - b", (1, 2), 3, "wrong_answer"),
        ("class Solution:\n    def f(self, a): return (a, a)", ([1],), [[1], [1]], "accepted"),
        ("def f(a): return [a]", (1,), (1,), "wrong_answer"),
        ("def f(a): return a", ({"x": {1, 2}},), {"x": {1, 2}}, "accepted"),
        ("def f(a): return str(a)", (1,), 1, "wrong_answer"),
        ("def f(): return 0.1 + 0.2", (), 0.3, "wrong_answer"),
        ("def f(): return object()", (), 1, "unsupported"),
        ("def f(): raise ValueError", (), 1, "runtime_error"),
        ("def g(): return 1", (), 1, "runtime_error"),
        ("import sys; sys.exit(0)", (), 1, "runtime_error"),
        ("def f(): return [1] * 10 ** 6", (), 1, "output_limit"),
        ("def f():\n    while True: pass", (), 1, "time_limit"),
        ("def f(x): return x", (object(),), 1, "unsupported"),
    ],
)
def test_function_tests(sandbox: Sandbox, program: str, args: tuple[Any, ...], expected: Any, status: str) -> None:
    assert call(sandbox, program, *args, expected=expected).status == status


def test_function_tests_with_tolerance(sandbox: Sandbox) -> None:
    program = "def f(): return [0.1 + 0.2, 3]"
    assert call(sandbox, program, expected=[0.3, 3], comparison="float").status == "accepted"
    assert call(sandbox, program, expected=[0.3, 4], comparison="float").status == "wrong_answer"


def test_function_tests_in_any_letter_case(sandbox: Sandbox) -> None:
    program = "def f(): return ({'Key': ['YES']}, 'no')"
    for comparison, status in (("exact:nocase", "accepted"), ("float:nocase", "accepted"), ("exact", "wrong_answer")):
        assert call(sandbox, program, expected=[{"key": ["Yes"]}, "No"], comparison=comparison).status == status
    assert call(sandbox, program, expected=[{"key": ["Yes"]}, "on"], comparison="exact:nocase").status == "wrong_answer"


def test_what_the_solution_prints_is_kept(sandbox: Sandbox) -> None:
    program = "print('at import')\ndef f(): print('called'); return 1"
    assert check(sandbox, program, "assert f() == 1").stdout == b"at import\ncalled\n"
    assert call(sandbox, program, expected=1).stdout == b"at import\ncalled\n"


def test_nothing_of_the_test_reaches_the_solutions_process(sandbox: Sandbox) -> None:
    """The solution's process may read all its memory, files and descriptors: expected values are not there."""
    program = """
import gc, os, sys
def f(x):
    seen = repr(gc.get_objects()) + repr(dict(os.environ)) + repr(sys._getframe(1).f_locals) + repr(os.listdir("/tmp"))
    for fd in (0, 1, 2):
        try: seen += repr(os.pread(fd, 10000, 0))
        except OSError: pass
    print("leaked" if "".join(["8675", "309"]) in seen else "clean")
    return 1
"""
    assert check(sandbox, program, "assert f(1) == 8675309").stdout == b"clean\n"
    assert call(sandbox, program, 1, expected=8675309).stdout == b"clean\n"


NUMPY = (
    "import numpy as np\ndef f(a): return np.bool_(a > 0)\ndef g(a): return [a > np.int64(0), {a: a > np.float64(2)}]"
)


@pytest.mark.parametrize(
    "code",
    [
        "assert f(1) == True and f(0) == False",
        "assert f(1) and not f(0)",
        "assert f(1) in [True] and f(0) in {False: 1}",
        "assert g(1) == [True, {1: False}]",
        "assert str(f(1)) == 'True' and repr(f(0)) == 'np.False_'",
        "assert f(1) is True",
        "assert isinstance(f(1), bool)",
        "assert f(0) == True",
        "assert f(0) or type(f(1)) == bool",
        "assert f(f(1)) == True",
    ],
)
def test_numpys_bool_is_what_it_is_in_one_process(sandbox: Sandbox, code: str) -> None:
    try:
        exec(f"{NUMPY}\n{code}", {})
        expected = "accepted"
    except AssertionError:
        expected = "wrong_answer"
    assert check(sandbox, NUMPY, code).status == expected
