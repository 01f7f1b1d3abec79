"""What a model's text holds: fenced blocks, the program in an answer, the judgement in a critique."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ctrl_hpc.records import Judgement

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


NOT_PROGRAMS = frozenset(
    "bash console csv diff html input json latex log markdown math md none output plain plaintext sh shell stderr "
    "stdin stdout terminal tex text toml traceback txt xml yaml yml".split()
)
"""Tags of blocks that show something else than a program: sample output, commands, data."""


def extract_program(text: str) -> str | None:
    """The last complete fenced block that is a program, whatever language its tag names.

    Blocks tagged as something else (:data:`NOT_PROGRAMS`) and blank blocks never count. A tagged block wins over
    untagged ones, which often show sample output. A block left open counts only when the answer has no complete one.
    None when there is no such block: text outside fences is not a program.
    """
    blocks, _ = split(text)
    programs = [block for block in blocks if block.content.strip() and block.tag not in NOT_PROGRAMS]
    for closed in (True, False):
        found = [block for block in programs if block.closed is closed]
        tagged = [block for block in found if block.tag]
        if found:
            return (tagged or found)[-1].content
    return None


_MARKUP = r"[*_]*"
_OPEN = r"[*_`\"'“‘(\[{<]*"
_LABEL = re.compile(
    r"^ {0,3}(?:[#]{1,6}\s+|[-*+]\s+|\(?\d{1,2}[.)]\s+)*"  # heading, list item
    rf"{_MARKUP}(?:final\s+)?overall\s+judge?ment{_MARKUP}(?:\s+is)?\s*(?P<sign>[:=\-–—]?){_MARKUP}\s*(?P<rest>.*)$",
    re.IGNORECASE,
)
_VERDICT = re.compile(rf"^{_OPEN}(?P<verdict>correct|incorrect)\b(?P<after>.*)$", re.IGNORECASE)
_CLOSE = re.compile(r"^[*_`\"'”’)\]}>]*")
_ALTERNATIVE = re.compile(r"^\W*(?:(?:or|and)\W+)?(?:in)?correct\b|overall\s+judge?ment", re.IGNORECASE)
_SENTENCE_ENDS = re.compile(r"^\s*(?:$|[.!,;:](?:\s|[*_`]*$)|[-–—(]|because\b|as\b|since\b)", re.IGNORECASE)


def parse_judgement(text: str) -> Judgement | None:
    """``"correct"``, ``"incorrect"``, or None when a critique has no judgement or several that disagree.

    Letter case, Markdown emphasis, headings, list markers and the spelling "judgement" do not matter; under a heading
    the verdict may stand on the next line that is not blank. Lines inside code and quotations are not judgements,
    nor is a line that offers both verdicts ("Correct/Incorrect"), negates one, or asks.
    """
    _, lines = split(text)
    found = set()
    for index, line in enumerate(lines):
        label = _LABEL.match(line)
        if label is None:
            continue
        rest = label["rest"].strip()
        if not rest:
            rest = next((after.strip() for after in lines[index + 1 :] if after.strip()), "")
        elif not label["sign"]:
            continue
        verdict = _verdict(rest)
        if verdict is not None:
            found.add(verdict)
    return found.pop() if len(found) == 1 else None


def _verdict(rest: str) -> Judgement | None:
    match = _VERDICT.match(rest)
    if match is None:
        return None
    after = _CLOSE.sub("", match["after"])
    if not _SENTENCE_ENDS.match(after) or _ALTERNATIVE.search(after):
        return None
    return "correct" if match["verdict"].lower() == "correct" else "incorrect"
