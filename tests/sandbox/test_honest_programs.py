"""What honest programs do that a judge must let them: recursion, memory, threads, paths, packages, preambles."""

from __future__ import annotations

import json
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ctrl_hpc.flow.steps import execution, limits
from ctrl_hpc.harness import HARNESSES, prepared
from ctrl_hpc.records import AssertTest, Execution, FunctionTest, Limits, Override, Problem, Rules, StdinTest, TestCase
from ctrl_hpc.sandbox import Sandbox, fusion, interpreter, rootfs
from ctrl_hpc.sandbox.cache import VerdictCache

LIMITS = Limits(cpu_s=10.0, wall_s=30.0, memory_mb=256)
RECURSION = "import sys, functools\nsys.setrecursionlimit(10**6)\n"
THREE = {
    "lru_cache": RECURSION + "@functools.lru_cache(None)\ndef f(n): return n and 1 + f(n - 1)\nprint(f(50000) - 49997)",
    "lru_cache in a thread": RECURSION
    + "import threading\nthreading.stack_size(256 << 20)\n@functools.lru_cache(None)\n"
    "def f(n): return n and 1 + f(n - 1)\n"
    "t = threading.Thread(target=lambda: print(f(50000) - 49997))\nt.start(); t.join()",
    "sum": RECURSION + "def f(n): return sum(f(m) for m in (n - 1,)) + 1 if n else 0\nprint(f(5000) - 4997)",
    "max of map": RECURSION + "def f(n): return max(map(f, (n - 1,))) + 1 if n else 0\nprint(f(5000) - 4997)",
    "sorted by key": RECURSION + "def f(n): return n and 1 + (sorted([n - 1], key=f) and 0)\nprint(f(5000) + 2)",
    "getattr": RECURSION + "class A:\n    def __getattr__(self, name):\n        n = int(name[1:])\n"
    "        return 1 + getattr(self, f'x{n - 1}') if n else 0\nprint(A().x5000 - 4997)",
    "less than": RECURSION + "class A:\n    def __init__(self, n): self.n = n\n    def __lt__(self, other):\n"
    "        return self.n == 0 or A(self.n - 1) < other\nprint(3 if A(5000) < A(0) else 0)",
    "partial": RECURSION + "def f(n): return n and 1 + functools.partial(f, n - 1)()\nprint(f(5000) - 4997)",
    "plain": RECURSION + "def f(n): return n and 1 + f(n - 1)\nprint(f(50000) - 49997)",
    "infinite": "def f(): return f()\ntry: f()\nexcept RecursionError: print(3)",
    "digits": "print(len(str(10**5000)) - 4998)",
    "stack": "import resource\nresource.setrlimit(resource.RLIMIT_STACK, (resource.RLIM_INFINITY,) * 2)\nprint(3)",
    "reserved": "import mmap\nx = mmap.mmap(-1, 8 << 30)\nprint(3)",
    "reserved by numpy": "import numpy as np\nx = np.zeros(1 << 30)\nprint(3)",
    "stdin by path": "print(open('/dev/stdin').read().strip())",
    "stdin by number": "print(open(0).read().strip())",
    "stdin replaced": "import sys\nsys.stdin = open('/dev/stdin')\nprint(input())",
    "stdin by os": "import os\nprint(os.read(os.open('/dev/stdin', os.O_RDONLY), 9).decode().strip())",
    "stdout by path": "open('/dev/stdout', 'w').write('3\\n')",
    "stderr by path": "open('/dev/stderr', 'w').write('note')\nprint(3)",
    "pool": "from multiprocessing import Pool\ndef f(x): return x\nif __name__ == '__main__':\n"
    "    with Pool() as p: print(sum(p.map(f, [1, 2])))",
    "process pool": "from concurrent.futures import ProcessPoolExecutor\ndef f(x): return x\n"
    "with ProcessPoolExecutor(3) as p: print(sum(p.map(f, [1, 2])))",
    "queue": "import multiprocessing as mp\nq = mp.Queue()\np = mp.Process(target=q.put, args=(3,))\np.start()\n"
    "print(q.get())\np.join()",
    "shared memory": "from multiprocessing import shared_memory\nx = shared_memory.SharedMemory(create=True, size=9)\n"
    "x.buf[0] = 3\nprint(x.buf[0])\nx.close(); x.unlink()",
    "threads": "import threading, time\nts = [threading.Thread(target=time.sleep, args=(0.2,)) for _ in range(100)]\n"
    "[t.start() for t in ts]; [t.join() for t in ts]\nprint(3)",
    "time zone": "from zoneinfo import ZoneInfo\nfrom datetime import datetime\n"
    "print(datetime(2024, 7, 1, tzinfo=ZoneInfo('Europe/Paris')).utcoffset().seconds // 3600 + 1)",
    "own file": "print(3 if open(__file__).read().startswith('print(3') else 0)",
    "own source": "import inspect\ndef f(): return 3\nprint(3 if 'return 3' in inspect.getsource(f) else 0)",
    "locale": "import locale\nlocale.setlocale(locale.LC_ALL, '')\nprint(3)",
    "numpy": "import numpy as np\nprint(np.arange(3).sum())",
}
"""Programs that print 3, which is what they are given."""


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox(workers=1) as made:
        yield made


@pytest.mark.parametrize("name", THREE)
def test_honest_programs_are_accepted(sandbox: Sandbox, name: str) -> None:
    verdict = sandbox.run_tests(THREE[name], [StdinTest(stdin="3\n", expected_stdout="3\n")], LIMITS)
    assert verdict.accepted, verdict


KINDS = tomllib.loads(Path(__file__).with_name("honest_programs.toml").read_text(encoding="utf-8"))


def _honest(given: dict[str, Any]) -> Execution:
    tests: tuple[TestCase, ...]
    if "call" in given:
        name, args, expected = json.loads(given["call"])
        tests = (FunctionTest(name=name, args=tuple(args), expected=expected),) * given.get("times", 1)
    elif "code" in given:
        tests = (AssertTest(code=given["code"]),)
    else:
        tests = (StdinTest(stdin=given.get("stdin", ""), expected_stdout=given["stdout"]),)
    harness = given.get("harness", "codecontests")
    problem = Problem(id="p", source=harness, split="test", prompt="", tests=tests, harness=harness)
    problem = replace(problem, comparison=given.get("comparison"), starter_code=given.get("starter"))
    return execution(problem, given["program"], Rules())


def test_right_programs_of_many_kinds_are_accepted(sandbox: Sandbox) -> None:
    """Recursion through C, numbers of many digits, ways to read and write, what stands around a program."""
    verdicts = sandbox.run_many([_honest(given) for given in KINDS.values()])
    refused = {
        name: f"{verdict.status} {verdict.detail}"
        for name, verdict in zip(KINDS, verdicts, strict=True)
        if not verdict.accepted
    }
    assert refused == {}


@pytest.mark.slow
def test_reserved_memory_is_free_under_the_watchdog_too() -> None:
    with Sandbox(workers=1, use_cgroup=False) as watched:
        for name in ("reserved", "reserved by numpy", "threads", "pool"):
            verdict = watched.run_tests(THREE[name], [StdinTest(stdin="3\n", expected_stdout="3\n")], LIMITS)
            assert verdict.accepted, (name, verdict)


def test_what_is_left_in_shared_memory_does_not_reach_the_next_program(sandbox: Sandbox) -> None:
    leave = "open('/dev/shm/note', 'w').write('x')\nimport os\nos.makedirs('/dev/shm/a/b')"
    look = "import os\nprint(os.listdir('/dev/shm'))"
    for program in (leave, look):
        verdict = sandbox.run_tests(program, [StdinTest(stdin="", expected_stdout="")], LIMITS)
    assert verdict.tests[0].stdout == b"[]\n"


@pytest.mark.parametrize(
    ("stdin", "program", "stdout"),
    [
        ("1\r\nYES\r\n", "input(); print(repr(input()))", "'YES\\r'"),
        ("a\rb\n", "print(repr(input()))", "'a\\rb'"),
        ("a\r\n", "import sys; print(repr(sys.stdin.read()))", "'a\\r\\n'"),
        ("a\u0085b\n", "print(repr(input()))", "'a\\x85b'"),
        ("no end", "print(input())", "no end"),
    ],
)
def test_stdin_is_handed_over_as_it_is(sandbox: Sandbox, stdin: str, program: str, stdout: str) -> None:
    assert sandbox.run_tests(program, [StdinTest(stdin=stdin, expected_stdout=stdout)], LIMITS).accepted


def test_output_may_be_twice_what_is_expected(sandbox: Sandbox) -> None:
    tight = replace(LIMITS, output_bytes=1000)
    expected = "".join(f"{n}\n" for n in range(2000))
    right = sandbox.run_tests("for n in range(2000): print(n)", [StdinTest(stdin="", expected_stdout=expected)], tight)
    assert right.accepted
    long = [StdinTest(stdin="", expected_stdout=expected)]
    assert sandbox.run_tests("for n in range(3000): print(n)", long, tight).status == "wrong_answer"
    assert sandbox.run_tests("for n in range(9000): print(n)", long, tight).status == "output_limit"
    call = [FunctionTest(name="f", args=(), expected=list(range(2000)))]
    assert sandbox.run_tests("def f(): return list(range(2000))", call, tight).accepted


LIVE = Problem(id="p", source="livecodebench", split="test", prompt="", tests=(), harness="livecodebench")


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("class Solution:\n    def f(self, a: List[int]) -> int: return len(a)", "f"),
        ("from __future__ import annotations\nclass Solution:\n    def f(self, a: Nothing) -> int: return len(a)", "f"),
        ("class Solution:\n    def search(self, a): return len(a)", "search"),
        ("class Solution:\n    def merge(self, a): return len(a)", "merge"),
        ("class Solution:\n    def gcd(self, a): return len(a)", "gcd"),
        ("def gcd(a): return len(a)", "gcd"),
        ("def f(a): return 0\nclass Solution:\n    def f(self, a): return len(a)", "f"),
        (
            "class Solution:\n    def f(self, a):\n        def g(n): return n and 1 + g(n - 1)\n"
            "        return g(5000) - 4998",
            "f",
        ),
        ("class Solution:\n    def f(self, a): return floor(2.5) + Counter(a)[7]", "f"),
        ("import numpy as np\nclass Solution:\n    def f(self, a): return np.int64(len(a))", "f"),
    ],
)
def test_a_run_and_submit_share_the_harness(sandbox: Sandbox, program: str, name: str) -> None:
    """The same answer is right in training and by HTTP."""
    problem = replace(LIVE, tests=(FunctionTest(name=name, args=([1, 2],), expected=2),), comparison="livecodebench")
    tests = {"input_output": json.dumps({"inputs": ["[1, 2]"], "outputs": ["2"], "fn_name": name})}
    body = fusion.SubmitBody(
        dataset="any",
        id=1,
        completion=f"```python\n{program}\n```",
        config=fusion.TestConfig(dataset_type="LiveCodeBenchDataset", provided_data={"test": tests}),
    )
    by_http, _ = fusion.submission(body)
    in_a_run = execution(problem, program, Rules())
    assert (by_http.program, by_http.preamble) == (in_a_run.program, in_a_run.preamble)
    for verdict in sandbox.run_many([by_http, in_a_run]):
        assert verdict.accepted, verdict


def test_a_name_that_only_the_preamble_has_is_no_solution(sandbox: Sandbox) -> None:
    problem = replace(LIVE, tests=(FunctionTest(name="gcd", args=(4, 6), expected=2),))
    (verdict,) = sandbox.run_many([execution(problem, "x = 1", Rules())])
    assert verdict.status == "runtime_error" and "does not define gcd" in verdict.detail


def test_errors_keep_the_programs_own_lines(sandbox: Sandbox) -> None:
    problem = replace(LIVE, tests=(StdinTest(stdin="", expected_stdout=""),))
    (verdict,) = sandbox.run_many([execution(problem, "x = 1\n1 / 0", Rules())])
    assert b'File "solution.py", line 2, in <module>\n    1 / 0' in verdict.tests[0].stderr


def test_livecodebench_takes_no_account_of_the_exit_code(sandbox: Sandbox) -> None:
    for source, status in (("livecodebench", "accepted"), ("codecontests", "runtime_error")):
        problem = replace(LIVE, harness=source, tests=(StdinTest(stdin="", expected_stdout="1\n"),))
        for program in ("print(1)\nraise SystemExit('x')", "import sys\nprint(1)\nsys.exit(1)"):
            (verdict,) = sandbox.run_many([execution(problem, program, Rules())])
            assert verdict.status == status


HUMAN = (
    "from typing import List\n\ndef helper(x):\n    return x + 1\n\ndef top(a: List[int]) -> int:\n    '''Largest.'''\n"
)


@pytest.mark.parametrize(
    "program",
    [
        "def top(a: List[int]) -> int:\n    return max(a)",
        "def top(a):\n    return helper(max(a)) - 1",
        "    return max(a)\n",
        HUMAN + "    return max(a)\n",
    ],
)
def test_answers_to_humaneval_need_not_repeat_the_prompt(sandbox: Sandbox, program: str) -> None:
    test = FunctionTest(name="top", args=([1, 3],), expected=3)
    problem = replace(LIVE, harness="humaneval", source="humaneval", starter_code=HUMAN, tests=(test,))
    (verdict,) = sandbox.run_many([execution(problem, program, Rules())])
    assert verdict.accepted, verdict


def test_tacos_numpy_is_there_for_those_who_say_it(sandbox: Sandbox) -> None:
    assert "numpy" not in (prepared("taco", None, "print(1)")[0] or "")
    preamble, _ = prepared("taco", None, "print(int(np.arange(3).sum()), floor(2.5))\n")
    assert "numpy" in (preamble or "")
    tests = (StdinTest(stdin="", expected_stdout="3 2\n"),)
    run = Execution(program="print(int(np.arange(3).sum()), floor(2.5))", preamble=preamble, tests=tests, limits=LIMITS)
    assert sandbox.run_many([run])[0].accepted


def test_an_unknown_harness_lists_the_choices() -> None:
    with pytest.raises(ValueError, match="'apps' is not one of livecodebench, taco, humaneval, mbpp, codecontests"):
        prepared("apps", None, "")
    assert set(HARNESSES) == {"", "livecodebench", "taco", "humaneval", "mbpp", "codecontests"}


def test_livecodebenchs_rule_takes_decimals_as_they_are_and_another_can_be_asked_for(sandbox: Sandbox) -> None:
    """As its grader has it, and within an error where a configuration says so."""
    printed = "print(0.1 + 0.2, '1.4142135623')"
    test = StdinTest(stdin="", expected_stdout="0.3 1.41421356237310\n")
    problem = replace(LIVE, tests=(test,), comparison="livecodebench")
    lax = Rules(overrides={"livecodebench": Override(comparison="float")})
    runs = [execution(problem, printed, rules) for rules in (Rules(), lax)]
    assert [verdict.status for verdict in sandbox.run_many(runs)] == ["wrong_answer", "accepted"]


def test_limits_by_factor_and_by_data_set() -> None:
    slow = replace(LIVE, cpu_s=2.0, memory_mb=64)
    given = Rules(time_factor=3.0, overrides={"taco": Override(cpu_s=30.0, comparison="taco")})
    assert (limits(slow, given).cpu_s, limits(slow, given).wall_s, limits(slow, given).memory_mb) == (6.0, 12.0, 64)
    other = replace(slow, source="taco", comparison="float:abs=0.1")
    assert (limits(other, given).cpu_s, limits(other, given).wall_s) == (30.0, 60.0)
    assert (
        execution(other, "", given).comparison == "taco" and execution(other, "", Rules()).comparison == "float:abs=0.1"
    )


def test_what_programs_run_with_is_a_choice(tmp_path: Path) -> None:
    found = rootfs.contents()
    assert set(found.named()) >= {"python", "numpy"}
    bare = rootfs.contents("", [])
    assert bare.identity() != found.identity()
    keys = {VerdictCache(tmp_path, jail=one.identity()).key(RUN) for one in (found, bare)}
    assert len(keys) == 2
    sympy = rootfs.contents("", ["sympy"])
    assert set(sympy.named()) == {"python", "sympy", "mpmath"}  # with what it requires
    with pytest.raises(ValueError, match=r"executor.packages: no-such-thing is not installed for .*; install it there"):
        rootfs.contents("", ["no-such-thing"])
    with pytest.raises(ValueError, match=r"executor.python: 'no-such-python' is not an interpreter on this machine"):
        rootfs.contents("no-such-python", [])


RUN = Execution(program="print(3)", tests=(StdinTest(stdin="", expected_stdout="3"),), limits=LIMITS)


@pytest.mark.slow
def test_another_interpreter_and_no_packages() -> None:
    other = next((path for name in ("python3.11", "python3.13") if (path := shutil.which(name)) and _runs(path)), None)
    if other is None:
        pytest.skip("no other CPython from 3.11 on is on PATH")
    with Sandbox(workers=1, python=other, packages=[]) as made:
        version = interpreter.interpreter(other).version
        program = (
            f"import sys\nassert sys.version.startswith('{version}')\ntry: import numpy\nexcept ImportError: print(3)"
        )
        assert made.run_many([replace(RUN, program=program)])[0].accepted
        for name in ("lru_cache", "lru_cache in a thread", "sum", "pool", "stdin by path", "digits", "time zone"):
            test = StdinTest(stdin="3\n", expected_stdout="3\n")
            verdict = made.run_tests(THREE[name], [test], LIMITS)
            assert verdict.accepted, (name, verdict)
        assert made.run_tests("def f(x): return x", [FunctionTest(name="f", args=(1,), expected=1)]).accepted


def _runs(python: str) -> bool:
    return subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0
