"""Limits of time, memory, output and processes: what a test reports, and which verdict it earns.

Bounds from above are on what a verdict reports, taken as a median: a busy machine may be late now and then.
"""

from __future__ import annotations

import resource
import statistics
from collections.abc import Iterator
from dataclasses import replace

import pytest

from ctrl_hpc.records import Limits, StdinTest, TestResult
from ctrl_hpc.sandbox import Sandbox

pytestmark = [pytest.mark.slow, pytest.mark.alone]  # short limits, and processes are counted

LIMITS = Limits(cpu_s=0.5, wall_s=30.0, memory_mb=128, output_bytes=1000, processes=8)
IDLE_MB = 20
"""An interpreter alone needs less."""


@pytest.fixture(scope="module", params=[True, False], ids=["cgroup", "watchdog"])
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    with Sandbox(workers=1, use_cgroup=request.param) as sandbox:
        yield sandbox


def run(sandbox: Sandbox, program: str, limits: Limits = LIMITS) -> TestResult:
    (result,) = sandbox.run_tests(program, [StdinTest(stdin="", expected_stdout="done")], limits).tests
    return result


def test_cpu_time(sandbox: Sandbox) -> None:
    result = run(sandbox, "while True: pass")
    assert (result.status, result.signal, result.exit_code) == ("time_limit", 9, None)
    assert 0.5 <= result.cpu_s < 1.5 and result.wall_s >= 0.5


def test_wall_time(sandbox: Sandbox) -> None:
    result = run(sandbox, "import time; time.sleep(60)", replace(LIMITS, wall_s=0.5))
    assert (result.status, result.signal) == ("time_limit", 9)
    assert result.wall_s >= 0.5 and result.cpu_s < 0.5


@pytest.mark.parametrize("program", ["import time; time.sleep(60)", "while True: pass"], ids=["sleeps", "spins"])
def test_the_wall_limit_strikes_within_50_ms(sandbox: Sandbox, program: str) -> None:
    limits = replace(LIMITS, cpu_s=30.0, wall_s=0.2)
    results = [run(sandbox, program, limits) for _ in range(7)]
    assert {result.status for result in results} == {"time_limit"}
    assert 0.2 <= statistics.median(result.wall_s for result in results) < 0.25


def test_fractions_of_a_second_count(sandbox: Sandbox) -> None:
    spin = "import time\nend = time.process_time() + 0.2\nwhile time.process_time() < end: pass\nprint('done')"
    assert run(sandbox, spin, replace(LIMITS, cpu_s=0.1)).status == "time_limit"
    within = run(sandbox, spin, replace(LIMITS, cpu_s=5.0))
    assert within.status == "accepted" and 0.2 <= within.cpu_s < 0.5


def test_cpu_time_of_children_counts(sandbox: Sandbox) -> None:
    spin = """
import os, time
for _ in range(3):
    if os.fork() == 0:
        end = time.process_time() + 0.3
        while time.process_time() < end: pass
        os._exit(0)
for _ in range(3): os.wait()
print('done')
"""
    result = run(sandbox, spin)
    assert result.status == "time_limit" and result.cpu_s >= 0.9


@pytest.mark.parametrize("touched_mb", [0, 30, 90])
def test_peak_memory(sandbox: Sandbox, touched_mb: int) -> None:
    """Against what the program itself finds its peak to be, and what it must be."""
    program = f"""
import resource
x = b"x" * ({touched_mb} << 20)
del x
print("done", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    result = run(sandbox, program)
    own_mb = int(result.stdout.split()[1]) / 1024
    assert abs(result.peak_memory_mb - own_mb) < 10
    assert touched_mb < result.peak_memory_mb < touched_mb + IDLE_MB


@pytest.mark.parametrize(
    ("name", "program", "status"),
    [
        ("used and freed", "x = b'x' * (150 << 20); del x; print('done')", "memory_limit"),
        ("within", "x = b'x' * (90 << 20); print('done')", "accepted"),
        ("reserved only", "import mmap; x = mmap.mmap(-1, 200 << 20); print('done')", "accepted"),
        ("impossible", "x = bytearray(1 << 40)", "memory_limit"),
        ("impossible and caught", "try: x = bytearray(1 << 40)\nexcept MemoryError: print('done')", "accepted"),
        ("deep inside", "def f(n): return f(n - 1) if n else [0] * (1 << 40)\nf(50)", "memory_limit"),
        ("raised by the program", "raise MemoryError('mine')", "runtime_error"),
        ("raised in a function", "def f(): raise MemoryError\nf()", "runtime_error"),
        ("printed", "import sys; print('MemoryError', file=sys.stderr); sys.exit(1)", "runtime_error"),
    ],
)
def test_memory_verdicts(sandbox: Sandbox, name: str, program: str, status: str) -> None:
    assert run(sandbox, program).status == status


def test_memory_of_all_processes_together(sandbox: Sandbox) -> None:
    program = """
import os, time
for _ in range(6):
    if os.fork() == 0:
        x = b"x" * (60 << 20)
        time.sleep(60)
time.sleep(60)
"""
    assert run(sandbox, program, replace(LIMITS, cpu_s=20.0)).status == "memory_limit"


def test_output_is_kept_up_to_the_limit(sandbox: Sandbox) -> None:
    whole = run(sandbox, "print('x' * 999)")
    assert whole.status == "wrong_answer" and whole.stdout == b"x" * 999 + b"\n"
    more = run(sandbox, "print('x' * 1000)")
    assert more.status == "output_limit" and more.stdout == b"x" * 1000
    errors = run(sandbox, "import sys; sys.stderr.write('e' * 1001); print('done')")
    assert errors.status == "output_limit" and errors.stderr == b"e" * 1000


def test_a_flood_costs_the_executor_little_memory(sandbox: Sandbox) -> None:
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(5):
        assert run(sandbox, "while True: print('x' * 10 ** 6)").status == "output_limit"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 10 * 1024


def test_processes_and_threads(sandbox: Sandbox) -> None:
    program = """
import threading, time
count = 0
try:
    for _ in range(100):
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        count += 1
except RuntimeError:
    print(count)
"""
    assert run(sandbox, program).stdout == b"7\n"  # and the main thread


def test_output_comes_before_time_and_time_before_errors(sandbox: Sandbox) -> None:
    assert run(sandbox, "print('x' * 2000, flush=True)\nwhile True: pass").status == "output_limit"
    late = "import os\ntry:\n    while True: pass\nfinally: os._exit(1)"
    assert run(sandbox, late).status == "time_limit"


@pytest.mark.parametrize(
    ("program", "exit_code", "signal", "stderr"),
    [
        ("import sys; sys.exit(3)", 3, None, b""),
        ("raise SystemExit", 0, None, b""),
        ("import sys; sys.exit('why')", 1, None, b"why\n"),
        ("exit(4)", 4, None, b""),
        ("quit()", 0, None, b""),
        ("import os; os._exit(200)", 200, None, b""),
        ("import os; os.kill(os.getpid(), 15)", None, 15, b""),
        ("def f(:", 1, None, b"SyntaxError: invalid syntax\n"),
        ("x = '\\ud800'.encode()", 1, None, b"surrogates not allowed\n"),
        ("1 / 0", 1, None, b'  File "solution.py", line 1, in <module>\n    1 / 0\n'),
        ("import atexit; atexit.register(print, 'bye'); exit(5)", 5, None, b""),
        ("import threading; threading.Thread(target=print).start()", 0, None, b""),
        ("\0", 1, None, b"source code string cannot contain null bytes\n"),
    ],
)
def test_how_programs_end(sandbox: Sandbox, program: str, exit_code: int, signal: int, stderr: bytes) -> None:
    result = run(sandbox, program)
    assert (result.exit_code, result.signal) == (exit_code, signal) and stderr in result.stderr
    expected = "wrong_answer" if exit_code == 0 else "runtime_error"
    assert result.status == expected
    if "bye" in program:
        assert result.stdout == b"bye\n"


def test_a_program_runs_as_a_script_does(sandbox: Sandbox) -> None:
    program = """# coding: utf-8
import sys, os, dataclasses, typing, pickle, collections, random, asyncio
assert __name__ == "__main__" and sys.modules["__main__"].__dict__ is globals()
@dataclasses.dataclass
class Point:
    x: int
assert pickle.loads(pickle.dumps(Point(3))) == Point(3) and typing.get_type_hints(Point) == {"x": int}
assert sys.argv == ["solution.py"] and os.getcwd() == "/tmp" and len({random.random() for _ in range(9)}) == 9
async def f(): return "done"
sys.setrecursionlimit(100000)
def deep(n): return n and deep(n - 1)
deep(50000)
print(asyncio.run(f()))
"""
    result = run(sandbox, program, replace(LIMITS, cpu_s=10.0))
    assert result.status == "accepted", result
