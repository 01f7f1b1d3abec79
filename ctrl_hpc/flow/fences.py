"""Fenced code blocks of Markdown, as models write them.

The rules are CommonMark's (spec 0.31, section 4.5) with two tolerances. A fence may be indented to any depth (models
put code into lists); its content loses that indentation. And a tagged fence inside an open block of the same kind
starts a new block, because a closing fence carries no tag: the earlier block was never closed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_FENCE = re.compile(r"^(?P<indent>[ \t]*)(?P<marks>`{3,}|~{3,})(?P<info>.*)$")
_CLOSING_SLACK = 3
"""Columns by which a closing fence may be indented more than its opening: more is text inside the block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block; ``tag`` is the first word after the opening fence, in lower case, or empty."""

    tag: str
    content: str
    closed: bool
    """False when the text ended, or the next block began, before a closing fence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opening:
    mark: str
    length: int
    column: int
    tag: str


def split(text: str) -> tuple[list[Block], list[str]]:
    """The blocks of a text in order, and the lines outside all of them (fence lines are in neither)."""
    blocks: list[Block] = []
    outside: list[str] = []
    opening: _Opening | None = None
    content: list[str] = []
    for line in text.replace("\r\n", "\n").split("\n"):
        fence = _FENCE.match(line)
        if opening is None:
            opening = _opened(fence) if fence else None
            if opening is None:
                outside.append(line)
        elif fence and _closes(fence, opening):
            blocks.append(_block(opening, content, closed=True))
            opening, content = None, []
        elif fence and _reopens(fence, opening):
            blocks.append(_block(opening, content, closed=False))
            opening, content = _opened(fence), []
        else:
            content.append(line)
    if opening is not None:
        blocks.append(_block(opening, content, closed=False))
    return blocks, outside


def _opened(fence: re.Match[str]) -> _Opening | None:
    marks, info = fence["marks"], fence["info"].strip()
    if marks[0] == "`" and "`" in info:  # an inline code span, by CommonMark
        return None
    words = info.split()
    tag = words[0].strip("{}.").lower() if words else ""
    return _Opening(mark=marks[0], length=len(marks), column=_column(fence["indent"]), tag=tag)


def _same_kind(fence: re.Match[str], opening: _Opening) -> bool:
    marks = fence["marks"]
    near = _column(fence["indent"]) <= opening.column + _CLOSING_SLACK
    return marks[0] == opening.mark and len(marks) >= opening.length and near


def _closes(fence: re.Match[str], opening: _Opening) -> bool:
    return _same_kind(fence, opening) and not fence["info"].strip()


def _reopens(fence: re.Match[str], opening: _Opening) -> bool:
    tagged = re.fullmatch(r"[\w.+#{}-]+", fence["info"].strip()) is not None
    return tagged and _same_kind(fence, opening) and len(fence["marks"]) == opening.length


def _column(indent: str) -> int:
    return len(indent.expandtabs(4))


def _block(opening: _Opening, content: list[str], *, closed: bool) -> Block:
    lines = [_dedent(line, opening.column) for line in content]
    return Block(tag=opening.tag, content="\n".join(lines), closed=closed)


def _dedent(line: str, columns: int) -> str:
    """The line without its first ``columns`` columns of white space, or without all it has."""
    dropped = 0
    for index, character in enumerate(line):
        if dropped >= columns or character not in " \t":
            return line[index:]
        dropped += 1 if character == " " else 4 - dropped % 4
    return ""
