"""Leaked solutions: a critique explains what to change; one that holds the corrected program only dictates it."""

from __future__ import annotations

from ctrl_hpc.flow.extraction import extract_program

WHOLE_LINES = 5
"""Lines of code in one block from which on a critique is taken to hold a program."""
COPIED_SHARE = 0.5
"""Share of the revision's new lines that stand in the critique word for word."""
MIN_NEW_LINES = 3
"""New lines that a revision must have for that share to mean anything."""
MIN_LINE_CHARACTERS = 8
"""Shorter lines (``else:``, ``return x``) are the same in many programs."""


def leaks_solution(critique: str, draft: str | None, revision: str | None) -> bool:
    """Whether a critique gives the solution away.

    It does when it holds a block of code of at least :data:`WHOLE_LINES` lines that are not merely quoted from the
    draft, or when at least half of the lines that the revision adds to the draft stand in it word for word.
    """
    old = _lines(draft or "")
    block = _lines(extract_program(critique) or "")
    if len(block) >= WHOLE_LINES and not block <= old:
        return True
    new = {line for line in _lines(revision or "") - old if len(line) >= MIN_LINE_CHARACTERS}
    if len(new) < MIN_NEW_LINES:
        return False
    said = _lines(critique)
    return len(new & said) >= COPIED_SHARE * len(new)


def _lines(text: str) -> set[str]:
    """The distinct lines that are not blank, without their indentation and Markdown's bullets and backticks."""
    return {line.strip().removeprefix("- ").strip().strip("`").strip() for line in text.split("\n")} - {""}
