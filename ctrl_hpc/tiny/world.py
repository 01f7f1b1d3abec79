"""The tiny world: thousands of procedurally generated programming problems with solutions and stdin/stdout tests.

A problem is one operation from each of four slots (:mod:`ctrl_hpc.tiny.grammar`). Compositions that print the same
for a block of the pool of inputs mean the same, or nearly; they are one group, and a group lies in one split whole.
Compositions in which confusing one step with its partner changes nothing are left out, so that every mistake matters,
and each problem's tests are chosen so that every such mistake fails one of them.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ctrl_hpc.records import Problem, Split, StdinTest
from ctrl_hpc.tiny import grammar, text
from ctrl_hpc.tiny.grammar import Composition, Line

SOURCE = "tiny"
_POOL_LINES = 120
"""Lines on which compositions are compared, and from which tests are made."""
_BLOCKS = 5
"""Compositions that agree on a whole block of the pool are of one group, and so are those linked through others."""
_TEST_LINES = (2, 4, 6)
"""Lines of each of a problem's tests."""
_SHARES: dict[Split, float] = {"train": 0.8, "dev": 0.08, "test": 0.12}
"""Share of the groups of equal meaning that each split gets."""
CPU_S = 2.0
_MEMORY_MB = 256
_CHOICES = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """What the generation kept and left out."""

    compositions: int
    """All compositions of the grammar."""
    indistinct: int
    """Left out: a step confused with its partner would change no answer."""
    groups: int
    """Groups of equal meaning among those kept."""
    problems: dict[Split, int]
    """Problems a split."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyWorld:
    """All problems, and the composition behind each."""

    splits: dict[Split, list[Problem]]
    compositions: dict[str, Composition]
    """By problem id."""
    counts: Counts


def load() -> dict[Split, list[Problem]]:
    """The problems of each split of world 0, which the shipped models know: shuffled, and the same for every run."""
    return world().splits


@lru_cache(maxsize=2)
def world(seed: int = 0) -> TinyWorld:
    """Generate the whole world: about a second. ``seed`` draws the inputs, the splits and the order."""
    rng = np.random.default_rng([seed, 0x71])
    lines = input_lines(rng, _POOL_LINES)
    answers_FMTEL = grammar.answers(lines)
    differs_FMTEKL = _shown_confusions(answers_FMTEL)
    distinct_FMTE = differs_FMTEKL.any(axis=-1).all(axis=-1)
    kept = [(f, m, t, e) for f, m, t, e in itertools.product(*map(range, grammar.SIZES)) if distinct_FMTE[f, m, t, e]]
    groups = _groups(kept, answers_FMTEL)
    splits: dict[Split, list[tuple[bytes, Problem]]] = {split: [] for split in _SHARES}
    compositions: dict[str, Composition] = {}
    for composition in kept:
        split = _split(_digest(seed, b"split", repr(groups[composition])))
        cases = [
            (lines[i], int(answers_FMTEL[composition][i])) for i in _choose_lines(differs_FMTEKL[composition], rng)
        ]
        problem = _problem(composition, split, cases)
        compositions[problem.id] = composition
        splits[split].append((_digest(seed, b"order", problem.id), problem))
    ordered = {split: [problem for _, problem in sorted(pairs, key=lambda p: p[0])] for split, pairs in splits.items()}
    counts = Counts(
        compositions=int(np.prod(grammar.SIZES)),
        indistinct=int(np.prod(grammar.SIZES)) - len(kept),
        groups=len(set(groups.values())),
        problems={split: len(members) for split, members in ordered.items()},
    )
    return TinyWorld(splits=ordered, compositions=compositions, counts=counts)


def _shown_confusions(answers_FMTEL: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """``[f, m, t, e, slot, line]``: whether taking the slot's step for its partner changes the answer for the line."""
    confused = []
    for slot, size in enumerate(grammar.SIZES):
        partners = [grammar.partner(operation) for operation in range(size)]
        confused.append(answers_FMTEL.take(partners, axis=slot) != answers_FMTEL)
    return np.stack(confused, axis=-2)


def _groups(compositions: list[Composition], answers_FMTEL: npt.NDArray[np.int64]) -> dict[Composition, Composition]:
    """For each composition the one that stands for its group (union-find over equal blocks of answers)."""
    parent = {composition: composition for composition in compositions}

    def root(composition: Composition) -> Composition:
        while parent[composition] != composition:
            parent[composition] = parent[parent[composition]]
            composition = parent[composition]
        return composition

    first: dict[tuple[int, bytes], Composition] = {}
    blocks_FMTEBL = answers_FMTEL.reshape(*grammar.SIZES, _BLOCKS, -1)
    for composition in compositions:
        for number, block in enumerate(blocks_FMTEBL[composition]):
            other = root(first.setdefault((number, block.tobytes()), composition))
            parent[max(other, root(composition))] = min(other, root(composition))
    return {composition: root(composition) for composition in compositions}


def composition_of(problem: Problem) -> Composition:
    """The composition that a problem of the tiny world asks for; its id names it."""
    f, m, t, e = (int(part) for part in problem.id.removeprefix(f"{SOURCE}/").split("-"))
    return f, m, t, e


def oracle_critique(problem: Problem, program: str) -> str:
    """The critique that names the first step which the program gets wrong; a program beyond the grammar gets none."""
    wanted, draft = composition_of(problem), grammar.parse(program)
    if draft is None:
        return text.critique(text.NO_SUGGESTION, text.VAGUE_SUGGESTIONS[0], False)
    ok = [asked == done for asked, done in zip(wanted, draft, strict=True)]
    if all(ok):
        return text.critique(text.analysis(wanted, ok), text.NO_SUGGESTION, True)
    slot = ok.index(False)
    return text.critique(text.analysis(wanted, ok), text.suggestion(slot, wanted[slot]), False)


def input_lines(rng: np.random.Generator, count: int) -> list[Line]:
    """Lines of 3 to 8 integers between -30 and 30, one in three with a repeated number."""
    lines = []
    for _ in range(count):
        line = rng.integers(-30, 31, size=int(rng.integers(3, 9)))
        if rng.random() < 1 / 3:
            line[int(rng.integers(1, len(line)))] = line[0]
        lines.append(tuple(int(value) for value in line))
    return lines


def _digest(seed: int, purpose: bytes, data: str) -> bytes:
    return hashlib.sha256(seed.to_bytes(8, "little") + purpose + data.encode()).digest()


def _split(digest: bytes) -> Split:
    point = int.from_bytes(digest[:8], "little") / 2**64
    for split, share in _SHARES.items():
        point -= share
        if point < 0:
            return split
    return "test"


def _choose_lines(differs_KL: npt.NDArray[np.bool_], rng: np.random.Generator) -> list[int]:
    """Lines for the tests: for each confusion one that shows it, the rest at random; in random order."""
    wanted = sum(_TEST_LINES)
    chosen: list[int] = []
    for differs_L in differs_KL:
        if not differs_L[chosen].any():
            chosen.append(int(rng.choice(np.flatnonzero(differs_L))))
    spare = [int(i) for i in rng.choice(differs_KL.shape[1], size=_CHOICES, replace=False) if i not in chosen]
    chosen += spare[: wanted - len(chosen)]
    return [int(i) for i in rng.permutation(chosen)]


def _problem(composition: Composition, split: Split, cases: list[tuple[Line, int]]) -> Problem:
    tests = []
    for size in _TEST_LINES:
        part, cases = cases[:size], cases[size:]
        stdin = "".join(" ".join(map(str, line)) + "\n" for line, _ in part)
        tests.append(StdinTest(stdin=stdin, expected_stdout="".join(f"{answer}\n" for _, answer in part)))
    tricky = sum(slot[index].tricky for slot, index in zip(grammar.SLOTS, composition, strict=True))
    return Problem(
        id=f"{SOURCE}/" + "-".join(map(str, composition)),
        source=SOURCE,
        split=split,
        prompt=grammar.prompt(composition),
        tests=tuple(tests),
        cpu_s=CPU_S,
        memory_mb=_MEMORY_MB,
        difficulty=("easy", "medium", "hard", "hard")[tricky],
        canonical_solution=grammar.program(composition),
    )
