"""Whatever a solution answers, raises or defines is judged, and is its own doing: no answer breaks the judge."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from ctrl_hpc.records import AssertTest, FunctionTest, Limits, StdinTest
from ctrl_hpc.sandbox import Sandbox

LIMITS = Limits(cpu_s=1.0, wall_s=5.0, memory_mb=128)
OWN_DOING = {"wrong_answer", "unsupported", "runtime_error", "time_limit", "memory_limit", "output_limit"}
EXPECTED: list[object] = [2, 1.5, "a", [1, 2], (1, 2), {"a": 2}, {1, 2}, frozenset({(1, 2)}), None, True]


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(workers=1) as made:
        yield made
        assert made.run_tests("print(3)", [StdinTest(stdin="", expected_stdout="3")], LIMITS).accepted


def answers(line: bytes) -> str:
    """A solution that writes its own line to the protocol's channel."""
    return f"import os\ndef f(*a):\n    os.write(4, {line!r})\n    os._exit(0)\n"


LINES = [
    b"",
    b"\n",
    b"\xff\xfe\n",
    b"null\n",
    b"[]\n",
    b"{}\n",
    b'"value"\n',
    b'{"value":{}}\n',
    b'{"value":{"int":[]}}\n',
    b'{"value":{"int":"x"}}\n',
    b'{"value":{"int":"0x' + b"f" * 100_000 + b'"}}\n',
    b'{"value":' + b"9" * 50_000 + b"}\n",
    b'{"value":1e999999}\n',
    b'{"value":NaN}\n',
    b'{"value":{"dict":[[NaN,1]]}}\n',
    b'{"value":{"dict":[1,2]}}\n',
    b'{"value":{"dict":{"a":2}}}\n',
    b'{"value":{"dict":[[{"dict":[]},1]]}}\n',
    b'{"value":{"dict":[["a"]]}}\n',
    b'{"value":{"dict":null}}\n',
    b'{"value":{"set":[[],[]]}}\n',
    b'{"value":{"set":[{"set":[]},2]}}\n',
    b'{"value":{"set":{"a":1}}}\n',
    b'{"value":{"frozenset":[{"tuple":[1,{"set":[2]}]}]}}\n',
    b'{"value":{"tuple":"ab"}}\n',
    b'{"value":{"range":[1]}}\n',
    b'{"value":{"range":[0,9,0]}}\n',
    b'{"value":{"range":["a",null]}}\n',
    b'{"value":{"complex":[1,2,3]}}\n',
    b'{"value":{"complex":["a","b"]}}\n',
    b'{"value":{"bytes":5}}\n',
    b'{"value":{"bytes":"zz"}}\n',
    b'{"value":{"type":[]}}\n',
    b'{"value":{"type":"object"}}\n',
    b'{"value":{"Decimal":"sNaN"}}\n',
    b'{"value":{"Decimal":{}}}\n',
    b'{"value":{"Decimal":"1e999999999999999999999"}}\n',
    b'{"value":{"Fraction":"1/0"}}\n',
    b'{"value":{"Fraction":[1,2]}}\n',
    b'{"value":{"Fraction":"1E9999999"}}\n',
    b'{"value":{"deque":5}}\n',
    b'{"value":{"dict_items":[1,2]}}\n',
    b'{"value":{"dict_keys":[[]]}}\n',
    b'{"value":{"iterator":null}}\n',
    b'{"value":"\\ud800"}\n',
    b'{"value":' + b"[" * 50_000 + b"]" * 50_000 + b"}\n",
    b'{"value":' + b'{"tuple":[' * 5_000 + b"]}" * 5_000 + b"}\n",
    b'{"raise":5}\n',
    b'{"raise":"KeyError","args":5}\n',
    b'{"raise":"UnicodeDecodeError","bases":["UnicodeDecodeError"],"args":[1]}\n',
    b'{"raise":"a\\u0000b","bases":["a\\u0000b"],"args":[]}\n',
    b'{"raise":"\\ud800","bases":["\\ud800"],"args":["\\udfff"]}\n',
    b'{"raise":"X","bases":{"a":1},"args":[]}\n',
    b'{"raise":"X","bases":7,"args":[]}\n',
    b'{"raise":"ExceptionGroup","bases":["ExceptionGroup"],"args":["a",[]]}\n',
    b'{"raise":"S","bases":["S","StopIteration"],"args":[]}\n',
    b'{"unsupported":"\\ud800' + b"x" * 9_000 + b'"}\n',
    b'{"unsupported":{"a":[]}}\n',
    b'{"object":-1}\n',
    b'{"object":1e300}\n',
    b'{"class":true,"bases":5}\n',
    b'{"module":"os"}\n',
    b'{"callable":1}\n',
    b'{"value":9,"changed":5}\n',
    b'{"value":9,"changed":{"0":{"dict":5}}}\n',
    b'{"value":9,"changed":[1]}\n',
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[:40].decode("ascii", "replace"))
def test_any_line_on_the_channel_is_a_verdict_on_the_program(sandbox: Sandbox, line: bytes) -> None:
    functions = [FunctionTest(name="f", args=([1],), expected=item) for item in EXPECTED]
    if line == b'{"value":{}}\n' or line == b"\n":
        functions = functions[:3]
    tests = [*functions, AssertTest(code="x = [1]\nassert f(x) == 2"), AssertTest(code="assert not f([1]) - 2")]
    verdict = sandbox.run_tests(answers(line), tests, LIMITS)
    assert {test.status for test in verdict.tests} <= OWN_DOING, [test.status for test in verdict.tests]


VALUES = {
    "equal to all": "class A:\n    def __eq__(s, o): return True\n    __hash__ = None\ndef f(*a): return A()",
    "raises on ==": "class A:\n    def __eq__(s, o): raise SystemExit(0)\ndef f(*a): return A()",
    "raises on hash": "class A(int):\n    def __hash__(s): raise KeyboardInterrupt\ndef f(*a): return A(9)",
    "raises on bool": "class A:\n    def __bool__(s): raise StopIteration\ndef f(*a): return A()",
    "raises on repr": "class A:\n    def __repr__(s): raise OSError\n    __str__ = __repr__\ndef f(*a): return A()",
    "raises on iter": "class A(list):\n    def __iter__(s): raise GeneratorExit\ndef f(*a): return A([1])",
    "length of -1": "class A:\n    def __len__(s): return -1\ndef f(*a): return A()",
    "length of text": "class A:\n    def __len__(s): return 'a'\ndef f(*a): return A()",
    "class is int": "class A:\n    __class__ = int\n    def __int__(s): raise OSError\ndef f(*a): return A()",
    "class is dict": "class A:\n    __class__ = property(lambda s: 1 / 0)\ndef f(*a): return A()",
    "reduces": "class A:\n    def __reduce__(s): return (exit, (0,))\ndef f(*a): return A()",
    "holds itself": "def f(*a):\n    x = []; x.append(x); return x",
    "dict holds itself": "def f(*a):\n    x = {}; x[1] = x; return x",
    "deep": "def f(*a):\n    x = 0\n    for _ in range(100_000): x = [x]\n    return x",
    "deep tuple": "def f(*a):\n    x = ()\n    for _ in range(59): x = (x,)\n    return x",
    "generator that exits": "def f(*a):\n    yield 1\n    raise SystemExit(0)",
    "generator that stops": "def f(*a):\n    yield 1\n    raise StopIteration",
    "endless": "import itertools\ndef f(*a): return itertools.count()",
    "surrogate": "def f(*a): return '\\ud800'",
    "keys that are not numbers": "def f(*a): return {float('nan'): 1, float('nan'): 2}",
    "huge": "def f(*a): return 10 ** 100_000",
    "shared": "def f(*a):\n    x = [0]\n    for _ in range(40): x = [x, x]\n    return x",
    "colliding": "def f(*a): return {n * ((1 << 61) - 1) for n in range(20_000)}",
    "coroutine": "async def f(*a): return 2",
    "raises its own": "class E(BaseException): pass\ndef f(*a): raise E",
    "raises endlessly": "class E(Exception):\n    def __str__(s): raise E\n    __repr__ = __str__\ndef f(*a): raise E",
    "raises a group": "def f(*a): raise BaseExceptionGroup('a', [SystemExit(0)])",
    "raises huge arguments": "def f(*a): raise ValueError('x' * (40 << 20))",
    "arguments are hostile": "class S(str):\n    def __str__(s): exit(0)\ndef f(*a): raise ValueError(S('a'))",
    "changes into itself": "def f(x):\n    x.append(x)\n    return 9",
    "changes into many": "def f(x):\n    x.extend(range(2_000_000))\n    return 9",
}


@pytest.mark.parametrize("name", VALUES)
def test_any_value_is_a_verdict_on_the_program(sandbox: Sandbox, name: str) -> None:
    tests = [
        FunctionTest(name="f", args=([1],), expected={1, 2}),
        AssertTest(code="x = [1]\nassert f(x) == 2"),
        AssertTest(code="import copy\nr = f([1])\nassert copy.copy(r) == [7] and len(r) == 1 and r"),
    ]
    verdict = sandbox.run_tests(VALUES[name], tests, Limits(cpu_s=0.2, wall_s=2.0, memory_mb=128))
    assert {test.status for test in verdict.tests} <= OWN_DOING, [test.status for test in verdict.tests]


def test_hashes_that_collide_cost_the_judge_nothing(sandbox: Sandbox) -> None:
    """The solution does not even make the set: it writes what stands for it."""
    line = b'{"value":{"set":[%s]}}' % b",".join(b"%d" % (n * ((1 << 61) - 1)) for n in range(20_000))
    expected = {n * 3 for n in range(20_000)}
    start = time.process_time()
    verdict = sandbox.run_tests(answers(line), [FunctionTest(name="f", args=(), expected=expected)], LIMITS)
    assert verdict.status == "wrong_answer" and time.process_time() - start < 2


CASES = "cases = [((1, 2), 3), ((4, 5), 9)]\n"
ENDINGS = [
    "StopIteration",
    "StopAsyncIteration",
    "GeneratorExit",
    "KeyboardInterrupt",
    "SystemExit(0)",
    "BaseException",
]
ENDINGS += [
    "type('S', (StopIteration,), {})",
    "type('S', (type('T', (StopIteration,), {}),), {})",
    "asyncio.CancelledError",
]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize(
    "code",
    [
        CASES + "assert all(map(lambda c: f(*c[0]) == c[1], cases))",
        CASES + "assert not [c for c in map(lambda c: (f(*c[0]), c[1]), cases) if c[0] != c[1]]",
        CASES + "class It:\n    def __iter__(self): return self\n"
        "    def __next__(self): return f(1, 2) == 3\nassert all(It())",
        "assert next(map(lambda _: f(1, 2) == 3, [1]), True)",
        "for x in iter(lambda: f(1, 2), 3): assert False",
    ],
)
def test_an_exception_of_the_solutions_is_no_end_of_the_tests_iteration(
    sandbox: Sandbox, ending: str, code: str
) -> None:
    program = f"import asyncio\ndef f(a, b): raise {ending}"
    assert sandbox.run_tests(program, [AssertTest(code=code)], LIMITS).status in ("runtime_error", "unsupported")


YES = "def {0}(*a, **k): return True\ndef f(a): return 0.0"
NO_ANSWER = {
    "isclose": (YES.format("isclose"), "assert isclose(f(2), 1.41421356)"),
    "isclose of a name": (YES.format("isclose"), "r = f(2)\nassert isclose(r, 1.41421356)"),
    "allclose": (YES.format("allclose"), "assert allclose([f(2)], [1.41421356])"),
    "as a value": (YES.format("isclose"), "assert all(map(isclose, [f(2)], [1.41421356]))"),
    "assert_equal": ("def Counter(*a): return 0\ndef f(a): return []", "assert Counter(f(2)) == Counter([1, 2])"),
    "deepcopy": ("def deepcopy(a): return 1\ndef f(a): return 0", "assert deepcopy(f(2)) == deepcopy(1)"),
    "class": ("class Counter(dict):\n    pass\ndef f(a): return []", "assert Counter(f(2)) == Counter([1, 2])"),
    "instance": (
        "class M:\n    def __call__(s, *a): return True\nisclose = M()\ndef f(a): return 0.",
        "assert isclose(f(2), 1)",
    ),
    "number": ("pi = 0.0\ndef f(a): return 0.0", "assert abs(f(1) - pi) < 1e-9"),
    "module class": (
        "class math:\n    @staticmethod\n    def fabs(a): return 0\ndef f(a): return 0",
        "assert math.fabs(f(2) - 1) < 1",
    ),
    "module object": (
        "class M:\n    def fabs(s, a): return 0\nmath = M()\ndef f(a): return 0",
        "assert math.fabs(f(2) - 1) < 1",
    ),
    "numpy": (
        "class M:\n    def allclose(s, *a): return True\nnp = M()\ndef f(a): return 0",
        "assert np.allclose(f(2), 1)",
    ),
    "builtin": ("def abs(x): return 0\ndef sum(x): return -1", "assert abs(sum([0.5, 0.25]) - 0.75) < 1e-9"),
    "builtin beside": ("def abs(x): return 0\ndef f(x): return -1", "assert abs(f([0.5, 0.25]) - 0.75) < 1e-9"),
    "builtin alone": ("def abs(x): return 0", "assert abs(sum([0.5, 0.25]) - 0.5) < 1e-9"),
    "two of the library": (
        "def isclose(*a): return True\ndef sqrt(x): return 0",
        "assert isclose(sqrt(2), 1.41421356)",
    ),
    "library in a list": ("def sqrt(x): return 0\nclass isclose(list): pass", "assert isclose([sqrt(2)])"),
}


@pytest.mark.parametrize("name", NO_ANSWER)
def test_a_solution_does_not_answer_for_the_library(sandbox: Sandbox, name: str) -> None:
    program, code = NO_ANSWER[name]
    assert sandbox.run_tests(program, [AssertTest(code=code)], LIMITS).status in ("wrong_answer", "unsupported")


HONEST = {
    "imported": (
        "from math import isclose, sqrt\ndef f(a): return sqrt(a)",
        "assert isclose(f(2), 1.41421356, rel_tol=1e-6)",
    ),
    "imported module": (
        "import math\ndef f(a): return a ** 0.5",
        "assert math.isclose(f(2), 1.41421356, rel_tol=1e-6)",
    ),
    "numpy": ("import numpy as np\ndef f(a): return a", "assert np.allclose(f(2.0), 2.0)"),
    "counter": ("from collections import Counter\ndef f(a): return [1, 2]", "assert Counter(f(2)) == Counter([2, 1])"),
    "constant": ("from math import pi\ndef f(a): return pi * a", "assert abs(f(2) - 2 * pi) < 1e-9"),
    "method of an object": (
        "import random\ndef f(a): return a",
        "random.seed(1)\nx = random.random()\nassert f(x) == x",
    ),
    "one of the library's names": ("def gcd(a, b): return b if a == 0 else gcd(b % a, a)", "assert gcd(4, 6) == 2"),
    "the same with others": ("def gcd(a, b): return 2\ndef f(a): return a", "assert gcd(4, 6) == 2 and f(1) == 1"),
    "passed to a check": ("def add(a, b): return a + b", "def check(c):\n    assert c(1, 2) == 3\ncheck(add)"),
    "a builtin's name": ("def sum(a, b): return a + b", "assert sum(10, 15) == 25"),
    "a builtin's name in a builtin": ("def sorted(a): return [1, 2, 3]", "assert len(sorted([3])) == 3"),
    "a pattern's name": ("def f(a): return (1, 2)", "match f(0):\n    case (1, count): assert count == 2"),
}


@pytest.mark.parametrize("name", HONEST)
def test_what_a_solution_imports_for_the_test_is_the_librarys(sandbox: Sandbox, name: str) -> None:
    program, code = HONEST[name]
    verdict = sandbox.run_tests(program, [AssertTest(code=code)], LIMITS)
    assert verdict.accepted, verdict.detail


OUTPUTS = [
    b"1e99999999999999999999",
    b"-1e-99999999999999999999",
    b"sNaN",
    b"1" * 100_000,
    b"\xff\xfe",
    b"\x00",
    b"0x1",
    b"1_0",
]
OUTPUTS += [
    b"inf",
    b"nan",
    b"1." + b"3" * 100_000,
    "١".encode(),
    b"(" * 100_000,
    b"1e5 " * 10_000,
    b"\r\x0b\x85",
    b"infinity e",
]


@pytest.mark.parametrize("comparison", ["exact", "float", "lines", "livecodebench", "sandbox_fusion", "taco"])
def test_any_output_can_be_judged(sandbox: Sandbox, comparison: str) -> None:
    for output in OUTPUTS:
        program = f"import os\nos.write(1, {output!r})"
        for expected in ("1.5\n", "2 3\n", "7"):
            test = StdinTest(stdin="", expected_stdout=expected)
            verdict = sandbox.run_tests(program, [test], LIMITS, comparison=comparison)
            assert verdict.status in ("wrong_answer", "unsupported"), (output[:20], verdict)
