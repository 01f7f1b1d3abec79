"""Critique-revision trees: critique -> gate -> revise -> execute, each sample's state carried from turn to turn.

A turn of width W gives every sample W critiques, and so W samples to the next turn; width 1 everywhere is a chain of
turns. The records of turn K are ``turn_K.jsonl``, a :class:`Node` for each critique; a sample without one was judged
correct before and keeps its program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ctrl_hpc import jsonl
from ctrl_hpc.evaluate.write_ahead import WriteAheadLog, in_parts
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.flow.steps import execute, revise
from ctrl_hpc.records import (
    Critique,
    Executor,
    Generator,
    Judgement,
    Problem,
    Revision,
    Rules,
    Sampling,
    Solution,
    Verdict,
)
from ctrl_hpc.seeds import evaluation_seed

Sample = tuple[Problem, Solution]
"""A problem and the state of its solution; its id is that of the node."""
Write = Callable[[Sequence[Sample], int, int], list[Critique]]
"""A critic at work: ``(samples, width, seed)`` -> ``width`` critiques of each sample, flat and in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What one turn did to one sample."""

    sample: str
    """Id of what came of it: the parent's in a turn of width 1, else ``PARENT.j``."""
    parent: str
    """Id of the sample that was critiqued; in the first turn the draft's, ``PROBLEM/k``."""
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
    rules: Rules
    revision: Sampling
    """How revisions are decoded."""
    stop_when_correct: bool = True
    """A program judged correct is kept and not critiqued again; else it is revised all the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The shape of a tree and how its work is divided."""

    widths: tuple[int, ...]
    """Critiques of each sample in each turn."""
    chunk: int
    """Samples of a part, which are asked for together."""
    at_once: int
    """Parts at a time."""
    seed: int


def grow(
    drafts: Sequence[Sample],
    write: Write,
    environment: Environment,
    folder: Path,
    shape: Shape,
    tell: Callable[[int, int, int], None] | None = None,
) -> None:
    """Run the turns that are not recorded in ``folder`` yet, each from where it was left.

    ``tell`` hears of the turn, and how many of its samples are done.
    """
    samples = list(drafts)
    stopped: set[str] = set()
    for turn, width in enumerate(shape.widths, start=1):
        active = [sample for sample in samples if sample[1].id not in stopped]

        def work(
            part: Sequence[Sample], number: int, log: WriteAheadLog, turn: int = turn, width: int = width
        ) -> list[Node]:
            seed = evaluation_seed(shape.seed, turn, number)
            return _turn(part, number, log, environment, width, lambda: write(part, width, seed))

        def told(done: int, total: int, turn: int = turn) -> None:
            if tell is not None:
                tell(turn, done, total)

        file = folder / f"turn_{turn}.jsonl"
        nodes = in_parts(file, Node, active, work, size=shape.chunk, at_once=shape.at_once, tell=told)
        samples, stopped = _carry(samples, nodes, stopped, environment.stop_when_correct)


def is_grown(folder: Path, turns: int) -> bool:
    """Whether all turns are recorded."""
    return all((folder / f"turn_{turn}.jsonl").exists() for turn in range(1, turns + 1))


def read(folder: Path, turns: int) -> list[dict[str, Node]]:
    """The nodes of turns 1..``turns``, by sample."""
    return [
        {node.sample: node for node in jsonl.read(Node, folder / f"turn_{turn}.jsonl")} for turn in range(1, turns + 1)
    ]


def paths(draft: str, turns: Sequence[dict[str, list[Node]]], widths: Sequence[int]) -> list[tuple[Node, ...]]:
    """The paths from a draft to the leaves of its tree; ``turns`` hold each turn's nodes by parent.

    A path that stops early stands for all the leaves that it would have had, so that every leaf weighs the same and
    every draft has the product of ``widths`` of them.
    """
    found: list[tuple[tuple[Node, ...], str]] = [((), draft)]
    for by_parent, width in zip(turns, widths, strict=True):
        grown: list[tuple[tuple[Node, ...], str]] = []
        for path, sample in found:
            children = by_parent.get(sample, []) if sample else []
            grown += [((*path, node), node.sample) for node in children] or [(path, "")] * width
        found = grown
    return [path for path, _ in found]


def _turn(
    samples: Sequence[Sample],
    number: int,
    log: WriteAheadLog,
    environment: Environment,
    width: int,
    write: Callable[[], list[Critique]],
) -> list[Node]:
    critiques = log.once("critiques", number, Critique, lambda: list(map(_slim, write())))
    repeated = [sample for sample in samples for _ in range(width)]
    triples = [(*sample, critique) for sample, critique in zip(repeated, critiques, strict=True)]

    def revised() -> list[Revision]:
        gate = environment.stop_when_correct
        return revise(triples, environment.generator, environment.prompts, environment.revision, gate=gate)

    revisions = log.once("revisions", number, Revision, revised)
    pairs = [(problem, revision) for (problem, _), revision in zip(repeated, revisions, strict=True)]

    def executed() -> list[Verdict]:
        records = execute(pairs, environment.executor, environment.rules)
        return [record.verdict for record in records if record.verdict is not None]

    verdicts = log.once("verdicts", number, Verdict, executed)
    nodes = []
    for index, (_, solution, critique) in enumerate(triples):
        revision, verdict = revisions[index], verdicts[index]
        nodes.append(
            Node(
                sample=solution.id if width == 1 else f"{solution.id}.{index % width}",
                parent=solution.id,
                critique=critique.text,
                judgement=critique.judgement,
                kept=revision.kept,
                text=revision.text,
                program=revision.program,
                verdict=verdict,
                critique_tokens=len(critique.generation.token_ids) if critique.generation else 0,
            )
        )
    return nodes


def _slim(critique: Critique) -> Critique:
    """The critique without what only training needs."""
    if critique.generation is None:
        return critique
    return replace(critique, generation=replace(critique.generation, text="", prompt_ids=(), logprobs=()))


def _carry(
    samples: Sequence[Sample], nodes: Sequence[Node], stopped: set[str], stop_when_correct: bool
) -> tuple[list[Sample], set[str]]:
    by_parent = children_of(nodes)
    out: list[Sample] = []
    done = set(stopped)
    for problem, solution in samples:
        children = by_parent.get(solution.id, [])
        assert children or solution.id in stopped, f"no record of {solution.id}"
        for node in children:
            out.append(
                (problem, replace(solution, id=node.sample, text=node.text, program=node.program, verdict=node.verdict))
            )
            if stop_when_correct and node.judgement == "correct":
                done.add(node.sample)
        if not children:
            out.append((problem, solution))
    return out, done


def children_of(nodes: Iterable[Node]) -> dict[str, list[Node]]:
    """The nodes by their parent."""
    out: dict[str, list[Node]] = {}
    for node in nodes:
        out.setdefault(node.parent, []).append(node)
    return out
