"""Revisions: the fixed generator's second try, in the light of a critique."""

from __future__ import annotations

from collections.abc import Sequence

from ctrl_hpc.flow.extraction import extract_program
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.protocols import Generator
from ctrl_hpc.records import Critique, Problem, Revision, Sampling, Solution


def revise(
    triples: Sequence[tuple[Problem, Solution, Critique]],
    generator: Generator,
    prompts: Prompts,
    sampling: Sampling,
    *,
    gate: bool = True,
    skip: frozenset[str] = frozenset(),
) -> list[Revision]:
    """One revision for each critique, in order, not yet executed.

    With ``gate`` a critique that judges the draft correct keeps it, verdict and all, without asking the generator
    (the paper stops there; its released code asks all the same: ``gate=False``). So do all critiques of the solutions
    ``skip``, by id. Greedy revisions (``sampling.temperature == 0``) of identical chats are asked for once.
    """
    assert sampling.n == 1, "one revision a critique"
    asked = [
        index
        for index, (_, solution, critique) in enumerate(triples)
        if not (gate and critique.judgement == "correct") and solution.id not in skip
    ]
    chats = {
        index: prompts.revision(problem, solution, critique.text)
        for index in asked
        for problem, solution, critique in [triples[index]]
    }
    distinct = list(dict.fromkeys(chats.values())) if sampling.temperature == 0 else list(chats.values())
    answers = [generations[0].text for generations in generator.complete(distinct, sampling)] if distinct else []
    if sampling.temperature == 0:
        text_of_chat = dict(zip(distinct, answers, strict=True))
        texts = {index: text_of_chat[chat] for index, chat in chats.items()}
    else:
        texts = dict(zip(chats, answers, strict=True))
    return [
        _revision(critique, texts[index]) if index in texts else _kept(critique, solution)
        for index, (_, solution, critique) in enumerate(triples)
    ]


def _revision(critique: Critique, text: str) -> Revision:
    return Revision(critique_id=critique.id, text=text, program=extract_program(text), kept=False)


def _kept(critique: Critique, solution: Solution) -> Revision:
    return Revision(
        critique_id=critique.id, text=solution.text, program=solution.program, kept=True, verdict=solution.verdict
    )
