"""How a run's cost grows with its data: TACO-like problems at parts of TACO's size, phase by phase.

``python bench/scale.py [SHARE ...]`` (1: 18,820 problems with 100 tests each, 3.5 GB; default: 0.01 and 0.03). Each
phase runs in a process of its own, which tells its CPU seconds, its peak memory, and what it left on the disk. The
generator is a stand-in, and so is the executor: what it returns has the size and the form of what a service answers.

* ``data``: the data set is read, filtered, and written into a run's directory;
* ``start``: a later stage's start, which has its data;
* ``sample``: 4 drafts a problem, their verdicts, their records;
* ``trainer``: rank 0 of RL reads the drafts and draws a step's;
* ``step``: the requests of a step of 1024 programs as the client writes them, and the verdicts as it reads them;
* ``executor``: the same requests decoded, their tests fetched from the shared disk, keyed and looked up in the cache.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ctrl_hpc import jsonl, pipeline
from ctrl_hpc.config import ROOT, Config, load
from ctrl_hpc.flow.steps import execution
from ctrl_hpc.records import Chat, Execution, Generation, Sampling, StoredTests, TestResult, Verdict
from ctrl_hpc.records.verdicts import answered
from ctrl_hpc.sandbox.cache import VerdictCache
from ctrl_hpc.store.tests import TestStore, folder_of
from ctrl_hpc.train.drafts import DraftPool

PROBLEMS, TESTS, TEST_BYTES, DRAFTS, PROGRAMS = 18_820, 100, 1_860, 4, 1024
"""TACO's problems; tests of each; bytes of a test; drafts of a problem; programs of a step."""
POOL = 3_000_000
"""Random numbers that the tests are stretches of."""


def make(folder: Path, share: float) -> None:
    """A data set in TACO's own columns, a row a line."""
    rng = random.Random(0)
    text = " ".join(str(rng.randrange(100_000, 10**6)) for _ in range(POOL))
    with open(folder / "train.jsonl", "w", encoding="utf-8") as out:
        for number in range(round(PROBLEMS * share)):
            words = " ".join(rng.choices(["sum", "path", "tree", "grid", "query", "prime", "string", "cost"], k=200))
            cases = {"inputs": [_numbers(rng, text, TEST_BYTES - 300) for _ in range(TESTS)]}
            cases["outputs"] = [_numbers(rng, text, 300) for _ in range(TESTS)]
            row = {"question": f"Problem {number}: {words}", "solutions": json.dumps(["print(1)"])}
            out.write(json.dumps(row | {"input_output": json.dumps(cases), "difficulty": "HARD"}) + "\n")


def _numbers(rng: random.Random, text: str, size: int) -> str:
    """A stretch of the random numbers: no compressor of ours sees so far back that it finds one again."""
    at = 7 * rng.randrange(POOL - size // 7)
    return text[at : at + size // 7 * 7 - 1] + "\n"


class Generator:
    """Answers at once, another program each time."""

    def complete(self, chats: Sequence[Chat], sampling: Sampling) -> list[list[Generation]]:
        """A program of 30 lines in a fence."""
        lines = "\n".join(f"    total = total * {n} + value" for n in range(30))
        text = "```python\ndef f(value, total):\n{}\nprint(f({}, {}))\n```"
        return [[Generation(text=text.format(lines, i, j)) for j in range(sampling.n)] for i, _ in enumerate(chats)]


class Executor:
    """Every other program fails from the tenth test on; all tests print 300 bytes."""

    def run_many(self, executions: Sequence[Execution]) -> list[Verdict]:
        """Verdicts as a service answers them."""
        return [answered(item, _whole(number, len(item.tests))) for number, item in enumerate(executions)]


def _whole(number: int, total: int) -> Verdict:
    right = TestResult(status="accepted", stdout=b"1234567\n" * 38, exit_code=0, cpu_s=0.01, wall_s=0.02)
    wrong = TestResult(status="wrong_answer", stdout=b"1234567\n" * 38, exit_code=0, cpu_s=0.01, wall_s=0.02)
    tests = tuple(wrong if number % 2 and at >= 9 else right for at in range(total))
    return Verdict(status="wrong_answer" if number % 2 else "accepted", tests=tests)


class Connections:
    """What ``sample`` asks."""

    generator, executor, critic = Generator(), Executor(), None


def configured(folder: Path) -> Config:
    """A run on the data set."""
    settings = ["data.name=taco", f"data.path={folder / 'train.jsonl'}", f"data.n_train={PROBLEMS}"]
    settings += ["data.eval_names=[]", f"sample.n_samples={DRAFTS}", "data.verified_only=false"]
    return load(ROOT / "configs" / "tiny.yaml", [*settings, f"run_dir={folder / 'run'}"])


def data(folder: Path) -> dict[str, float]:
    """The driver, before the first stage."""
    run = pipeline.prepare(configured(folder), folder / "run", ["sample"])
    return {"problems": len(run.problems), **_on_disk(folder / "run" / "problems", folder_of(folder / "run"))}


def sample(folder: Path) -> dict[str, float]:
    """The driver in the stage."""
    run = pipeline.prepare(configured(folder), folder / "run", ["sample"])
    pipeline.sample(run, Connections())  # type: ignore[arg-type]
    return _on_disk(folder / "run" / "sample")


def trainer(folder: Path) -> dict[str, float]:
    """Rank 0, until it has drawn the first step's drafts."""
    pool = DraftPool.load(folder / "run", 0)
    return {"drafts": len(pool.pairs), "drawn": len(pool.draw(0, 128))}


def _step(folder: Path) -> list[Execution]:
    pool, rules = DraftPool.load(folder / "run", 0), configured(folder).executor
    pairs = random.Random(0).choices(pool.pairs, k=PROGRAMS)
    return [execution(problem, f"{draft.program}\n# {n}", rules) for n, (problem, draft) in enumerate(pairs)]


def step(folder: Path) -> dict[str, float]:
    """Rank 0's share of executing a step; ``whole_mb``: what requests and answers were with tests and outputs."""
    runs = _step(folder)
    began = time.process_time()
    bodies = [json.dumps(jsonl.encode(run), separators=(",", ":")) for run in runs]
    client_s = time.process_time() - began
    (folder / "bodies.json").write_text("[" + ",".join(bodies) + "]")
    answers = [json.dumps(jsonl.encode(verdict)) for verdict in Executor().run_many(runs)]
    began = time.process_time()
    for answer in answers:
        jsonl.decode(Verdict, json.loads(answer))
    client_s += time.process_time() - began
    sent, got = sum(map(len, bodies)) / 1e6, sum(map(len, answers)) / 1e6
    whole = sent + sum(len(run.tests.content() or b"") for run in runs if isinstance(run.tests, StoredTests)) / 1e6
    whole_answers = sum(len(jsonl.line(_whole(n, TESTS))) for n in range(PROGRAMS)) / 1e6
    return {"sent_mb": sent, "got_mb": got, "whole_sent_mb": whole, "whole_got_mb": whole_answers,
            "ms_a_program": 1e3 * client_s / PROGRAMS}  # fmt: skip


def executor(folder: Path) -> dict[str, float]:
    """An executor's work on the requests of a step beside running programs, the cache empty and then warm."""
    store, cache = (
        TestStore(folder / "node", folder_of(folder / "run")),
        VerdictCache(folder / "verdicts", jail="bench"),
    )
    began = time.process_time()
    runs = [jsonl.decode(Execution, item) for item in json.loads((folder / "bodies.json").read_bytes())]
    for number, run in enumerate(runs):
        key = cache.key(run)
        if cache.get(key) is None:
            here = replace(run, tests=store.load(run.tests.sha256))
            cache.put(key, answered(here, _whole(number, TESTS)))
    cold = time.process_time() - began
    began = time.process_time()
    assert all(cache.get(cache.key(run)) is not None for run in runs)
    warm = time.process_time() - began
    store.close()
    return {"cold_ms": 1e3 * cold / len(runs), "hit_ms": 1e3 * warm / len(runs), **_on_disk(folder / "verdicts")}


def _on_disk(*folders: Path) -> dict[str, float]:
    files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
    return {"disk_mb": sum(file.stat().st_size for file in files) / 1e6, "files": len(files)}


PHASES: dict[str, Callable[[Path], dict[str, float]]] = {
    "data": data,
    "start": data,
    "sample": sample,
    "trainer": trainer,
    "step": step,
    "executor": executor,
}
"""In order: each needs what those before it left."""


def measured(phase: str, folder: Path) -> dict[str, Any]:
    """A phase in a process of its own."""
    command = [sys.executable, __file__, "--phase", phase, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{phase}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shares", type=float, nargs="*", default=[0.01, 0.03])
    parser.add_argument("--folder", type=Path, default=None, help="where to work (default: a temporary folder)")
    parser.add_argument("--phase", nargs=2, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.phase:
        started, cpu = time.perf_counter(), time.process_time()
        found = PHASES[options.phase[0]](Path(options.phase[1]))
        cost = {"wall_s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}
        print(json.dumps(cost | {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024} | found))
        return
    rows: dict[str, list[dict[str, Any]]] = {phase: [] for phase in PHASES}
    for share in sorted(options.shares):
        with tempfile.TemporaryDirectory(dir=options.folder) as place:
            make(Path(place), share)
            size = (Path(place) / "train.jsonl").stat().st_size / 1e6
            print(f"share {share:g}: {round(PROBLEMS * share)} problems, {size:.0f} MB", flush=True)
            for phase in PHASES:
                row = measured(phase, Path(place))
                rows[phase].append(row | {"share": share})
                print(f"  {phase:9s}" + "  ".join(f"{name} {value:.4g}" for name, value in row.items()), flush=True)
    for phase, found in rows.items():
        if len(found) > 1:
            first, last = found[0], found[-1]
            ratio = math.log(last["share"] / first["share"])
            powers = {name: math.log(last[name] / first[name]) / ratio for name in ("cpu_s", "peak_mb") if first[name]}
            print(f"{phase:9s}grows as share^" + ", ".join(f"{power:.2f} ({name})" for name, power in powers.items()))


if __name__ == "__main__":
    main()
