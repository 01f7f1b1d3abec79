"""Judging pairs of answers: the chat that compares two, its outcome, and what votes decide."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from jinja2 import Template

from ctrl_hpc.flow.fences import answer, split
from ctrl_hpc.flow.prompts import load_template, packaged
from ctrl_hpc.flow.text import is_quoted, plain
from ctrl_hpc.jsonl import well_formed
from ctrl_hpc.records import Chat, Judgement, Message

Side = Literal["A", "B"]

VARIABLES = ("question", "answer_a", "answer_b")
"""What the template may use."""
_WHO = r"(?:(?:the\s+)?(?:answer|response|assistant|option|solution)\W{0,4})?"
_CHOICE = re.compile(
    r"^\W{0,12}(?:\d{1,2}[.)]\s+)?\W{0,8}(?:so\W+|thus\W+|therefore\W+)?(?:the\s+|my\s+)?(?:final\s+)?"
    r"(?:better[\s_-]+(?:answer|response|option|solution)|overall[\s_-]+judge?ment|final\s+(?:answer|verdict|choice)"
    r"|verdict|choice|winner)[\s_*`\"']{0,8}(?P<sign>[:=|→⇒-]|is\b)?(?P<rest>.*)$",
    re.IGNORECASE,
)
_SIDE = re.compile(
    rf"^[\W_]{{0,12}}{_WHO}(?P<side>[ab])(?![^\W_])[\W_]{{0,12}}(?:is\s+(?:the\s+)?better(?:\s+(?:one|answer|response))?[\W_]*)?"
    r"(?P<after>(?<![\w])(?:because|since|as|see|due)\b.*)?$",
    re.IGNORECASE,
)
_LONE = re.compile(rf"^[\W_]{{0,12}}{_WHO}(?P<side>[ab])[\W_]{{0,12}}(?:is\s+(?:the\s+)?better\W*)?$", re.IGNORECASE)
_BOXED = re.compile(
    r"\\boxed\s*\{\s*(?:\\\w+\s*\{\s*){0,3}(?:(?:answer|response)\s*)?(?P<side>[ab])\s*\}|\[\[(?P<mark>[ab])\]\]"
    r"|\[\[(?P<more>[ab])>{1,2}[ab]\]\]",
    re.IGNORECASE,
)


def comparison_template(file: str | None) -> Template:
    """The template that asks which of two answers is right: ``file``, or the packaged one.

    Raises ValueError when it is missing or wrong.
    """
    return load_template(file or packaged() / "comparison.j2", VARIABLES)


def comparison_chat(template: Template, system: str | None, question: str, answer_a: str, answer_b: str) -> Chat:
    """Ask which answer is right."""
    asked = well_formed(template.render(question=question, answer_a=answer_a, answer_b=answer_b))
    user = Message(role="user", content=asked)
    return (user,) if system is None else (Message(role="system", content=system), user)


def parse_choice(text: str) -> Side | None:
    """The answer that a comparison calls better; None when it names none or both.

    A line "Better answer: ..." in any dress, or the line under such a heading; else ``\\boxed{A}``, ``[[A]]`` or
    ``[[A>B]]``; else a last line that is nothing but the choice. Thoughts, code and quotations do not count.
    """
    _, lines = split(answer(text))
    lines = [line for line in lines if line.strip() and not is_quoted(line)]
    cleaned = [plain(line).strip() for line in lines]
    found = {side for index in range(len(cleaned)) if (side := _named(cleaned[index : index + 2]))}
    if not found:
        boxes = (match for line in lines for match in _BOXED.finditer(line))
        found = {(match["side"] or match["mark"] or match["more"]).upper() for match in boxes}
    if not found and cleaned and (lone := _LONE.match(cleaned[-1])):
        found = {lone["side"].upper()}
    if found == {"A"}:
        return "A"
    return "B" if found == {"B"} else None


def _named(lines: list[str]) -> str | None:
    """The side that a line names, or that stands alone under it."""
    label = _CHOICE.match(lines[0])
    if label is None:
        return None
    rest = label["rest"] if label["rest"].strip(" *_`\"'.:#") else "".join(lines[1:])
    match = _SIDE.match(rest)
    return match["side"].upper() if match else None


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
