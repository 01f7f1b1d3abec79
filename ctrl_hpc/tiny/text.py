"""What is said in the tiny world: answers, critiques, and how its fixed generator errs and takes advice.

A critique has the paper's three parts, each on one line::

    Analysis: keep the even ones; ok. square each; wrong. sum up; ok. add one; ok.
    Improvement suggestions: square each;
    Overall judgment: Incorrect

A critic that thinks lists those checks in its thought before it writes that::

    <think>
     keep the even ones; ok. square each; wrong. sum up; ok. add one; ok.
    </think>

    Analysis: keep the even ones; ok. square each; wrong. sum up; ok. add one; ok.
    ...
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from ctrl_hpc.rollout.thinking import CLOSED_BY_FORCE
from ctrl_hpc.tiny import grammar
from ctrl_hpc.tiny.grammar import Composition

NO_SUGGESTION = " none."
VAGUE_SUGGESTIONS = (" check the logic.", " look at it again.", " test it more.")
"""Suggestions that name no step."""
MENTION = " the hint says so."
"""How a critique gives away that its writer saw a hint."""
_VAGUE_WEIGHTS = (0.9, 0.06, 0.04)


def answer(composition: Composition) -> str:
    """The generator's whole answer: the program in a fence."""
    return f"```python\n{grammar.program(composition)}\n```"


def suggestion(slot: int, operation: int) -> str:
    """Advice that names one step in the words of a problem."""
    return f" {grammar.SLOTS[slot][operation].phrase};"


def vague_suggestion(rng: random.Random) -> str:
    """Advice that names no step: mostly the first of :data:`VAGUE_SUGGESTIONS`."""
    return rng.choices(VAGUE_SUGGESTIONS, _VAGUE_WEIGHTS)[0]


def analysis(composition: Composition, ok: Sequence[bool]) -> str:
    """The problem's steps one by one, each with a label: does the program do it?"""
    steps = zip(grammar.phrases(composition), ok, strict=True)
    return "".join(f" {phrase}; {'ok' if right else 'wrong'}." for phrase, right in steps)


def critique(analysis_text: str, suggestion_text: str, correct: bool) -> str:
    """A whole critique."""
    judgement = "Correct" if correct else "Incorrect"
    return f"Analysis:{analysis_text}\nImprovement suggestions:{suggestion_text}\nOverall judgment: {judgement}"


def thought_out(answer_text: str, rounds: int = 1) -> str:
    """An answer by one who thinks, from within the thought on: its checks, ``rounds`` times over, then itself."""
    checks = answer_text.split("\n")[0].split(":", 1)[1]
    return f"{checks * rounds}{CLOSED_BY_FORCE}{answer_text}"


def replaced(composition: Composition, slot: int, operation: int) -> Composition:
    """The composition with another operation in a slot."""
    out = list(composition)
    out[slot] = operation
    return out[0], out[1], out[2], out[3]


@dataclass(frozen=True, slots=True, kw_only=True)
class Habits:
    """How often the fixed generator and the base critic do what they do."""

    hard_share: float = 0.19
    """Share of the pairs (operation, neighbouring operation) that the generator gets wrong."""
    hard_error: float = 0.85
    """Probability of a mistake in such a pair: always the same mistake."""
    easy_error: float = 0.01
    """Probability of a mistake elsewhere."""
    specific: float = 0.36
    """Share of the base critic's negative critiques whose suggestion names a step; the others are vague."""
    labels_true: float = 0.88
    """Share of the base critic's hinted negative critiques whose analysis is right."""
    mentions: float = 0.03
    """Share of its hinted critiques that give the hint away."""
    rambles: float = 0.06
    """Share of the thinking base critic's thoughts that go over the checks again and again."""


class Weaknesses:
    """The generator's systematic mistakes: which step it confuses depends on the step and on its neighbour."""

    def __init__(self, seed: int, habits: Habits) -> None:
        rng = random.Random(f"weaknesses {seed}")
        self.habits = habits
        self.mistakes: dict[tuple[int, int, int], int] = {}
        """(slot, operation, neighbour's operation) -> the operation that is written instead."""
        for slot, size in enumerate(grammar.SIZES):
            neighbours = grammar.SIZES[_neighbour(slot)]
            order = rng.sample(range(neighbours), neighbours)
            per_operation = habits.hard_share * neighbours
            for operation in range(size):
                # a window that slides over the neighbours: every operation and every neighbour gets its share
                start, stop = round(operation * per_operation), round((operation + 1) * per_operation)
                for position in range(start, stop):
                    self.mistakes[slot, operation, order[position % neighbours]] = grammar.partner(operation)
        # each slot is doubted for as many first operations as another; one time in three the doubt is of some use
        uses = [(slot, 1 if use == 0 else 2) for slot in range(len(grammar.SLOTS)) for use in range(3)]
        order = rng.sample(range(grammar.SIZES[0]), grammar.SIZES[0])
        self.doubts = {operation: uses[place % len(uses)] for place, operation in enumerate(order)}
        """The problem's first operation -> the slot that the generator doubts when told only that it is wrong, and
        what it flips of the operation's number there: 1 writes the partner, 2 something else."""

    def attempt(self, composition: Composition, rng: random.Random) -> Composition:
        """What the generator writes when asked for a composition."""
        draft = composition
        for slot, operation in enumerate(composition):
            mistake = self.mistakes.get((slot, operation, composition[_neighbour(slot)]))
            if mistake is not None and rng.random() < self.habits.hard_error:
                draft = replaced(draft, slot, mistake)
            elif mistake is None and rng.random() < self.habits.easy_error:
                draft = replaced(draft, slot, other_operation(slot, operation, rng))
        return draft

    def flounder(self, wanted: Composition, draft: Composition) -> Composition:
        """What the generator makes of a negative critique that names no step: it rewrites the step that it doubts."""
        slot, flip = self.doubts[wanted[0]]
        return replaced(draft, slot, (draft[slot] ^ flip) % grammar.SIZES[slot])


def _neighbour(slot: int) -> int:
    """The slot whose operation decides whether this slot's is hard: the next one, for the last the one before."""
    return slot + 1 if slot + 1 < len(grammar.SLOTS) else slot - 1


def other_operation(slot: int, operation: int, rng: random.Random) -> int:
    """Another operation of the slot, the partner half of the time."""
    if rng.random() < 0.5:
        return grammar.partner(operation)
    return rng.choice([each for each in range(grammar.SIZES[slot]) if each != operation])


def follow(draft: Composition, slot: int, operation: int) -> Composition:
    """How the generator takes advice that names a step: it does it; told to do what it did, it does the partner."""
    return replaced(draft, slot, grammar.partner(operation) if draft[slot] == operation else operation)
