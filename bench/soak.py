"""A long run of the executor with one program in five misbehaving; nothing may be wrong, left over, or growing.

``python bench/soak.py``. Every verdict is checked against the one known for its program; at
the end the processes, descriptors, threads, mounts, cgroups and files of the machine are compared with those before.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import threading
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from ctrl_hpc.progress import Steps
from ctrl_hpc.records import AssertTest, Execution, FunctionTest, Limits, StdinTest
from ctrl_hpc.sandbox import memory
from ctrl_hpc.sandbox.memory import descendants
from ctrl_hpc.sandbox.sandbox import Sandbox

LIMITS = Limits(cpu_s=1.0, wall_s=20.0, memory_mb=128, output_bytes=1 << 16, processes=8)
_BATCH = 256
_GROWTH_MB = 16.0
"""Resident memory may grow by this after the first batches: allocators, not leaks."""

_DAEMON = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    while True: time.sleep(0.01)\n"
MISBEHAVING: dict[str, tuple[str, str]] = {
    "daemon": (_DAEMON + "print(int(input()) * 2)", "accepted"),
    "swarm": ("import os, time\nfor _ in range(5):\n    if os.fork() == 0: time.sleep(99)\n1 / 0", "runtime_error"),
    "files": ("for n in range(20): open(f'/tmp/{n}', 'w').write('x' * 9999)\nprint(int(input()) * 2)", "accepted"),
    "folders": ("import os\nos.makedirs('/tmp/a/b/c')\nprint(int(input()) * 2)", "accepted"),
    "flood": ("while True: print('x' * 99999)", "output_limit"),
    "memory": ("x = [0] * (1 << 33)", "memory_limit"),
    "killer": ("import os\nos.kill(-1, 9) if os.fork() == 0 else os.wait()\nprint(int(input()) * 2)", "runtime_error"),
    "signals": ("import os\nfor n in range(1, 31): os.kill(1, n)\nprint(int(input()) * 2)", "accepted"),
    "crash": ("import os\nos.abort()", "runtime_error"),
    "exit": ("import os\nos._exit(0)", "wrong_answer"),
    "closes": ("import os\nos.closerange(0, 64)\nos._exit(3)", "runtime_error"),
}
"""What misbehaving programs do, and the verdict that each earns."""
_HEADERS = "".join(f"#include <{name}>\n" for name in ("csignal", "cstdio", "cstdlib", "cstring", "unistd.h"))
_DOUBLE = 'long n; scanf("%ld", &n); printf("%ld", 2 * n);'
CPP: dict[str, tuple[str, str]] = {
    "cpp": (_DOUBLE, "accepted"),
    "cpp wrong": (_DOUBLE.replace("2 * n", "2 * n + 1"), "wrong_answer"),
}
CPP_MISBEHAVING: dict[str, tuple[str, str]] = {
    "cpp daemon": ("if (fork() == 0) { setsid(); for (;;) usleep(10000); } " + _DOUBLE, "accepted"),
    "cpp memory": ("for (;;) memset(malloc(1 << 20), 1, 1 << 20);", "memory_limit"),
    "cpp flood": ('for (;;) puts("xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx");', "output_limit"),
    "cpp killer": ("if (fork() == 0) kill(-1, SIGKILL); pause();", "runtime_error"),
    "cpp crash": ("raise(SIGSEGV);", "runtime_error"),
    "cpp scratch": ('for (int i = 0; i < 9; i++) mkdtemp(strdup("dXXXXXX")); ' + _DOUBLE, "accepted"),
    "cpp broken": ("return x;", "compile_error"),
}
"""The same of programs in C++: the body of each main."""


@dataclass(slots=True)
class Report:
    """What a soak found."""

    runs: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    """Verdicts that were not the known ones, by "name: got"."""
    left: dict[str, set[str]] = field(default_factory=dict)
    """What is there after the sandbox has closed that was not there before, by kind."""
    growth_mb: float = 0.0
    """Growth of this process's resident memory between the second batch and the last."""

    @property
    def clean(self) -> bool:
        """Whether nothing was wrong, left, or growing."""
        return not self.wrong and not any(self.left.values()) and self.growth_mb <= _GROWTH_MB


def executions(runs: int, seed: int) -> list[tuple[str, str, Execution]]:
    """``runs`` programs of one test each: name, known status, execution. One in five misbehaves, one in ten is C++."""
    draw = random.Random(seed)
    out = []
    for number in range(runs):
        value = draw.randrange(10**6)
        stdin = StdinTest(stdin=f"{value}\n", expected_stdout=f"{2 * value}\n")
        hostile = number % 5 == 4
        if draw.random() < 0.1:
            found = CPP_MISBEHAVING if hostile else CPP
            name = draw.choice(list(found))
            body, status = found[name]
            text = f"{_HEADERS}int main() {{ {body} }}"
            out.append((name, status, Execution(program=text, tests=(stdin,), limits=LIMITS, language="cpp")))
            continue
        if hostile:
            name = draw.choice(list(MISBEHAVING))
            program, status = MISBEHAVING[name]
            test: StdinTest | AssertTest | FunctionTest = stdin
        else:
            name, program, status, test = _well_behaved(draw, value, stdin)
        out.append((name, status, Execution(program=f"{program}\n# {number}", tests=(test,), limits=LIMITS)))
    return out


def _well_behaved(
    draw: random.Random, value: int, stdin: StdinTest
) -> tuple[str, str, str, StdinTest | AssertTest | FunctionTest]:
    right = draw.random() < 0.5
    status = "accepted" if right else "wrong_answer"
    factor = 2 if right else 3
    value += 1  # so that three times it is never twice it
    kind = draw.random()
    if kind < 0.8:
        return "stdin", f"print((int(input()) + {0 if right else 1}) * 2)", status, stdin
    if kind < 0.9:
        test = FunctionTest(name="f", args=(value,), expected=2 * value)
        return "function", f"def f(x): return x * {factor}", status, test
    return "assert", f"def f(x): return x * {factor}", status, AssertTest(code=f"assert f({value}) == {2 * value}")


def soak(runs: int, workers: int = 2, seed: int = 0) -> Report:
    """Run them and look what was wrong or left."""
    report = Report()
    before = _surroundings()
    started_mb = 0.0
    with Sandbox(workers=workers) as sandbox, Steps("soak", runs) as steps:
        for start in range(0, runs, _BATCH):
            batch = executions(min(_BATCH, runs - start), seed + start)
            verdicts = sandbox.run_many([execution for _, _, execution in batch])
            for (name, status, _), verdict in zip(batch, verdicts, strict=True):
                if verdict.status != status:
                    report.wrong[f"{name}: {verdict.status} {verdict.detail[:200]}"] += 1
            report.runs += len(batch)
            steps.advance(len(batch))
            if start == _BATCH:
                started_mb = _resident_mb()
    report.growth_mb = _resident_mb() - started_mb if started_mb else 0.0
    after = _surroundings()
    report.left = {kind: after[kind] - before[kind] for kind in after}
    return report


def _surroundings() -> dict[str, set[str]]:
    """What could be left behind: this process's own, and what jails make on the machine."""
    own = Path("/proc/self")
    hierarchy = memory.find()
    groups = {str(path) for path in hierarchy.folder.glob(f"{memory.PREFIX}{os.getpid()}-*")} if hierarchy else set()
    return {
        "processes": _children(),
        "descriptors": {f"{fd}" for fd in os.listdir(own / "fd")[:-1]},
        "threads": {thread.name for thread in threading.enumerate() if thread.name.startswith("sandbox")},
        "mounts": set((own / "mountinfo").read_text().splitlines()),
        "cgroups": groups,
        "files": {path.name for path in Path(tempfile.gettempdir()).glob(f"ctrl-hpc-{os.getuid()}/.jail-*")},
    }


def _children() -> set[str]:
    return {str(pid) for pid in descendants(os.getpid())}


def _resident_mb() -> float:
    with open("/proc/self/statm", encoding="ascii") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Soak and print what was found; exit status 1 where it was not clean."""
    parser = argparse.ArgumentParser(description="many runs of the executor, one in seven misbehaving")
    parser.add_argument("--runs", type=int, default=100_000, help="runs (default: 100000)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    report = soak(options.runs, options.workers, options.seed)
    print(f"{report.runs} runs, {sum(report.wrong.values())} wrong, memory grew by {report.growth_mb:.1f} MB")
    for what, count in report.wrong.most_common(20):
        print(f"wrong, {count} times: {what}")
    for kind, left in report.left.items():
        if left:
            print(f"left: {kind}: {', '.join(sorted(left)[:10])}")
    print("clean" if report.clean else "NOT clean")
    raise SystemExit(0 if report.clean else 1)


if __name__ == "__main__":
    main()
