"""What a model's answer holds: the program in it, or the judgement of a critique."""

from __future__ import annotations

import ast
import builtins
import re
import unicodedata
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from ctrl_hpc.flow.fences import (
    LANGUAGE_TAGS,
    NOT_PROGRAMS,
    PUNCTUATION,
    PYTHON,
    Block,
    answer,
    parsed,
    split,
    without_controls,
)
from ctrl_hpc.records import AssertTest, FunctionTest, Judgement, Problem, StoredTests

# --- the program in an answer

_SHOWS = re.compile(
    r"\b(?:(?:sample|example|expected)\s+(?:input|output|usage|run|session|case)s?|outputs?|prints?|results?|usage"
    r"|example|examples|tests?|test\s+cases?|for\s+(?:example|instance)|e\.g\."
    r"|(?:buggy|incorrect|wrong|original|old|previous|naive|brute[\s-]force|slow(?:er)?|inefficient)\s+"
    r"(?:code|version|program|solution|implementation|approach)(?:\s+(?:is|was))?)\W*$",
    re.IGNORECASE,
)
"""Words at the end of the line before a block that shows what a program does, or how it is used."""


def extract_program(text: str, names: Collection[str] = (), language: str | None = None) -> str | None:
    """The program that an answer gives: the last complete fenced block that is one.

    ``names`` are the functions or classes that the problem asks for (:func:`asked_for`): the last block that defines
    them wins over all others. Then Python, or another ``language`` that is asked for, wins over untagged blocks and
    those over other languages; blocks that show input, output or usage, and blocks that only use what an earlier one
    defines, count when there is nothing else; blocks tagged as something else (:data:`NOT_PROGRAMS`) and blank ones
    never do. A block left open counts when the answer has no complete one. None when there is no block: text in a
    thought or outside of fences is no program.
    """
    blocks, _ = split(answer(text))
    blocks = [_without_prose(inner) for block in blocks for inner in _inside(block)]
    programs = [block for block in blocks if block.content.strip() and block.tag not in NOT_PROGRAMS]
    if not programs:
        return None
    best, highest = "", (-1, False, -1, False)
    tags = PYTHON if language in (None, "python") else LANGUAGE_TAGS.get(language, frozenset()) | {language}
    earlier: set[str] = set()
    for block in programs:
        own = _Names.of(block.content)
        defined = sum(_defines(block.content, name) for name in names)
        rank = (defined, block.closed, _kind(block, own, earlier, tags), not own.stub)
        if rank >= highest:
            best, highest = block.content, rank
        earlier |= own.defined
    return best


def _inside(block: Block) -> list[Block]:
    """The blocks that a block of Markdown holds; another block itself."""
    return split(block.content)[0] if block.tag in ("markdown", "md") else [block]


_PROSE = re.compile(
    r"(?:[-*]\s|\d{1,2}[.)]\s|>\s)?[*_\"'(]{0,3}[A-Z][\w'’`-]*[*_`\"')]{0,3}"  # a word that begins a sentence
    r"(?:[:,]?[*_]{0,3}(?:\s+[`*_\"'(]{0,3}[\w'’`-]+(?:\(\))?[`*_\"')]{0,3}[,.:;]?){2,}.*|[*_]{0,3}:[*_]{0,3})"
)
_MOST_CUTS = 20
"""Lines of prose at which a block without an end is tried to be cut."""


def _without_prose(block: Block) -> Block:
    """A block of Python that was never closed, without the sentences after its program; another block itself."""
    if block.closed or block.tag not in PYTHON | {""} or parsed(block.content) is not None:
        return block
    lines = block.content.split("\n")
    cuts = [row for row, line in enumerate(lines) if _PROSE.fullmatch(line.rstrip()) and parsed(line) is None]
    for row in cuts[:_MOST_CUTS]:
        code = "\n".join(lines[:row]).rstrip()
        tree = parsed(code)
        if tree is not None and tree.body:
            return replace(block, content=code)
    return block


_SESSION = re.compile(r"\s*(?:>>>|\$ |% |!?(?:pip|python3?|conda) |In \[\d+\]:)")
"""How what is typed at a prompt begins."""


def _kind(block: Block, own: _Names, earlier: set[str], tags: Collection[str]) -> int:
    """How much a block looks like the program asked for: 0 for one that shows something, 4 for one tagged right."""
    if _SESSION.match(block.content) or own.idle or _SHOWS.search(block.label) or (own.used - own.defined) & earlier:
        return 0
    if block.tag in tags:
        return 4
    if block.tag:
        return 2
    return 3 if own.acts else 1


def _defines(code: str, name: str) -> bool:
    pattern = rf"^[ \t]*(?:(?:async[ \t]+)?def|class)[ \t]+{re.escape(name)}\b|^{re.escape(name)}[ \t]*(?::[^=\n]*)?="
    return re.search(pattern + "(?!=)", code, re.MULTILINE) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Names:
    """The functions and classes that code defines at its top, the names it calls, and whether it does anything."""

    defined: frozenset[str] = frozenset()
    used: frozenset[str] = frozenset()
    acts: bool = False
    idle: bool = False
    """Whether there is nothing but assertions, ``pass``, values and comments."""
    stub: bool = False
    """Whether there are functions, all of them without a body."""

    @classmethod
    def of(cls, code: str) -> _Names:
        """Of Python; all empty for what is not."""
        tree = parsed(code)
        if tree is None:
            return cls()
        made = {
            node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
        }
        bound = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        called = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AugAssign, ast.Call)
        acts = any(isinstance(node, kinds) for node in ast.walk(tree))
        idle = all(isinstance(node, (ast.Assert, ast.Pass)) or _is_value(node) for node in tree.body)
        functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        empty = bool(functions) and all(map(_is_empty, functions))
        return cls(
            defined=frozenset(made), used=frozenset(called - bound), acts=acts, idle=idle, stub=empty and not called
        )


def _is_value(node: ast.stmt) -> bool:
    """An expression that does nothing."""
    return isinstance(node, ast.Expr) and not any(isinstance(part, (ast.Call, ast.Await)) for part in ast.walk(node))


def _is_empty(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return all(isinstance(node, ast.Pass) or _is_value(node) for node in function.body)


_TOO_LONG = 200_000
"""Characters of test code that are not parsed for names."""
_DEFINED = re.compile(r"^(?:async[ \t]+)?(?:def|class)[ \t]+(\w+)", re.MULTILINE)


def asked_for(problem: Problem) -> frozenset[str]:
    """The functions or classes that a problem's tests call; empty where they only read what is printed."""
    if isinstance(problem.tests, StoredTests):
        return frozenset(problem.tests.names)
    names = {test.name for test in problem.tests if isinstance(test, FunctionTest)}
    codes = [test.code for test in problem.tests if isinstance(test, AssertTest)]
    if codes and problem.canonical_solution:
        known = set(_DEFINED.findall(problem.canonical_solution))
        names |= {name for name in known if any(re.search(rf"\b{re.escape(name)}\b", code) for code in codes)}
    elif codes:
        names |= {name for code in codes[:3] if len(code) <= _TOO_LONG for name in _free(code)}
    return frozenset(names)


def _free(code: str) -> Iterator[str]:
    """Names that test code calls and does not define."""
    tree = parsed(code)
    if tree is None:
        return
    nodes = list(ast.walk(tree))
    own = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    own |= {node.id for node in nodes if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load)}
    own |= {
        (item.asname or item.name).split(".")[0]
        for node in nodes
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for item in node.names
    }
    own |= {node.arg for node in nodes if isinstance(node, ast.arg)}
    for node in nodes:
        if isinstance(node, ast.Name) and node.id not in own and not hasattr(builtins, node.id):
            yield node.id


# --- the judgement of a critique

_LATEX = re.compile(
    r"\\*\b(?:boxed|fbox)\s*\{"
    r"|\\(?:boldsymbol|textbf|textit|texttt|textsc|textsf|textrm|text|mathbf|mathrm|mathsf|mathit|bf|bm|emph|underline"
    r"|large|Large|huge|Huge)\b\s*\{?|\\[\[\]()]|\$+"
)
_TAG = re.compile(
    r"</?(?:b|i|em|strong|u|mark|span|p|br|h[1-6]|font|code|answer|verdict|judge?ment)\b[^<>]*/?>", re.IGNORECASE
)
_GOOD, _BAD = "✅✔☑🟢👍🎉✓", "❌✖✗✘🔴👎🚫⛔⚠"
_MARKUP = r"[*_=`]{0,6}"
_OPEN = r"[\s*_=`\"'“”„‘’«»「」『』【】《》〈〉〔〕(\[{<|:.→⇒-]{0,16}"
_HEADS = (
    r"(?:#{1,6}\s+|[-*+•]\s+|\(?(?:\d{1,2}|[a-z]|[ivx]{1,4})[.)]\s+|(?:step|part)\s+\d{1,2}\s*[:.)-]\s*|\|\s*|\{\s*)"
)
_LABEL = re.compile(
    rf"^ {{0,3}}{_HEADS}*#{{0,6}}[\"']?{_MARKUP}"  # heading, item, key
    r"(?:(?:so|thus|hence|therefore),?\s+)?(?P<the>the\s+)?"
    r"(?:(?:final\s+)?overall[\s_-]+(?:judge?ment|verdict|assessment)|final[\s_-]+(?:judge?ment|verdict)|judge?ment|verdict)"
    rf"(?:\s*[(\[]\s*correct\s*(?:/|\||\bor\b)\s*incorrect\s*[)\]])?{_MARKUP}[\"']?(?P<is>\s+is\b)?\s*(?P<sign>[:=|→⇒-]*)"
    rf"{_MARKUP}\s*(?P<rest>.*)$",
    re.IGNORECASE,
)
_THING = r"(?:code|program|solution|answer|draft|implementation|function|submission|it|this|that)"
_SUBJECT = rf"(?:(?:the|this|that|your|its?)\s+)?(?:(?:[a-z]+\s+){{0,2}}?{_THING}(?:\s+is|'s)\s+)?"
_VERDICT = re.compile(
    rf"^{_OPEN}{_SUBJECT}{_OPEN}(?P<verdict>correct|incorrect)(?![^\W_])(?P<after>.*)$", re.IGNORECASE
)
_CLOSED = r"[\s*_=`\"'“”’»」』】》〉〕)\]}>|"
_CLOSE = re.compile(rf"^{_CLOSED}]{{0,16}}")
_ALTERNATIVE = re.compile(r"^\W*(?:(?:or|and)\W+)?(?:in)?correct\b|overall\s+judge?ment", re.IGNORECASE)
_SENTENCE_ENDS = re.compile(
    r"^\s*(?:$|[.!,;:।]+(?:\s|[*_`]*$)|[-(]|because\b|as\b|since\b|due\s+to\b|and\b)", re.IGNORECASE
)
_AT_FAULT = re.compile(r"^\s*(?:for|when|in|on|with|but|if|where|at|by)\b", re.IGNORECASE)
"""What may follow ``Incorrect``, and tells where; behind ``Correct`` it takes some of it back."""
_QUALITY = re.compile(
    r"^\s*but\s+(?:(?:it|the\s+\w+|is|are|rather|quite|very|a|bit|somewhat|still)\s+)*"
    r"(?:slow|inefficient|suboptimal|not\s+(?:optimal|efficient|idiomatic|pythonic)|verbose|unidiomatic"
    r"|hard\s+to\s+read|could|can\s+be\s+(?:improved|simplified|shortened|faster|made))\b"
    r"(?!.*\b(?:fail|wrong|bug|error|incorrect|break|crash|time[\s-]?(?:out|limit)|TLE|not\s+pass))",
    re.IGNORECASE,
)
"""What may follow ``Correct``: that the program could be better."""
_LONE = re.compile(
    rf"^{_OPEN}#{{0,6}}\s*(?:{_MARKUP}(?:(?:final|overall)\s+)?(?:answer|conclusion|result|decision|evaluation|overall)"
    rf"{_MARKUP}\s*:{_MARKUP}\s*)?{_OPEN}(?P<verdict>correct|incorrect){_CLOSED}.!।]{{0,16}}$",
    re.IGNORECASE,
)
_NUMBER = re.compile(r"^ {0,3}\(?\d{1,2}[.)]\s+")
_BOXED = re.compile(
    r"\bboxed\s*\{\s*(?:\\\w+\s*\{\s*){0,3}[\"']?(?P<verdict>correct|incorrect)\s*[.!]?\s*[\"']?\s*\}", re.IGNORECASE
)


def parse_judgement(text: str) -> Judgement | None:
    """``"correct"``, ``"incorrect"``, or None when a critique has no judgement or several that disagree.

    A judgement is a line "Overall judgment: ..."; letter case, emphasis, headings, list markers, boxes, emoji, other
    scripts' punctuation and the spelling "judgement" do not matter, and under a heading the verdict may stand on the
    next line that is not blank. Without such a line a verdict in a ``\\boxed{}``, or one that is alone on the first or
    the last line, counts (as an item of a numbered list where no other item is one). Thoughts, lines inside code and
    quotations are not judgements, nor is a line that offers both verdicts ("Correct/Incorrect"), negates one, or asks.
    """
    _, lines = split(answer(text))
    cleaned = [plain(line) for line in lines]
    found: set[Judgement | None] = set()
    for index, line in enumerate(cleaned):
        label = _LABEL.match(line)
        if label is None:
            continue
        rest = label["rest"].strip()
        if not rest:
            rest = next((after.strip() for after in cleaned[index + 1 :] if after.strip()), "")
        elif not (label["sign"] or label["is"]) or (label["the"] and not label["is"] and ":" not in label["sign"]):
            continue
        found.add(_verdict(rest))
    found -= {None}
    if not found:
        found = {_of(match["verdict"]) for line in lines if not is_quoted(line) for match in _BOXED.finditer(line)}
    if not found:
        ends = [line for line in cleaned if line.strip()]
        found = {_of(match["verdict"]) for line in ends[:1] + ends[-1:] if (match := _lone(line))}
        found = found or _numbered(ends)
    return found.pop() if len(found) == 1 else None


def plain(line: str) -> str:
    """A line without LaTeX, HTML emphasis and control tokens, in ASCII's punctuation; code and quotations unchanged."""
    if is_quoted(line):
        return line
    line = unicodedata.normalize("NFKC", without_controls(line))
    line = "".join(character for character in line if unicodedata.category(character) != "Cf")
    return without_controls(_TAG.sub("", _LATEX.sub("", line.translate(PUNCTUATION))))


def _unmarked(text: str) -> str:
    """Text without emoji and the like."""
    return "".join(character for character in text if unicodedata.category(character) not in ("So", "Mn"))


def is_quoted(line: str) -> bool:
    """Whether a line is a quotation, or code by its indentation."""
    return line.startswith(("    ", "\t")) or line.lstrip().startswith(">")


def _verdict(rest: str) -> Judgement | None:
    marks = set(rest[:40])
    match = _VERDICT.match(_unmarked(rest))
    if match is None or "~~" in rest:
        return None
    after = _CLOSE.sub("", match["after"])
    verdict = _of(match["verdict"])
    told = _SENTENCE_ENDS.match(after) or (_AT_FAULT if verdict == "incorrect" else _QUALITY).match(after)
    if not told or _ALTERNATIVE.search(after):
        return None
    return None if marks & set(_BAD if verdict == "correct" else _GOOD) else verdict


def _lone(line: str) -> re.Match[str] | None:
    """A line that is nothing but a verdict."""
    if is_quoted(line) or "~~" in line:
        return None
    match = _LONE.match(_unmarked(line).strip())
    if match is None:
        return None
    return None if set(line) & set(_BAD if _of(match["verdict"]) == "correct" else _GOOD) else match


def _numbered(lines: list[str]) -> set[Judgement | None]:
    """The verdict that is the first or the last item of a numbered list, where no other line is one."""
    told = [(row, match) for row, line in enumerate(lines) if (match := _lone(_NUMBER.sub("", line)))]
    if len(told) != 1 or told[0][0] not in (0, len(lines) - 1):
        return set()
    return {_of(told[0][1]["verdict"])}


def _of(word: str) -> Judgement:
    return "correct" if word.lower() == "correct" else "incorrect"
