"""How long the trainer waits: a simulated run of many nodes, with service times recorded from a real run.

Every critique takes a slot of a critic's server for its own time, its revision one of a generator's, the program an
executor; the step's experience is there when the last one is. With ``max_staleness=0`` the trainer's update follows;
with 1 the next step's rollouts are made meanwhile, and the weights are published when both have ended, as in
``ctrl_hpc.train.source``.
"""

from __future__ import annotations

import heapq
import json
import platform
import random
import statistics
from collections.abc import Sequence
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Waits:
    """The trainer's time over a simulated run."""

    max_staleness: int
    step_s: float
    """Mean time of a step."""
    trainer_s: float
    """Of it, the trainer at work."""
    wait_s: tuple[float, ...]
    """Seconds that the trainer waited, step by step."""

    @property
    def fraction(self) -> float:
        """Of all time, waited."""
        return statistics.fmean(self.wait_s) / self.step_s


def record(run_dir: str | Path, note: str) -> dict[str, Any]:
    """A trace of a run that is done: for each RL step the times and the lengths, and the times of executions.

    Raises ValueError where the run has no RL records.
    """
    from transformers import AutoTokenizer

    from ctrl_hpc.config import load
    from ctrl_hpc.records import Solution

    folder = Path(run_dir)
    files = sorted((folder / "rl" / "rollouts").glob("step-*.jsonl"))
    if not files:
        raise ValueError(f"{folder}: no rollouts recorded there; a trace needs a run whose RL is done")
    config = load(folder / "config.yaml")
    tokenizer = AutoTokenizer.from_pretrained(config.generator)
    metrics = _lines(folder / "rl" / "metrics.jsonl")
    steps = []
    for file, row in zip(files, metrics, strict=True):
        rollouts = _lines(file)
        steps.append(
            {
                "rollout_s": row["time/rollout_s"],
                "revise_s": row["time/revise_s"],
                "publish_s": row["time/publish_s"],
                "trainer_s": sum(row.get(f"time/{phase}_s", 0.0) for phase in TRAINER),
                "critique_tokens": [len(item["token_ids"]) for item in rollouts],
                # a draft that was judged correct is kept without asking the generator
                "revision_tokens": [
                    0 if item["kept"] else len(tokenizer.encode(item["revision"], add_special_tokens=False)) + 1
                    for item in rollouts
                ],
            }
        )
    solutions = jsonl.read(Solution, folder / "sample" / "solutions.jsonl")
    walls = [sum(test.wall_s for test in item.verdict.tests) for item in solutions if item.verdict is not None]
    versions = json.loads((folder / "versions.json").read_text(encoding="utf-8"))
    provenance = {"run": config.name, "seed": config.seed, "machine": platform.platform(), "note": note}
    provenance |= {"git_commit": versions["git_commit"], "tensor": config.parallel.tensor}
    return {"provenance": provenance, "steps": steps, "execution_s": [round(wall, 5) for wall in walls]}


def load(file: str | Path = TRACE) -> dict[str, Any]:
    """A trace that ``record`` made. Raises ValueError when it is none."""
    try:
        trace = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: not a trace: {error}") from None
    if not {"provenance", "steps", "execution_s"} <= set(trace):
        raise ValueError(f"{file}: not a trace: it lacks provenance, steps or execution_s")
    return trace


def simulate(trace: dict[str, Any], layout: Layout, *, max_staleness: int, steps: int = 100, seed: int = 0) -> Waits:
    """The trainer's waits over a run of so many steps.

    Raises ValueError for a staleness other than 0 and 1.
    """
    if max_staleness not in (0, 1):
        raise ValueError(f"max_staleness: {max_staleness} is not allowed; allowed: 0, 1")
    chance = random.Random(seed)
    rollouts, works, publishes = [], [], []
    for _ in range(steps):
        recorded = chance.choice(trace["steps"])
        rollouts.append(_rollout_s(recorded, trace["execution_s"], layout, chance))
        n_recorded = len(recorded["critique_tokens"])
        n_here = layout.prompts_per_step * layout.group_size
        works.append(recorded["trainer_s"] * n_here / n_recorded / layout.trainer_groups)
        publishes.append(recorded["publish_s"])
    waits, total = [], 0.0
    for step in range(steps):
        # with staleness 1 these rollouts began with the update of the step before
        ahead = works[step - 1] if max_staleness and step else 0.0
        wait = max(0.0, rollouts[step] - ahead)
        total += wait + works[step] + publishes[step]
        waits.append(wait + publishes[step])
    return Waits(
        max_staleness=max_staleness,
        step_s=total / steps,
        trainer_s=statistics.fmean(works),
        wait_s=tuple(waits),
    )


def _rollout_s(recorded: dict[str, Any], execution_s: Sequence[float], layout: Layout, chance: random.Random) -> float:
    """Seconds until every critique of a step has its reward: three queues in a row."""
    # a padded batch decodes in lockstep: a token of each in the time of its longest divided by its length
    critique_token_s = recorded["rollout_s"] / max(recorded["critique_tokens"])
    revision_token_s = recorded["revise_s"] / max(1, *recorded["revision_tokens"])
    count = layout.prompts_per_step * layout.group_size
    rows = [chance.randrange(len(recorded["critique_tokens"])) for _ in range(count)]
    critics = _Pool(layout.critic_servers * layout.slots)
    generators = _Pool(layout.generator_servers * layout.slots)
    executors = _Pool(layout.executors)
    critiqued = sorted((critics.serve(0.0, recorded["critique_tokens"][row] * critique_token_s), row) for row in rows)
    revised = sorted(
        generators.serve(at, recorded["revision_tokens"][row] * revision_token_s)
        for at, row in critiqued
        if recorded["revision_tokens"][row]
    )
    executed = [executors.serve(at, chance.choice(execution_s)) for at in revised]
    return max([at for at, _ in critiqued] + executed)


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

    figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
    for result in results:
        label = f"max_staleness={result.max_staleness}: {100 * result.fraction:.1f} % of the time"
        axes.plot([1000 * wait for wait in result.wait_s], label=label, linewidth=1)
    axes.set(xlabel="step", ylabel="trainer waits [ms]", ylim=(0, None))
    axes.set_title(f"service times of {provenance['run']} at {str(provenance['git_commit'])[:9]}", fontsize=9)
    axes.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
