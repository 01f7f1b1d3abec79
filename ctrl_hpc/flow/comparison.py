"""Judging pairs of answers: the chat that compares two, its outcome, and what votes decide."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from jinja2 import Template

from ctrl_hpc.flow import text as fences
from ctrl_hpc.flow.prompts import PACKAGED, load_template
from ctrl_hpc.records import Chat, Judgement, Message

Side = Literal["A", "B"]

VARIABLES = ("question", "answer_a", "answer_b")
"""What the template may use."""
_CHOICE = re.compile(
    r"^\W{0,6}(?:the\s+)?(?:better\s+answer|overall\s+judge?ment)\W{0,4}(?:is)?\W{0,4}(?:answer\W{0,3})?(?P<side>[ab])\W*$",
    re.IGNORECASE,
)


def comparison_template(file: str | None) -> Template:
    """The template that asks which of two answers is right: ``file``, or the packaged one.

    Raises ValueError when it is missing or wrong.
    """
    return load_template(file or PACKAGED / "comparison.j2", VARIABLES)


def comparison_chat(template: Template, system: str | None, question: str, answer_a: str, answer_b: str) -> Chat:
    """Ask which answer is right."""
    asked = template.render(question=question, answer_a=answer_a, answer_b=answer_b)
    user = Message(role="user", content=asked)
    return (user,) if system is None else (Message(role="system", content=system), user)


def parse_choice(text: str) -> Side | None:
    """The answer that a comparison calls better; None when it names none or both. Lines inside code do not count."""
    _, lines = fences.split(text)
    found = {match["side"].upper() for line in lines if (match := _CHOICE.match(line.strip()))}
    if found == {"A"}:
        return "A"
    return "B" if found == {"B"} else None


def compared(first: Sequence[Side | None], swapped: Sequence[Side | None]) -> Side | None:
    """The answer that more votes prefer; ``swapped`` votes were cast with the answers in the other places.

    A tie decides nothing.
    """
    surplus = sum((vote == "A") - (vote == "B") for vote in first)
    surplus += sum((vote == "B") - (vote == "A") for vote in swapped)
    return None if surplus == 0 else "A" if surplus > 0 else "B"


def judged_apart(of_a: Sequence[Judgement | None], of_b: Sequence[Judgement | None]) -> Side | None:
    """The answer that more votes call correct, each answer judged by itself; a tie decides nothing."""
    surplus = sum(vote == "correct" for vote in of_a) - sum(vote == "correct" for vote in of_b)
    return None if surplus == 0 else "A" if surplus > 0 else "B"
