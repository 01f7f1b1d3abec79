"""What a problem's statement says of answers: the error it allows, letter case, and whether several are right."""

from __future__ import annotations

import re

TOLERANCE = 1e-6
"""Error where a statement allows one and names none: the judges' default (``ctrl_hpc.sandbox.judge``)."""
_MINUS = r"[-−–—‐‑˗]"
_POWER = rf"10\s*(?:\^|\*\*|<sup>)?\s*[{{(]*\s*{_MINUS}\s*[{{(]*\s*(?P<power>\d{{1,2}})(?!\d)"
_SUPERSCRIPT = r"10\s*⁻(?P<super>[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,2})"
_FRACTION = r"\\frac\s*\{?\s*1\s*\}?\s*\{\s*10\s*\^\s*\{?\s*(?P<over>\d{1,2})\s*\}?\s*\}"
_SCIENTIFIC = rf"(?P<mantissa>\d+(?:\.\d+)?)\s*[eE]\s*{_MINUS}\s*(?P<exponent>\d{{1,2}})(?!\d)"
_DECIMAL = r"(?<![\d.,])(?P<decimal>0?\.0*[1-9]\d{0,2})(?![\d])"
_NUMBER = re.compile("|".join((_POWER, _SUPERSCRIPT, _FRACTION, _SCIENTIFIC, _DECIMAL)))
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
_ERROR = re.compile(
    r"\b(?:errors?|accura(?:cy|te|tely)|precis(?:ion|e|ely)|toleran(?:ce|ces|t)|inaccurac(?:y|ies)|deviat\w+|eps(?:ilon)?)\b|[εϵ]",
    re.IGNORECASE,
)
_DISTANCE = re.compile(r"\b(?:differ(?:s|ence|ences)?|within|close|off\s+by|margin)\b", re.IGNORECASE)
_ANSWER = re.compile(
    r"\b(?:answers?|accepted|correct|outputs?|print(?:ed)?|judged?|jury|checker|expected|actual|results?|solutions?|right"
    r"|true\s+value|returned)\b",
    re.IGNORECASE,
)
_LEAST = re.compile(r"\b(?:differ\w*|distance)\b[^.]{0,40}\bat\s+least\b", re.IGNORECASE)
_KINDS = re.compile(r"\b(?P<kind>absolute(?:ly)?|relative(?:ly)?)\b", re.IGNORECASE)
_UNNAMED = re.compile(
    r"\b(?:absolute|relative)\s+(?:(?:or|and)\s+(?:absolute|relative)\s+)?(?:error|precision|difference)", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)[.!?](?=\s+[A-Z(\"'`$\\]|\s*$)|\n\s*\n", re.MULTILINE)

_SAYS = r"(?:print|output|display|write|answer|return|yes|no|letters?|characters?)"
_CASE = re.compile(
    rf"\b{_SAYS}\b[^.]{{0,120}}\b(?:in\s+)?(?:any|either|arbitrary|whatever|both)\s+(?:letter\s+|upper\s*/?\s*lower\s*)?"
    rf"(?:case|register)s?\b"
    rf"|\b(?:letters?|characters?|symbols?)\b[^.]{{0,60}}\b(?:in\s+)?(?:any|either)\b[^.]{{0,12}}\bcase\b"
    rf"|\b(?:upper|lower)\s*-?\s*(?:case)?\s*(?:or|and|/)\s*(?:upper|lower)\s*-?\s*case\b[^.]{{0,60}}\b(?:accept|doesn't|does\s+not|both|fine|ok)"
    rf"|\b{_SAYS}\b[^.]{{0,80}}\b(?:upper|lower)\s*-?\s*(?:case)?\s*or\s+(?:in\s+)?(?:upper|lower)\s*-?\s*case\b"
    rf"|\b{_SAYS}\b[^.]{{0,80}}\bcase[\s-]*insensitive"
    rf"|\bcase[\s-]*insensitive[^.]{{0,60}}\b(?:print|output|answers?|checker|judge)\b"
    rf"|\b(?:letter\s+)?case\s+(?:of\s+(?:the\s+)?(?:letters|characters|output|answer)\s+)?(?:does\s+not|doesn't|do\s+not)\s+matter"
    rf"|\b(?:is|are)\s+not\s+case[\s-]*sensitive",
    re.IGNORECASE,
)
_ABOUT_INPUT = re.compile(r"\b(?:input|given|comparison|compared?|consider(?:ed)?|treat(?:ed)?)\b", re.IGNORECASE)
_SEVERAL = re.compile(
    r"\b(?:print|output|return|report|find|give|display|write|accept\w*|produce|construct)\s+(?:out\s+)?(?:just\s+)?any\s+"
    r"(?:(?:one\s+)?of\s+(?:them|these|those|such\b)|one\b|such\b|valid\b|possible\b|correct\b|suitable\b|optimal\b|answers?\b|solutions?\b)"
    r"|\bany\s+(?:one\s+)?(?:of\s+(?:them|these|those|the\s+\w+))?[^.]{0,40}?\b(?:will|would|is|are|can|may)\s+(?:also\s+)?(?:be\s+)?(?:accepted|acceptable|considered\s+correct|correct|allowed|fine|ok(?:ay)?|printed)\b"
    r"|\bif\s+there\s+(?:are|is|exist|exists)\s+(?:multiple|several|many|more\s+than\s+one|a\s+number\s+of|various|some)\b[^.]{0,80}[.,;:]?\s*(?:you\s+(?:may|can|should)\s+)?"
    r"(?:please\s+)?(?:print|output|return|find|give|write|report|choose)\s+(?:out\s+)?(?:any|an\s+arbitrary)\b"
    r"|\b(?:in|using)\s+(?:any|arbitrary|an\s+arbitrary|whatever)\s+order\b"
    r"|\border\s+(?:of\s+\w+(?:\s+\w+){0,3}\s+)?(?:does\s+not|doesn't|do\s+not|is\s+not)\s+(?:matter|important)",
    re.IGNORECASE,
)
_ORDER_OF_INPUT = re.compile(
    r"\b(?:given|input|may\s+appear|listed|connected|use|used|apply|perform|operations?)\b", re.IGNORECASE
)


def comparison_of(statement: str) -> str | None:
    """How the answers of a problem are compared: a name of ``ctrl_hpc.sandbox.judge`` with options, None for exact.

    ``float`` where the statement allows an error, with ``abs`` and ``rel`` where it names another than
    :data:`TOLERANCE` for both; ``nocase`` where letters may be of any case; ``any`` where several answers are right.
    """
    bounds = tolerance(statement)
    options = []
    if bounds is not None and bounds != (TOLERANCE, TOLERANCE):
        options += [
            f"{name}={bound:g}" for name, bound in zip(("abs", "rel"), bounds, strict=True) if bound is not None
        ]
    if ignores_case(statement):
        options.append("nocase")
    if has_several_answers(statement):
        options.append("any")
    mode = "exact" if bounds is None else "float"
    return with_options(mode, options)


def with_options(mode: str, options: list[str]) -> str | None:
    """A comparison's name; None for the default, exact tokens."""
    if options:
        return f"{mode}:{','.join(options)}"
    return None if mode == "exact" else mode


def tolerance(statement: str) -> tuple[float | None, float | None] | None:
    """The absolute and the relative error that a statement allows; None for one that it does not allow, and for none.

    A statement that does not say which means either. Of several numbers the widest holds.
    """
    found: dict[str, float] = {}
    unnamed = False
    for sentence in _sentences(statement):
        unnamed = unnamed or _UNNAMED.search(sentence) is not None
        numbers = [match for match in _NUMBER.finditer(sentence) if 0 < _value(match) <= 0.5]
        numbers = [match for match in numbers if _is_about_error(sentence, match)]
        for index, match in enumerate(numbers):
            start = numbers[index - 1].end() if index else 0
            kinds = _kinds(sentence[start : match.start()]) or (
                _kinds(sentence[match.end() :]) if len(numbers) == 1 else set()
            )
            for kind in kinds or {"absolute", "relative"}:
                found[kind] = max(found.get(kind, 0.0), _value(match))
    if found:
        return found.get("absolute"), found.get("relative")
    return (TOLERANCE, TOLERANCE) if unnamed else None


def _sentences(statement: str) -> list[str]:
    return [part for part in _SENTENCE_END.split(statement) if part]


def _kinds(text: str) -> set[str]:
    return {"absolute" if match["kind"].lower().startswith("abs") else "relative" for match in _KINDS.finditer(text)}


def _is_about_error(sentence: str, match: re.Match[str]) -> bool:
    """Whether a number is the error that an answer may have: by the words around it."""
    near = sentence[max(0, match.start() - 160) : match.end() + 100]
    before = sentence[max(0, match.start() - 80) : match.end()]
    if _ERROR.search(near):
        return match["decimal"] is None or _ERROR.search(before) is not None
    if _LEAST.search(before):
        return False
    return _DISTANCE.search(near) is not None and _ANSWER.search(sentence) is not None


def _value(match: re.Match[str]) -> float:
    if match["decimal"]:
        return float(match["decimal"])
    if match["mantissa"]:
        return float(f"{match['mantissa']}e-{match['exponent']}")
    power = match["power"] or match["over"] or match["super"].translate(_SUPERSCRIPTS)
    return float(f"1e-{power}")


def ignores_case(statement: str) -> bool:
    """Whether a statement says that the answer's letters may be of any case."""
    return any(_CASE.search(part) and not _ABOUT_INPUT.search(part) for part in _sentences(statement))


def has_several_answers(statement: str) -> bool:
    """Whether a statement says that any of several answers is right."""
    for match in _SEVERAL.finditer(statement):
        before = statement[max(0, match.start() - 60) : match.start()].rpartition(".")[2]
        if not ("order" in match[0].lower() and _ORDER_OF_INPUT.search(before)):
            return True
    return False
