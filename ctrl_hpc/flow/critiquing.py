"""Critiques: what a critic says about solutions."""

from __future__ import annotations

from collections.abc import Sequence

from ctrl_hpc.flow.hints import Hint
from ctrl_hpc.flow.judgement import parse_judgement
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.protocols import Generator
from ctrl_hpc.records import Chat, Critique, Problem, Sampling, Solution


def critique(
    pairs: Sequence[tuple[Problem, Solution]], critic: Generator, prompts: Prompts, sampling: Sampling
) -> list[Critique]:
    """``sampling.n`` critiques of each solution, flat and in order; ids are ``SOLUTION#j``."""
    chats = [prompts.critique(problem, solution) for problem, solution in pairs]
    return _ask(chats, [solution for _, solution in pairs], critic, sampling)


def critique_with_hints(
    triples: Sequence[tuple[Problem, Solution, Hint]], critic: Generator, prompts: Prompts, sampling: Sampling
) -> list[Critique]:
    """As :func:`critique`, by a critic that is shown what the execution found (stage I)."""
    chats = [prompts.hinted_critique(problem, solution, hint) for problem, solution, hint in triples]
    return _ask(chats, [solution for _, solution, _ in triples], critic, sampling)


def _ask(chats: Sequence[Chat], solutions: Sequence[Solution], critic: Generator, sampling: Sampling) -> list[Critique]:
    return [
        Critique(
            id=f"{solution.id}#{j}",
            solution_id=solution.id,
            text=generation.text,
            judgement=parse_judgement(generation.text),
            generation=generation,
        )
        for solution, generations in zip(solutions, critic.complete(chats, sampling), strict=True)
        for j, generation in enumerate(generations)
    ]
