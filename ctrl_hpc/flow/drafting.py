"""Drafts: the fixed generator's solutions to problems."""

from __future__ import annotations

from collections.abc import Sequence

from ctrl_hpc.flow.extraction import extract_program
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.protocols import Generator
from ctrl_hpc.records import Problem, Sampling, Solution


def draft(problems: Sequence[Problem], generator: Generator, prompts: Prompts, sampling: Sampling) -> list[Solution]:
    """``sampling.n`` solutions for each problem, flat and in order, not yet executed; ids are ``PROBLEM/k``."""
    answers = generator.complete([prompts.solution(problem) for problem in problems], sampling)
    return [
        Solution(
            id=f"{problem.id}/{k}",
            problem_id=problem.id,
            text=generation.text,
            program=extract_program(generation.text),
        )
        for problem, generations in zip(problems, answers, strict=True)
        for k, generation in enumerate(generations)
    ]
