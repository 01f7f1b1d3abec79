"""The overall judgement of a critique: the line ``Overall judgment: Correct`` or ``Overall judgment: Incorrect``."""

from __future__ import annotations

import re

from ctrl_hpc.flow import fences
from ctrl_hpc.records import Judgement

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
    _, lines = fences.split(text)
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
