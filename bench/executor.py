"""How fast the executor is, in multiples of the floor: starting this Python bare, once a run, with nothing isolated.

Every round measures the floor and then each way of running programs, so that a noisy machine cancels out of the
ratios. A run is one test of one program; programs are all different and no cache is used. Beside the rate stands the
CPU time a run costs, of all processes that take part: it says the same where other work keeps the cores busy.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from ctrl_hpc import jsonl
from ctrl_hpc.progress import Steps
from ctrl_hpc.records import AssertTest, Execution, FunctionTest, Limits, StdinTest, TestCase
from ctrl_hpc.sandbox.client import ExecutorClient
from ctrl_hpc.sandbox.memory import descendants
from ctrl_hpc.sandbox.sandbox import Sandbox
from ctrl_hpc.sandbox.server import serve

ROUNDS = 5
CLIENTS = 4
FLOOR, FLOOR_ALONE = "floor: bare python", "one bare python at a time"
FRESH_ALONE = "fresh jail, 1 test, one at a time"
BESIDE = f"the server beside, /run_code, {CLIENTS} clients"
_LIMITS = Limits(cpu_s=5.0, wall_s=20.0, memory_mb=256)
_numbers = itertools.count()

Scenario = Callable[[float], float]
"""Runs for about so many seconds; returns runs a second."""


def program() -> str:
    """A short program that no one has run before."""
    return f"a = int(input())\nb = int(input())\nprint(a + b)\n# {os.getpid()} {next(_numbers)}"


def _execution(tests: int, kind: str = "stdin") -> Execution:
    made: list[TestCase]
    text = program()
    if kind == "stdin":
        made = [StdinTest(stdin=f"{n}\n2\n", expected_stdout=f"{n + 2}\n") for n in range(tests)]
    else:
        text = f"def add(a, b):\n    return a + b\n# {next(_numbers)}"
        code = "assert add(1, 2) == 3\nassert add(4, 5) == 9"
        made = [
            AssertTest(code=code) if kind == "assert" else FunctionTest(name="add", args=(1, 2), expected=3)
        ] * tests
    return Execution(program=text, tests=tuple(made), limits=_LIMITS)


def floor(workers: int) -> Scenario:
    """Bare interpreters, ``workers`` at a time."""
    python = str(Path(getattr(sys, "_base_executable", sys.executable)).resolve())

    def spawn() -> int:
        pid = os.posix_spawn(python, [python, "-I", "-S", "-c", "pass"], os.environ)
        assert os.waitpid(pid, 0)[1] == 0
        return 1

    return lambda seconds: _rate(seconds, [spawn] * workers)


def _rate(seconds: float, steps: list[Callable[[], int]]) -> float:
    """Runs a second of several threads, each of which repeats a step that returns its number of runs."""
    start = time.perf_counter()

    def repeat(step: Callable[[], int]) -> int:
        done = 0
        while time.perf_counter() - start < seconds:
            done += step()
        return done

    with ThreadPoolExecutor(len(steps)) as threads:
        return sum(threads.map(repeat, steps)) / (time.perf_counter() - start)


def pool(sandbox: Sandbox, tests: int, kind: str = "stdin", clients: int | None = None) -> Scenario:
    """Programs handed to a sandbox, ``clients`` (by default, one a worker) at a time."""

    def step() -> int:
        verdict = sandbox.submit(_execution(tests, kind)).result()
        assert verdict.accepted, verdict
        return tests

    return lambda seconds: _rate(seconds, [step] * (clients or sandbox.workers))


def compiled(sandbox: Sandbox, tests: int) -> Scenario:
    """A program in C++ whose binary is kept from before, one a worker at a time."""
    text = '#include <cstdio>\nint main() { long a, b; scanf("%ld%ld", &a, &b); printf("%ld\\n", a + b); }'
    made = tuple(StdinTest(stdin=f"{n}\n2\n", expected_stdout=f"{n + 2}\n") for n in range(tests))
    execution = Execution(program=text, tests=made, limits=_LIMITS, language="cpp")

    def step() -> int:
        verdict = sandbox.submit(execution).result()
        assert verdict.accepted, verdict
        return tests

    step()
    return lambda seconds: _rate(seconds, [step] * sandbox.workers)


def run_code(url: str, clients: int = CLIENTS) -> Scenario:
    """SandboxFusion's ``/run_code``, a program a request."""

    def step_of_client() -> Callable[[], int]:
        connection = http.client.HTTPConnection(urlsplit(url).netloc)

        def step() -> int:
            body = {"code": program(), "language": "python", "stdin": "1\n2\n"}
            answer = _post(connection, "/run_code", json.dumps(body))
            assert answer["run_result"]["stdout"] == "3\n", answer
            return 1

        return step

    return lambda seconds: _rate(seconds, [step_of_client() for _ in range(clients)])


def run_tests(url: str, tests: int, clients: int = CLIENTS) -> Scenario:
    """Our own route, a program a request."""

    def step_of_client() -> Callable[[], int]:
        connection = http.client.HTTPConnection(urlsplit(url).netloc)

        def step() -> int:
            body = {"executions": [jsonl.encode(_execution(tests))]}
            answer = _post(connection, "/run_tests", json.dumps(body))
            assert answer["verdicts"][0]["status"] == "accepted", answer
            return tests

        return step

    return lambda seconds: _rate(seconds, [step_of_client() for _ in range(clients)])


def _post(connection: http.client.HTTPConnection, path: str, body: str) -> dict:
    connection.request("POST", path, body, {"content-type": "application/json"})
    response = connection.getresponse()
    text = response.read()
    assert response.status == 200, text[:300]
    return json.loads(text)


def batches(executor: ExecutorClient, tests: int, size: int = 128) -> Scenario:
    """Our client with batches of ``size`` programs."""

    def step() -> int:
        assert all(verdict.accepted for verdict in executor.run_many([_execution(tests) for _ in range(size)]))
        return size * tests

    return lambda seconds: _rate(seconds, [step])


@contextmanager
def service(workers: int) -> Iterator[str]:
    """The URL of an executor service in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=serve, kwargs={"workers": workers, "on_ready": sender.send})
    process.start()
    sender.close()
    try:
        yield receiver.recv()
    finally:
        process.terminate()
        process.join()


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """A scenario's medians over the rounds."""

    runs_per_s: float
    cpu_ms: float
    """CPU time a run, in milliseconds."""
    rate_ratio: float
    """Its rate over the floor's of the same round."""
    cpu_ratio: float
    """The floor's CPU time a run over its own, of the same round."""


def scenarios(stack: ExitStack, workers: int, beside: str | None = None) -> dict[str, Scenario]:
    """All scenarios by name, the floor first; what they need is closed with ``stack``."""
    warm = stack.enter_context(Sandbox(workers=workers))
    fresh = stack.enter_context(Sandbox(workers=workers, fresh=True))
    url = stack.enter_context(service(workers))
    client = stack.enter_context(ExecutorClient(lambda: [url]))
    found = {
        FLOOR: floor(workers),
        FLOOR_ALONE: floor(1),
        FRESH_ALONE: pool(fresh, 1, clients=1),
        "fresh jail, 1 test": pool(fresh, 1),
        "fresh jail, 10 tests": pool(fresh, 10),
        "warm jail, 1 test": pool(warm, 1),
        "warm jail, 10 tests": pool(warm, 10),
        "warm jail, function test": pool(warm, 1, "function"),
        "warm jails, assert test": pool(warm, 1, "assert"),
        "warm jail, C++, 1 test": compiled(warm, 1),
        "warm jail, C++, 10 tests": compiled(warm, 10),
        f"HTTP /run_code, {CLIENTS} clients": run_code(url),
        f"HTTP /run_tests, {CLIENTS} clients": run_tests(url, 1),
        f"HTTP /run_tests, {CLIENTS} clients, 10 tests": run_tests(url, 10),
        "HTTP client, batches of 128 programs": batches(client, 1),
    }
    return found if beside is None else {**found, BESIDE: run_code(beside)}


def measure(workers: int, seconds: float, rounds: int = ROUNDS, beside: str | None = None) -> dict[str, Speed]:
    """Every scenario's speed, measured for about ``seconds`` each, spread over the rounds."""
    with ExitStack() as stack:
        found = scenarios(stack, workers, beside)
        rates: dict[str, list[float]] = {name: [] for name in found}
        costs: dict[str, list[float]] = {name: [] for name in found}
        with Steps("bench", rounds * len(found)) as steps:
            for _ in range(rounds):
                for name, scenario in found.items():
                    cpu_s, start = _cpu_s(), time.perf_counter()
                    rates[name].append(scenario(seconds / rounds))
                    runs = rates[name][-1] * (time.perf_counter() - start)
                    costs[name].append((_cpu_s() - cpu_s) / runs * 1000)
                    steps.advance()
    return {
        name: Speed(
            runs_per_s=statistics.median(rates[name]),
            cpu_ms=statistics.median(costs[name]),
            rate_ratio=_median_ratio(rates[name], rates[FLOOR]),
            cpu_ratio=_median_ratio(costs[FLOOR], costs[name]),
        )
        for name in rates
    }


def _median_ratio(values: list[float], bases: list[float]) -> float:
    return statistics.median(value / base for value, base in zip(values, bases, strict=True))


def _cpu_s() -> float:
    """CPU time of this process and all below it, those that have ended included."""
    ticks = 0
    for pid in descendants(os.getpid()):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended, and counts with its parent now
            continue
        ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """How far from the limit programs were ended, and how far reported memory is from what the program measured."""

    late_ms: tuple[float, ...]
    """Milliseconds past the wall limit, sorted."""
    memory_mb: float
    """Largest difference."""


def accuracy(sandbox: Sandbox, runs: int = 40, wall_s: float = 0.25) -> Accuracy:
    """Ends ``runs`` sleeping and ``runs`` spinning programs, and measures memory from nothing to 200 MiB."""
    limits = Limits(cpu_s=60.0, wall_s=wall_s, memory_mb=512)
    test = (StdinTest(stdin="", expected_stdout=""),)
    texts = ["import time; time.sleep(60)", "while True: pass"] * runs
    endless = [Execution(program=f"{text} # {n}", tests=test, limits=limits) for n, text in enumerate(texts)]
    ended = [verdict.tests[0] for verdict in sandbox.run_many(endless)]
    assert {result.status for result in ended} == {"time_limit"}
    own = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    sizes = [
        Execution(program=f"x = b'x' * ({mb} << 20); {own}", tests=test, limits=_LIMITS) for mb in range(0, 201, 20)
    ]
    measured = [verdict.tests[0] for verdict in sandbox.run_many(sizes)]
    return Accuracy(
        late_ms=tuple(sorted((result.wall_s - wall_s) * 1000 for result in ended)),
        memory_mb=max(abs(result.peak_memory_mb - float(result.stdout)) for result in measured),
    )


def bench(workers: int = 2, seconds: float = 10.0, beside: str | None = None) -> None:
    """Measure each row for about ``seconds`` and print a table. A ratio of 2 is twice as fast as bare Python.

    ``beside``: the URL of another server of SandboxFusion's protocol, measured with the same requests.
    """
    results = measure(workers, seconds, beside=beside)
    title = f"executor, {workers} workers, medians of {ROUNDS} rounds, load {os.getloadavg()[0]:.1f}"
    table = Table("scenario", "runs/s", "x floor", "CPU ms/run", "x floor", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, speed in results.items():
        rate, cost, cost_ratio = f"{speed.runs_per_s:.0f}", f"{speed.cpu_ms:.2f}", f"{speed.cpu_ratio:.2f}"
        if name == BESIDE:  # its processes are not ours to count
            cost = cost_ratio = "–"
        table.add_row(name, rate, f"{speed.rate_ratio:.2f}", cost, cost_ratio)
    Console().print(table)
    bare, ours = results[FLOOR_ALONE], results[FRESH_ALONE]
    time_ratio, cpu_ratio = bare.runs_per_s / ours.runs_per_s, ours.cpu_ms / bare.cpu_ms
    with Sandbox(workers=workers) as sandbox:
        found = accuracy(sandbox)
    late = found.late_ms
    print(f"one fresh single-test run takes {time_ratio:.2f} x the time and {cpu_ratio:.2f} x the CPU of a bare python")
    print(
        f"wall limit: ended {late[len(late) // 2]:.1f} ms after it (median), {late[-1]:.1f} ms (worst of {len(late)})"
    )
    print(f"peak memory: at most {found.memory_mb:.1f} MB from what the program measures itself")


def main() -> None:
    """The command's arguments."""
    parser = argparse.ArgumentParser(description="speed of the executor against bare Python")
    parser.add_argument("--seconds", type=float, default=10.0, help="seconds a row (default: 10)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--beside", metavar="URL", help="another server of SandboxFusion's routes, measured too")
    options = parser.parse_args()
    bench(options.workers, options.seconds, options.beside)


if __name__ == "__main__":
    main()
