"""How long the trainer waits: a simulated run of many nodes, with service times recorded from a real run.

Within a step, as ``ctrl_hpc.train.collect.roll_out`` does it: a chunk of drafts is critiqued, then revised, then
executed, each when all of the chunk before it is done; so many chunks are on their way at a time. A critique takes a
slot of a critic's server for its own time, its revision one of a generator's, a program that was not run yet an
executor.

From step to step, as ``ctrl_hpc.train.ahead``: with ``max_staleness=K`` the rollouts of step s begin when those of
step s - 1 are made and version s - K is published; the trainer publishes without waiting for anything.
"""

from __future__ import annotations

import argparse
import bisect
import gzip
import heapq
import json
import platform
import random
import statistics
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctrl_hpc import jsonl

TRACE = Path(__file__).parent / "traces" / "tiny_ci.json"
"""Recorded with ``record``; its ``provenance`` says from what."""
TRAINER = ("advantages", "logprobs", "reference", "update")
"""Phases of a step in which the trainer works."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The simulated machines; the default are eight nodes of eight GPUs, with the executors on CPU nodes beside."""

    trainer_groups: int = 8
    """Data-parallel groups of the trainer (two nodes, tensor-parallel by two)."""
    critic_servers: int = 24
    generator_servers: int = 24
    slots: int = 256
    """Requests that a server decodes at once; the recorded server had as many."""
    executors: int = 512
    prompts_per_step: int = 768
    group_size: int = 8
    chunk: int = 0
    """Drafts of a chunk; 0: all of a step's (``rl.chunk``)."""
    chunks_in_flight: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Waits:
    """The trainer's time over a simulated run."""

    max_staleness: int
    step_s: float
    """Mean time of a step."""
    trainer_s: float
    """Of it, the trainer at work."""
    publish_s: float
    """Of it, the weights being written."""
    rollouts_s: float
    """Mean time that the rollouts of a step take, loading the weights included; beside the trainer's where they may."""
    wait_s: tuple[float, ...]
    """Seconds that the trainer waited for rollouts, step by step."""
    versions: tuple[int, ...]
    """Of the weights that made the rollouts of each step."""

    @property
    def fraction(self) -> float:
        """Of all time, waited."""
        return statistics.fmean(self.wait_s) / self.step_s

    @property
    def staleness(self) -> float:
        """Mean age of the rollouts, in versions."""
        return statistics.fmean(step - version for step, version in enumerate(self.versions))


def record(run_dir: str | Path, note: str) -> dict[str, Any]:
    """A trace of a run that is done: for each RL step the times and the lengths, and the times of executions.

    Raises ValueError where the run has no RL records.
    """
    from transformers import AutoTokenizer

    from ctrl_hpc.config import load
    from ctrl_hpc.records import Solution

    folder = Path(run_dir)
    files = sorted((folder / "rl" / "rollouts").glob("step-*.jsonl.gz"))
    if not files:
        raise ValueError(f"{folder}: no rollouts recorded there; a trace needs a run whose RL is done")
    config = load(folder / "config.yaml")
    tokenizer = AutoTokenizer.from_pretrained(config.generator)
    metrics = _lines(folder / "rl" / "metrics.jsonl")
    steps = []
    for file, row in zip(files, metrics, strict=True):
        rollouts = _lines(file)
        # a draft that was judged correct is kept without asking the generator; the same is asked, and run, once
        asked = _first_of(None if item["kept"] else (item["solution_id"], item["critique"]) for item in rollouts)
        run = _first_of(None if item["kept"] else (item["solution_id"], item["revision"]) for item in rollouts)
        steps.append(
            {name: row[f"time/{name}"] for name in ("load_s", "rollout_s", "revise_s", "publish_s")}
            | {
                "trainer_s": sum(row.get(f"time/{phase}_s", 0.0) for phase in TRAINER),
                "critique_tokens": [len(item["token_ids"]) for item in rollouts],
                "revision_tokens": [
                    len(tokenizer.encode(item["revision"], add_special_tokens=False)) + 1 if first else 0
                    for item, first in zip(rollouts, asked, strict=True)
                ],
                "runs": [int(first) for first in run],
            }
        )
    solutions = jsonl.read(Solution, folder / "sample" / "solutions.jsonl")
    walls = [item.verdict.wall_s for item in solutions if item.verdict is not None]
    versions = json.loads((folder / "versions.json").read_text(encoding="utf-8"))
    provenance = {"run": config.name, "seed": config.seed, "machine": platform.platform(), "note": note}
    provenance |= {"git_commit": versions["git_commit"], "tensor": config.parallel.tensor}
    return {
        "provenance": provenance,
        "group_size": config.rl.group_size,
        "steps": steps,
        "execution_s": [round(wall, 5) for wall in walls],
    }


def load(file: str | Path = TRACE) -> dict[str, Any]:
    """A trace that ``record`` made. Raises ValueError when it is none."""
    try:
        trace = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: not a trace: {error}") from None
    missing = [key for key in ("provenance", "group_size", "steps", "execution_s") if key not in trace]
    if missing:
        raise ValueError(f"{file}: not a trace: it lacks {', '.join(missing)}")
    return trace


def simulate(trace: dict[str, Any], layout: Layout, *, max_staleness: int, steps: int = 100, seed: int = 0) -> Waits:
    """The trainer's waits over a run of so many steps; the same steps for every staleness.

    Raises ValueError for a negative staleness.
    """
    if max_staleness < 0:
        raise ValueError(f"max_staleness: {max_staleness} is not allowed; it must be >= 0")
    chance = random.Random(seed)
    published, versions, waits = [0.0], [0], []
    works_s = publishes_s = rollouts_s = made = 0.0
    for step in range(steps):
        recorded = chance.choice(trace["steps"])
        if step:
            seen = bisect.bisect_right(published, made) - 1
            versions.append(max(seen, step - max_staleness))
        load_s = 0.0 if step and versions[-1] == versions[-2] else recorded["load_s"]
        took_s = load_s + _rollout_s(recorded, trace, layout, chance)
        made = max(made, published[max(0, step - max_staleness)]) + took_s
        n_here, n_recorded = layout.prompts_per_step * layout.group_size, len(recorded["critique_tokens"])
        work_s = recorded["trainer_s"] * n_here / n_recorded / layout.trainer_groups
        waits.append(max(0.0, made - published[-1]))
        published.append(max(made, published[-1]) + work_s + recorded["publish_s"])
        rollouts_s, works_s, publishes_s = rollouts_s + took_s, works_s + work_s, publishes_s + recorded["publish_s"]
    return Waits(
        max_staleness=max_staleness,
        step_s=published[-1] / steps,
        trainer_s=works_s / steps,
        publish_s=publishes_s / steps,
        rollouts_s=rollouts_s / steps,
        wait_s=tuple(waits),
        versions=tuple(versions),
    )


def _rollout_s(recorded: dict[str, Any], trace: dict[str, Any], layout: Layout, chance: random.Random) -> float:
    """Seconds until every critique of a step has its reward."""
    # a padded batch decodes in lockstep: a token of each in the time of its longest divided by its length
    critique_token_s = recorded["rollout_s"] / max(recorded["critique_tokens"])
    revision_token_s = recorded["revise_s"] / max(1, *recorded["revision_tokens"])
    size = trace["group_size"]
    drafts = [chance.randrange(len(recorded["runs"]) // size) * size for _ in range(layout.prompts_per_step)]
    rows = [[first + j % size for j in range(layout.group_size)] for first in drafts]
    together = layout.chunk or len(rows)
    chunks = deque([row for draft in rows[at : at + together] for row in draft] for at in range(0, len(rows), together))
    pools = [
        _Pool(servers)
        for servers in (
            layout.critic_servers * layout.slots,
            layout.generator_servers * layout.slots,
            layout.executors,
        )
    ]

    def services_s(stage: int, chunk: list[int]) -> list[float]:
        if stage == 0:
            return [recorded["critique_tokens"][row] * critique_token_s for row in chunk]
        if stage == 1:
            asked = [recorded["revision_tokens"][row] for row in chunk]
            return [tokens * revision_token_s for tokens in asked if tokens]
        return [chance.choice(trace["execution_s"]) for row in chunk if recorded["runs"][row]]

    first = [chunks.popleft() for _ in range(min(len(chunks), layout.chunks_in_flight if layout.chunk else 1))]
    arrivals = [(0.0, number, 0, chunk) for number, chunk in enumerate(first)]
    begun, at = len(first), 0.0
    while arrivals:
        at, number, stage, chunk = heapq.heappop(arrivals)
        if stage < len(pools):
            done = max([at, *(pools[stage].serve(at, service_s) for service_s in services_s(stage, chunk))])
            heapq.heappush(arrivals, (done, number, stage + 1, chunk))
        elif chunks:
            heapq.heappush(arrivals, (at, begun, 0, chunks.popleft()))
            begun += 1
    return at


class _Pool:
    """Servers that take jobs in the order they come."""

    def __init__(self, size: int) -> None:
        self._free = [0.0] * size

    def serve(self, arrived: float, service_s: float) -> float:
        """When a job that arrives then is done."""
        done = max(arrived, heapq.heappop(self._free)) + service_s
        heapq.heappush(self._free, done)
        return done


def plot(results: Sequence[Waits], file: Path, provenance: dict[str, Any]) -> None:
    """The waits of each step, and the share of time they are."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for result in results:
        label = f"max_staleness={result.max_staleness}: {100 * result.fraction:.1f} % of the time"
        axes.plot([1000 * wait for wait in result.wait_s], label=label, linewidth=1)
    axes.set(xlabel="step", ylabel="trainer waits for rollouts [ms]", ylim=(0, None))
    axes.set_title(f"service times of {provenance['run']} at {str(provenance['git_commit'])[:9]}", fontsize=9)
    figure.legend(loc="outside lower center", frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _first_of(keys: Iterable[tuple[str, str] | None]) -> list[bool]:
    """Of each whether it is the first of its kind; None never is."""
    known: set[tuple[str, str] | None] = {None}
    out = []
    for key in keys:
        out.append(key not in known)
        known.add(key)
    return out


def _lines(file: Path) -> list[dict[str, Any]]:
    content = file.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(content) if file.suffix == ".gz" else content).splitlines()]


def main() -> None:
    """Simulate, print and plot; with ``--record`` from the service times of a run of one's own."""
    parser = argparse.ArgumentParser(description="how long the trainer of a simulated 8-node run waits for rollouts")
    parser.add_argument("--trace", type=Path, default=None, help="recorded service times (default: the shipped ones)")
    parser.add_argument("--record", type=Path, default=None, metavar="RUN", help="write --trace from this run first")
    parser.add_argument("--note", default="", help="with --record: under which load the run was made, say")
    parser.add_argument("--steps", type=int, default=100, help="steps simulated (default: 100)")
    parser.add_argument("--max-staleness", type=int, nargs="+", default=[0, 1, 2], metavar="K", help="(default: 0 1 2)")
    parser.add_argument("--executors", type=int, default=512, help="programs that run at once (default: 512)")
    parser.add_argument("--servers", type=int, default=24, help="of the critic, and as many of the generator (24)")
    parser.add_argument("--chunk", type=int, default=0, help="drafts of a chunk, as rl.chunk (default: 0, a step's)")
    parser.add_argument("--chunks-in-flight", type=int, default=8, help="as rl.chunks_in_flight (default: 8)")
    parser.add_argument("--out", type=Path, default=Path("overlap.png"), help="the plot (default: overlap.png)")
    options = parser.parse_args()
    if options.record is not None:
        if options.trace is None:
            parser.error("--record: --trace names the file to write")
        options.trace.write_text(json.dumps(record(options.record, options.note), separators=(",", ":")))
    trace = load(options.trace or TRACE)
    layout = Layout(
        executors=options.executors,
        critic_servers=options.servers,
        generator_servers=options.servers,
        chunk=options.chunk,
        chunks_in_flight=options.chunks_in_flight,
    )
    stales = dict.fromkeys(options.max_staleness)
    results = [simulate(trace, layout, max_staleness=stale, steps=options.steps) for stale in stales]
    print(f"service times of {trace['provenance']}; {layout}")
    for result in results:
        work = f"the trainer works {result.trainer_s:.3f} s, writes weights {result.publish_s:.3f} s"
        waits = f"waits for rollouts {100 * result.fraction:.1f} % of the time"
        rollouts = f"rollouts take {result.rollouts_s:.3f} s and are {result.staleness:.2f} versions old"
        print(f"max_staleness={result.max_staleness}: a step takes {result.step_s:.3f} s; {work}, {waits}; {rollouts}")
    plot(results, options.out, trace["provenance"])
    print(options.out)


if __name__ == "__main__":
    main()
