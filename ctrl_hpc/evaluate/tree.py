"""Critique-revision turns: critique -> gate -> revise -> execute, each sample's state carried from turn to turn.

The records of turn K are ``turn_K.jsonl``, a :class:`Node` for each sample that was still being worked on; a sample
without one was judged correct before and keeps its program. Turns are written chunk by chunk, so that a killed
evaluation continues where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ctrl_hpc import jsonl
from ctrl_hpc.config import LimitsConfig
from ctrl_hpc.evaluate.parts import in_parts
from ctrl_hpc.flow.execution import execute
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.flow.revising import revise
from ctrl_hpc.protocols import Executor, Generator
from ctrl_hpc.records import Critique, Judgement, Problem, Sampling, Solution, Verdict

KEPT_BYTES = 2000
"""Bytes of a failed test's output that are kept in the records."""

Sample = tuple[Problem, Solution]
"""A problem and the state of its solution; the id of the solution stays that of the draft."""
Write = Callable[[Sequence[Sample], int], list[Critique]]
"""A critic at work: ``(samples, seed)`` -> one critique of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What one turn did to one sample."""

    sample: str
    """Id of the draft: ``PROBLEM/k``."""
    critique: str
    judgement: Judgement | None
    kept: bool
    """The critique judged the program correct, so that it was kept."""
    text: str
    """The generator's answer after this turn."""
    program: str | None
    verdict: Verdict
    critique_tokens: int = 0
    """Length of the critique; 0 when the endpoint does not tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """All that answers a critique: the fixed generator, the executor, and their settings."""

    generator: Generator
    executor: Executor
    prompts: Prompts
    limits: LimitsConfig
    revision: Sampling
    """How revisions are decoded."""
    stop_when_correct: bool = True
    """A program judged correct is kept and not critiqued again; else it is revised all the same."""


def grow(
    drafts: Sequence[Sample], write: Write, environment: Environment, folder: Path, *, turns: int, chunk: int, seed: int
) -> None:
    """Run the turns that are not recorded in ``folder`` yet."""
    samples = list(drafts)
    stopped: set[str] = set()
    for turn in range(1, turns + 1):
        file = folder / f"turn_{turn}.jsonl"
        active = [sample for sample in samples if sample[1].id not in stopped]

        def work(chunk: Sequence[Sample], number: int, turn: int = turn) -> list[Node]:
            return _turn(chunk, write, environment, derived_seed(seed, turn, number))

        nodes = in_parts(file, Node, active, chunk, work)
        samples, stopped = _carry(samples, nodes, stopped, environment.stop_when_correct)


def is_grown(folder: Path, turns: int) -> bool:
    """Whether all turns are recorded."""
    return all((folder / f"turn_{turn}.jsonl").exists() for turn in range(1, turns + 1))


def read(folder: Path, turns: int) -> list[dict[str, Node]]:
    """The nodes of turns 1..``turns``, by sample."""
    return [
        {node.sample: node for node in jsonl.read(Node, folder / f"turn_{turn}.jsonl")} for turn in range(1, turns + 1)
    ]


def derived_seed(seed: int, *parts: object) -> int:
    """A seed of its own for a named part of the evaluation, in [0, 2**31)."""
    text = " ".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little") >> 1


def _turn(samples: Sequence[Sample], write: Write, environment: Environment, seed: int) -> list[Node]:
    critiques = write(samples, seed)
    triples = [(*sample, critique) for sample, critique in zip(samples, critiques, strict=True)]
    revisions = revise(
        triples,
        environment.generator,
        environment.prompts,
        environment.revision,
        gate=environment.stop_when_correct,
    )
    pairs = [(problem, revision) for (problem, _), revision in zip(samples, revisions, strict=True)]
    executed = execute(pairs, environment.executor, environment.limits)
    nodes = []
    for (_, solution), critique, revision in zip(samples, critiques, executed, strict=True):
        assert revision.verdict is not None
        nodes.append(
            Node(
                sample=solution.id,
                critique=critique.text,
                judgement=critique.judgement,
                kept=revision.kept,
                text=revision.text,
                program=revision.program,
                verdict=trimmed(revision.verdict),
                critique_tokens=len(critique.generation.token_ids) if critique.generation else 0,
            )
        )
    return nodes


def trimmed(verdict: Verdict) -> Verdict:
    """The verdict with the output of failed tests cut to :data:`KEPT_BYTES`, and none of passed ones."""
    tests = []
    for test in verdict.tests:
        kept = 0 if test.status == "accepted" else KEPT_BYTES
        tests.append(replace(test, stdout=test.stdout[:kept], stderr=test.stderr[-kept:] if kept else b""))
    return replace(verdict, tests=tuple(tests))


def _carry(
    samples: Sequence[Sample], nodes: Sequence[Node], stopped: set[str], stop_when_correct: bool
) -> tuple[list[Sample], set[str]]:
    by_sample = {node.sample: node for node in nodes}
    out: list[Sample] = []
    done = set(stopped)
    for problem, solution in samples:
        node = by_sample.get(solution.id)
        if node is None:
            assert solution.id in stopped, f"no record of {solution.id}"
        else:
            solution = replace(solution, text=node.text, program=node.program, verdict=node.verdict)
            if stop_when_correct and node.judgement == "correct":
                done.add(solution.id)
        out.append((problem, solution))
    return out, done
