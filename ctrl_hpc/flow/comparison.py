"""Judging pairs of answers: the chat that compares two, its outcome, and what votes decide."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from jinja2 import Template

from ctrl_hpc.flow.fences import answer, split, well_formed
from ctrl_hpc.flow.prompts import PACKAGED, load_template
from ctrl_hpc.flow.text import is_quoted, plain
from ctrl_hpc.records import Chat, Judgement, Message

Side = Literal["A", "B"]

VARIABLES = ("question", "answer_a", "answer_b")
"""What the template may use."""
_CHOICE = re.compile(
    r"^\W{0,12}(?:the\s+)?(?:final\s+)?(?:better\s+answer|overall\s+judge?ment|final\s+(?:answer|verdict|choice)|verdict)"
    r"\W{0,8}(?:is\b)?\W{0,8}(?:(?:the\s+)?(?:answer|response|assistant)\W{0,4})?(?P<side>[ab])\b\W*(?:is\s+better\W*)?$",
    re.IGNORECASE,
)
_BOXED = re.compile(
    r"\\boxed\s*\{\s*(?:\\\w+\s*\{\s*){0,3}(?:answer\s*)?(?P<side>[ab])\s*\}|\[\[(?P<mark>[ab])\]\]", re.IGNORECASE
)


def comparison_template(file: str | None) -> Template:
    """The template that asks which of two answers is right: ``file``, or the packaged one.

    Raises ValueError when it is missing or wrong.
    """
    return load_template(file or PACKAGED / "comparison.j2", VARIABLES)


def comparison_chat(template: Template, system: str | None, question: str, answer_a: str, answer_b: str) -> Chat:
    """Ask which answer is right."""
    asked = well_formed(template.render(question=question, answer_a=answer_a, answer_b=answer_b))
    user = Message(role="user", content=asked)
    return (user,) if system is None else (Message(role="system", content=system), user)


def parse_choice(text: str) -> Side | None:
    """The answer that a comparison calls better; None when it names none or both.

    A line "Better answer: ..." in any dress, else ``\\boxed{A}`` or ``[[A]]``. Thoughts, code and
    quotations do not count.
    """
    _, lines = split(answer(text))
    lines = [line for line in lines if line.strip() and not is_quoted(line)]
    cleaned = [plain(line).strip() for line in lines]
    found = {match["side"].upper() for line in cleaned if (match := _CHOICE.match(line))}
    if not found:
        boxes = (match for line in lines for match in _BOXED.finditer(line))
        found = {(match["side"] or match["mark"]).upper() for match in boxes}
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
