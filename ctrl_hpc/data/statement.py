"""What a problem's statement says of answers: the error it allows, letter case, and whether several are right."""

from __future__ import annotations

import html
import re

_TOLERANCE = 1e-6
"""Error where a statement allows one and names none: the judges' default (``ctrl_hpc.sandbox.judge``)."""


def comparison_of(statement: str) -> str | None:
    """How the answers of a problem are compared: a name of ``ctrl_hpc.sandbox.judge`` with options, None for exact.

    ``float`` where the statement allows an error, with ``abs`` and ``rel`` where it names another than
    :data:`_TOLERANCE` for both; ``nocase`` where letters may be of any case; ``any`` where several answers are right.
    """
    statement = html.unescape(statement)
    bounds = tolerance(statement)
    options = []
    if bounds is not None and bounds != (_TOLERANCE, _TOLERANCE):
        options += [
            f"{name}={bound:g}" for name, bound in zip(("abs", "rel"), bounds, strict=True) if bound is not None
        ]
    if ignores_case(statement):
        options.append("nocase")
    if _has_several_answers(statement):
        options.append("any")
    mode = "exact" if bounds is None else "float"
    return with_options(mode, options)


def with_options(mode: str, options: list[str]) -> str | None:
    """A comparison's name; None for the default, exact tokens."""
    if options:
        return f"{mode}:{','.join(options)}"
    return None if mode == "exact" else mode


_SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)[.!?](?=\s+[A-Z(\"'`$\\]|\s*$)|\n\s*\n", re.MULTILINE)


def _sentences(statement: str) -> list[str]:
    return [part for part in _SENTENCE_END.split(statement) if part]


_ABOUT_INPUT = re.compile(
    r"\b(?:input|given|comparison|compar(?:ed?|ing)|consider(?:ed)?|treat(?:ed)?)\b", re.IGNORECASE
)
_ABOUT_ANSWER = re.compile(
    r"\b(?:(?:your|the|in)\s+(?:answers?|outputs?)|checker|judge|grader|answers?\s+(?:is|are|will)|recogni[sz]ed)\b",
    re.IGNORECASE,
)


def _is_about_input(sentence: str) -> bool:
    return _ABOUT_INPUT.search(sentence) is not None and not _is_of_answer(sentence)


def _is_of_answer(sentence: str) -> bool:
    return _ABOUT_ANSWER.search(sentence) is not None


# --- the error that an answer may have

_MINUS = r"[-−–—‐‑˗]"
_POWER = (
    rf"(?:(?P<factor>\d+(?:\.\d+)?)\s*(?:×|x|\*|·|⋅|\\times|\\cdot)\s*)?"
    rf"\b10\s*(?:\^|\*\*|<sup>)?\s*[{{(]*\s*(?:\\text\s*\{{)?{_MINUS}\s*[{{(]*\s*(?P<power>\d{{1,2}})(?!\d)"
)
_SUPERSCRIPT = r"10\s*⁻(?P<super>[⁰¹²³⁴⁵⁶⁷⁸⁹]{1,2})"
_FRACTION = (
    r"\\[dt]?frac\s*\{?\s*1\s*\}?\s*\{\s*10\s*\^\s*\{?\s*(?P<over>\d{1,2})\s*\}?\s*\}"
    r"|\b1\s*/\s*10\s*\^\s*\{?(?P<over2>\d{1,2})"
)
_QUOTIENT = r"(?<![\d.])1\s*/\s*(?P<quotient>10+)(?!\d)|\\[dt]?frac\s*\{\s*1\s*\}\s*\{\s*(?P<quotient2>10+)\s*\}"
_SCIENTIFIC = rf"(?P<mantissa>\d+(?:\.\d+)?)\s*[eE]\s*\{{?{_MINUS}\s*(?P<exponent>\d{{1,2}})(?!\d)"
_PERCENT = r"(?<=within )(?P<percent>\d{1,2}(?:\.\d+)?)\s*(?:\\?%|percent\b)"
_DECIMAL = r"(?<![\d.,])(?P<decimal>0?\.0*[1-9]\d{0,2})(?![\d%])"
_WORD = r"\bone\s+(?P<word>tenth|hundredth|thousandth|millionth|billionth)\b"
_NUMBER = re.compile(
    "|".join((_POWER, _SUPERSCRIPT, _FRACTION, _QUOTIENT, _SCIENTIFIC, _PERCENT, _DECIMAL, _WORD)), re.IGNORECASE
)
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹", "0123456789")
_WORDS = {"tenth": 1, "hundredth": 2, "thousandth": 3, "millionth": 6, "billionth": 9}
_ERROR = re.compile(
    r"(?<!probability of )(?<!probability of an )\berror\b(?!\s+(?:messages?|occur\w*|codes?|rates?|happens?)\b)"
    r"|\b(?:errors|accura(?:cy|te|tely)|precis(?:ion|e|ely)|toleran(?:ce|ces|t)|inaccurac(?:y|ies)|deviat\w+"
    r"|eps(?:ilon)?)\b|[εϵ]|\\(?:var)?epsilon\b",
    re.IGNORECASE,
)
_DISTANCE = re.compile(
    r"\b(?:differ(?:s|ence|ences|ing)?|within|close|off\s+by|margin|away\s+from|apart)\b", re.IGNORECASE
)
_BAR = r"(?:\\left|\\right|\\[bB]ig[lr]?)?\s*(?:\\[lr]?vert\b|\\mid\b|\|)"
_FORMULA = re.compile(rf"{_BAR}(?:(?!{_BAR})[^.]){{1,60}}?\s{{0,3}}{_MINUS}(?:(?!{_BAR})[^.]){{1,60}}{_BAR}")
"""A difference between bars, as in ``|a - b|``."""
_DIVISION = re.compile(r"\\[dt]?frac\b|/\s*(?:\\?max|\||\w|\()")
_ANSWER = re.compile(
    r"\b(?:answers?|accept(?:ed|s)|correct|outputs?|print(?:ed)?|judged?|judges?|jury|checker|expected|actual|results?"
    r"|solutions?|right|passes|true\s+(?:value|answer)|returned)\b",
    re.IGNORECASE,
)
_LEAST = re.compile(r"\b(?:differ\w*|distance|apart)\b[^.]{0,40}\bat\s+least\b", re.IGNORECASE)
_OF_GIVEN = re.compile(r"\b(?:given|specified|input)\b[^.]{0,40}\b(?:accuracy|precision|error)\b", re.IGNORECASE)
_KINDS = re.compile(r"\b(?P<kind>absolute(?:ly)?|relative(?:ly)?)\b", re.IGNORECASE)
_UNNAMED = re.compile(
    r"\b(?:absolute|relative)\s+(?:(?:or|and)\s+(?:absolute|relative)\s+)?(?:error|precision|difference)", re.IGNORECASE
)
_COUNTS = "one two three four five six seven eight nine ten eleven twelve".split()
_DIGITS = re.compile(
    rf"\b(?P<count>\d{{1,2}}|{'|'.join(_COUNTS)})\s+(?:correct\s+|exact\s+|accurate\s+|significant\s+)?"
    r"(?:decimals?\b(?:\s+(?:places?|digits?|points?|positions?)\b)?|(?:digits?|places?|numbers?|figures?)\s+"
    r"(?:after|behind|past|(?P<precision>of\s+(?:precision|accuracy))|of)\b)",
    re.IGNORECASE,
)
_AT_LEAST = re.compile(
    r"\b(?:at\s+least|no\s+(?:less|fewer)\s+than|minimum\s+of|(?:correct(?:ly)?|accura\w+|precis\w+|exact|good|same|agree\w*|match\w*)"
    r"(?:\s+\w+){0,4}?(?:\s+(?:up\s+)?to(?:\s+within)?|\s+of|\s+in|\s+(?:the\s+)?first)?)\s*(?:the\s+)?(?:first\s+)?$",
    re.IGNORECASE,
)
_ROUNDED = re.compile(
    r"\b(?:round(?:ed|ing|s)?|truncat\w+|exactly|precisely|trailing|input|given|constraint\w*|cut\s+off)\b",
    re.IGNORECASE,
)


def tolerance(statement: str) -> tuple[float | None, float | None] | None:
    """The absolute and the relative error that a statement allows; None for one that it does not allow, and for none.

    A statement that does not say which means either. Of several numbers the widest holds; only where there is none the
    decimals that are asked for ("correct to six decimals", "at least 9 digits after the point") say it.
    """
    found: dict[str, float] = {}
    unnamed = False
    sentences = _sentences(statement)
    for sentence in sentences:
        unnamed = unnamed or _UNNAMED.search(sentence) is not None
        for kind, value in _allowed(sentence):
            found[kind] = max(found.get(kind, 0.0), value)
    if found:
        return found.get("absolute"), found.get("relative")
    decimals = [digits for sentence in sentences if (digits := _decimals(sentence)) is not None]
    if decimals:
        return (float(f"1e-{min(decimals)}"),) * 2
    return (_TOLERANCE, _TOLERANCE) if unnamed else None


def _allowed(sentence: str) -> list[tuple[str, float]]:
    """The errors that a sentence allows, each with its kind."""
    numbers = [match for match in _NUMBER.finditer(sentence) if 0 < _value(match) <= 0.5]
    numbers = [match for match in numbers if _is_about_error(sentence, match)]
    if not numbers:
        return []
    ends = [0, *(match.end() for match in numbers)]
    starts = [*(match.start() for match in numbers), len(sentence)]
    before = [_kinds(sentence[end:start]) for end, start in zip(ends, starts, strict=True)]
    after = not before[0]  # "1e-3 (absolute), 1e-4 (relative)"
    formula = _FORMULA.search(sentence)
    plain = formula is not None and not _DIVISION.search(sentence[: numbers[0].start()])
    either = {"absolute"} if plain else {"absolute", "relative"}
    return [
        (kind, _value(match))
        for index, match in enumerate(numbers)
        for kind in (before[index + 1] if after else before[index]) or either
    ]


def _decimals(sentence: str) -> int | None:
    """How many decimals of an answer count, by a sentence that asks for so many or more."""
    if _ROUNDED.search(sentence):
        return None
    found = [
        match
        for match in _DIGITS.finditer(sentence)
        if match["precision"] or _AT_LEAST.search(sentence[max(0, match.start() - 80) : match.start()])
    ]
    counts = [_COUNTS.index(word) + 1 if (word := match["count"].lower()) in _COUNTS else int(word) for match in found]
    return min(counts, default=0) or None


def _kinds(text: str) -> set[str]:
    return {"absolute" if match["kind"].lower().startswith("abs") else "relative" for match in _KINDS.finditer(text)}


def _is_about_error(sentence: str, match: re.Match[str]) -> bool:
    """Whether a number is the error that an answer may have: by the words around it."""
    near = sentence[max(0, match.start() - 160) : match.end() + 100]
    before = sentence[max(0, match.start() - 80) : match.end()]
    if _OF_GIVEN.search(sentence) and not _is_of_answer(sentence):
        return False
    if _ERROR.search(near):
        return match["decimal"] is None or _ERROR.search(before) is not None
    if _LEAST.search(before) or _ANSWER.search(sentence) is None or _is_about_input(sentence):
        return False
    return _DISTANCE.search(near) is not None or _FORMULA.search(sentence) is not None


def _value(match: re.Match[str]) -> float:
    if match["decimal"]:
        return float(match["decimal"])
    if match["percent"]:
        return float(match["percent"]) / 100
    if match["word"]:
        return float(f"1e-{_WORDS[match['word'].lower()]}")
    if quotient := match["quotient"] or match["quotient2"]:
        return 1 / int(quotient)
    if match["mantissa"]:
        return float(f"{match['mantissa']}e-{match['exponent']}")
    power = match["power"] or match["over"] or match["over2"] or match["super"].translate(_SUPERSCRIPTS)
    return float(f"{match['factor'] or 1}e-{power}")


# --- letter case

_SAYS = r"(?:print|output|display|write|answer|return|yes|no|letters?|characters?|capital\w*)"
_NO_MATTER = (
    r"(?:(?:does\s+not|doesn't|do\s+not|don't|will\s+not|won't)\s+matter"
    r"|(?:is|are|will\s+be)\s+(?:ignored|irrelevant|not\s+(?:important|significant|checked)|unimportant))"
)
_CASE = re.compile(
    rf"\b{_SAYS}\b[^.]{{0,120}}\b(?:in\s+)?(?:any|either|arbitrary|whatever|both)\s+(?:letter\s+|upper\s*/?\s*lower\s*)?"
    rf"(?:case|register|capitali[sz]ation)s?\b"
    rf"|\bany\s+capitali[sz]ation\b|\b{_SAYS}\b[^.]{{0,60}}\bin\s+mixed\s+case\b"
    rf"|\b(?:checker|judge|grader)\b[^.]{{0,30}}\bnot\s+(?:distinguish|differentiate)\b[^.]{{0,30}}\bcase\b"
    rf"|\b(?:letters?|characters?|symbols?)\b[^.]{{0,60}}\b(?:in\s+)?(?:any|either)\b[^.]{{0,12}}\bcase\b"
    rf"|\b(?:upper|lower)\s*-?\s*(?:case)?\s*(?:letters?\s+)?(?:or|and|/)\s*(?:upper|lower)\s*-?\s*case\b[^.]{{0,60}}\b(?:accept|doesn't|does\s+not|both|fine|ok|same|equivalent|equal)"
    rf"|\b{_SAYS}\b[^.]{{0,80}}\b(?:upper|lower)\s*-?\s*(?:case)?\s*or\s+(?:in\s+)?(?:upper|lower)\s*-?\s*case\b"
    rf"|\b(?:{_SAYS}|checker|judge|grader)\b[^.]{{0,80}}\bcase[\s-]*insensitive"
    rf"|\bcase[\s-]*insensitive[^.]{{0,60}}\b(?:print|output|answers?|checker|judge|grader)\b"
    rf"|\b(?:(?:letter|character)\s+)?(?:case|register|capitali[sz]ation)\s+(?:of\s+(?:the\s+|your\s+)?(?:letters?|characters?|output|answers?)\s+)?{_NO_MATTER}"
    rf"|\b(?:checker|judge|grader)\b[^.]{{0,30}}\b(?:ignores?|disregards?)\s+(?:the\s+)?(?:letter\s+)?case\b"
    rf"|\b(?:is|are)\s+not\s+case[\s-]*sensitive",
    re.IGNORECASE,
)
_CONVERTS = re.compile(r"\b(?:depending|whichever|convert\w*|otherwise|according|fewer)\b", re.IGNORECASE)
_QUOTED = re.compile(r"[\"'“”‘’`«]+(\w+)[\"'“”‘’`»]+")
_TAKEN = re.compile(r"\b(?:recogni[sz]ed|accepted|acceptable|interpreted|regarded|all\s+correct)\b", re.IGNORECASE)


def ignores_case(statement: str) -> bool:
    """Whether a statement says that the answer's letters may be of any case."""
    return any(map(_ignores_case, _sentences(statement)))


def _ignores_case(sentence: str) -> bool:
    if _TAKEN.search(sentence):  # such as: the strings "yEs", "yes" and "YES" will be recognized
        words = set(_QUOTED.findall(sentence))
        if len({word.lower() for word in words}) < len(words):
            return True
    return _CASE.search(sentence) is not None and not (_is_about_input(sentence) or _CONVERTS.search(sentence))


# --- several right answers

_GIVE = r"(?:print|output|return|report|find|give|display|write|produce|construct|show|list|submit)(?:ed)?"
_PLENTY = r"(?:multiple|several|many|more\s+than\s+one|different|various|two\s+or\s+more|a\s+number\s+of|some|other)"
_RIGHT = r"(?:answers?|solutions?|outputs?|ways?|possibilit(?:y|ies)|options?|results?|optima|explanations?)"
_ANY = r"(?:any|an\s+arbitrary|arbitrary|whichever|whatever|(?:just\s+)?one\s+of\s+(?:them|these|those))"
_FINE = r"(?:do|work|suffice|accepted|acceptable|considered\s+(?:as\s+)?correct|correct|allowed|fine|ok(?:ay)?|printed)"
_SEVERAL = re.compile(
    rf"\b{_GIVE}\s+(?:out\s+)?(?:just\s+)?any\s+"
    r"(?:(?:one\s+)?of\s+(?:them|these|those|the|such\b)|one\b|such\b|valid\b|possible\b|correct\b|suitable\b"
    rf"|appropriate\b|feasible\b|acceptable\b|optimal\b|{_RIGHT}\b)"
    rf"|\b{_GIVE}\s+(?:out\s+)?any(?=\s*(?:[.,;:!)]|$))"
    rf"|\b{_GIVE}\s+(?:out\s+)?(?:an|any|one)\s+arbitrary\b"
    rf"|\baccept\w*\s+any\s+(?:\w+\s+){{0,2}}(?:valid|correct|right|{_RIGHT})\b"
    r"|(?<!\bif )(?<!whether )\bany\s+(?!capitali[sz]ation|(?:letter\s+)?case\b|register)"
    r"(?:one\s+)?(?:of\s+(?:them|these|those|the\s+\w+))?(?![^.]{0,40}\b(?:error|precision|accuracy)\b)"
    rf"[^.]{{0,40}}?\b(?:will|would|is|are|can|may)\s+(?:also\s+)?(?:be\s+)?{_FINE}\b"
    rf"|\b(?:there\s+(?:are|is|exists?|may\s+be|might\s+be|can\s+be|could\s+be)|if|in\s+case\s+of|when)\b[^.]{{0,30}}\b"
    rf"{_PLENTY}\b(?:[^.]{{0,100}}?|[^.]{{0,80}}\.[^.]{{0,40}}?)\b{_GIVE}\s+(?:out\s+)?{_ANY}\b"
    rf"|\b{_PLENTY}\s+(?:\w+\s+){{0,2}}{_RIGHT}\b(?:[^.]{{0,100}}?|[^.]{{0,60}}\.[^.]{{0,40}}?)\b{_GIVE}\s+(?:out\s+)?{_ANY}\b"
    rf"|\b{_PLENTY}\s+(?:\w+\s+){{0,2}}{_RIGHT}\b[^.]{{0,60}}\b(?:any|all|each)\b[^.]{{0,20}}\b"
    rf"(?:will|would|is|are)\s+(?:be\s+)?{_FINE}\b"
    r"|(?:\bnot|n't)\s+(?:be\s+|necessarily\s+)*unique\b(?:[^.]{0,100}?|[^.]{0,60}\.[^.]{0,40}?)\b"
    rf"{_GIVE}\s+(?:out\s+)?{_ANY}\b"
    rf"|\b{_GIVE}\s+(?:out\s+)?(?:any\s+|just\s+)?one\s+of\s+(?:the|them|these|those|several|many)\s+(?:\w+\s+)?{_RIGHT}\b"
    rf"|\b(?:all|each|every)\s+(?:\w+\s+){{0,3}}{_RIGHT}\s+(?:will|would|is|are)\s+(?:be\s+)?(?:accepted|acceptable)\b"
    r"|(?:\bnot|n't)\s+(?:need|have|required|necessary|obliged)\s+to\s+(?:mini|maxi|opti)mi[sz]e\b"
    r"|\bspecial[\s-]+(?:judge|checker)s?\b|\bspj\b|\bcustom\s+(?:checker|judge)\b",
    re.IGNORECASE,
)
_ORDER = re.compile(
    r"\b(?:in|using)\s+(?:any|arbitrary|an\s+arbitrary|whatever)\s+order\b"
    r"|\border\s+(?:of\s+\w+(?:\s+\w+){0,3}\s+)?(?:does\s+not|doesn't|do\s+not|is\s+not)\s+(?:matter|important)",
    re.IGNORECASE,
)
_GIVES = re.compile(rf"\b(?:{_GIVE}|answers?|prints|outputs)\b", re.IGNORECASE)
_ORDER_OF_INPUT = re.compile(
    r"\b(?:given|input|may\s+appear|listed|connected|use|used|apply|perform|operations?|visit\w*|choose|travel\w*|eat"
    r"|take|taken|process\w*|read|pick\w*|delete|remove|play\w*|solve\w*|buy|collect\w*|do|complete\w*)\b",
    re.IGNORECASE,
)


def _has_several_answers(statement: str) -> bool:
    """Whether a statement says that any of several answers is right, or that a special judge decides."""
    if _SEVERAL.search(statement):
        return True
    return any(
        _free_order(sentence, match) for sentence in _sentences(statement) for match in _ORDER.finditer(sentence)
    )


def _free_order(sentence: str, match: re.Match[str]) -> bool:
    """Whether it is the answer whose order is free."""
    before = sentence[: match.start()]
    return _GIVES.search(before) is not None or _ORDER_OF_INPUT.search(before) is None
