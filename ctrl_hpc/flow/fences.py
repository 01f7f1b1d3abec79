"""An answer as models write them: what is said apart from thoughts and control tokens, and the fenced blocks in it."""

from __future__ import annotations

import ast
import re
import warnings
from dataclasses import dataclass, replace

# --- the answer: without the thought before it and the control tokens after it

_CONTROL = r"(?:<\|[\w/▁-]{1,40}\|>|<｜[^｜<>\n]{1,40}｜>|</?s>|<(?:eos|bos|pad|eot|end_of_turn)>|\[/INST\]|\[EOS\])"
"""Tokens that end a turn, where a server has left them in the text."""
_TURN = (
    r"(?:<\|im_start\|>|<\|(?:start_header_id|header_start)\|>|<\|start\|>|<start_of_turn>|<｜(?:User|Assistant)｜>"
    r"|<\|START_OF_TURN_TOKEN\|>|\[INST\])"
)
_ASKS = rf"(?:{_TURN}\s*(?:<\|)?(?:user|human|system)\b|<\|(?:user|human|system)\|>|<｜User｜>|\[INST\])"
"""What begins a turn that is not the model's, whatever stands before it."""
_LAST_CONTROL = re.compile(rf"{_CONTROL}$", re.IGNORECASE)
_LONGEST_CONTROL = 64
_NEXT_TURN = re.compile(
    rf"{_CONTROL}\s*{_TURN}|(?:^|```|~~~)[ \t]*{_ASKS}|<\|(?:user|human|system)\|>[ \t]*$", re.IGNORECASE | re.MULTILINE
)
_THOUGHT = r"(?:think(?:ing)?|thoughts?|reason(?:ing)?|seed:think|scratchpad)"
_THINK = re.compile(
    rf"(?:<|&lt;|<\||◁)(?P<close>/?)\s*{_THOUGHT}\s*(?:>|&gt;|\|>|▷)|\[(?P<close2>/?)THINK\]"
    r"|<\|(?:(?P<mark>begin|end)_of_thought|(?P<mark2>start|end)_thinking)\|>"
    r"|<unused94>(?=thought)|(?P<close3>)<unused95>",
    re.IGNORECASE,
)
_QUOTES = frozenset("\"'`\\")
_FINAL_CHANNEL = "<|channel|>final<|message|>"
_CHANNEL = re.compile(r"\s*(?:<\|start\|>assistant)?<\|channel\|>", re.IGNORECASE)


def answer(text: str) -> str:
    """What a model answers: its text without thoughts (``<think>``, ``[THINK]``, an analysis channel) and without the
    control tokens and further turns after it.

    A closing tag without an opening one ends a thought that the chat template began. A thought that never ends was cut
    off: nothing after its opening is an answer. Tags in quotes, and tags inside the answer's own code, are text.
    """
    if _FINAL_CHANNEL in text:
        text = text.rpartition(_FINAL_CHANNEL)[2]
    elif _CHANNEL.match(text):
        return ""
    turn = _NEXT_TURN.search(text)
    if turn is not None:
        fence = turn[0][:3] if turn[0][:3] in ("```", "~~~") else ""
        text = text[: turn.start()] + fence
    return without_controls(_without_thoughts(text))


def without_controls(text: str) -> str:
    """The text without the control tokens at its end."""
    while match := _LAST_CONTROL.search(text.rstrip()[-_LONGEST_CONTROL:]):
        text = text.rstrip()[: -len(match[0])]
    return text


def _without_thoughts(text: str) -> str:
    kept: list[str] = []
    scanner = _Scanner()
    position = 0
    thinking = False
    for tag in _THINK.finditer(text):
        mark = (tag["mark"] or tag["mark2"] or "").lower()
        closes = bool(tag["close"] or tag["close2"] or tag["close3"] is not None or mark == "end")
        if thinking:
            if closes:
                thinking, position = False, tag.end()
        elif _is_quoted(text, tag):
            continue
        elif closes:  # the template opened the thought: all so far was one
            kept, scanner, position = [], _Scanner(), tag.end()
        else:
            part = text[position : tag.start()]
            scanner.read(part.split("\n")[:-1])
            kept.append(part)
            position = tag.start()
            thinking = not scanner.in_block
    return "".join(kept) if thinking else "".join(kept) + text[position:]


PUNCTUATION = {
    ord(character): ascii
    for ascii, characters in {
        ":": "：﹕︰",
        ".": "．。｡।",
        ";": "؛；",
        ",": "，、،",
        "!": "！",
        "?": "？؟",
        "{": "｛",
        "}": "｝",
        "(": "（",
        ")": "）",
        "[": "［",
        "]": "］",
        "-": "－—–−",
        "*": "＊",
        "_": "＿",
        '"': "＂",
        "'": "＇",
        "`": "｀",
        "|": "｜",
    }.items()
    for character in characters
}
"""Other scripts' punctuation as ASCII."""


def _is_quoted(text: str, tag: re.Match[str]) -> bool:
    return text[tag.start() - 1 : tag.start()] in _QUOTES and text[tag.end() : tag.end() + 1] in _QUOTES


# --- fenced blocks

_FENCE = re.compile(r"^(?P<indent>[ \t]*)(?P<marks>`{3,}|~{3,})(?P<info>.*)$")
_GLUED = re.compile(r"^(?P<text>.*[^`~\s].*?)(?P<marks>`{3,})(?P<info>[ \t]*[\w.+#-]*[ \t]*)$")
"""A fence behind text on its line."""
_QUOTE = re.compile(r"^ {0,3}>[ \t]?")
_ONE_LINE = re.compile(r"(?P<marks>`{3,})(?P<tag>[\w.+#-]+)[ \t]+(?P<code>[^`\n]*[^`\s])[ \t]*(?P=marks)(?!`)")
"""A whole block on a line: a language's tag, then code."""
_SPAN = re.compile(r"(?P<marks>`{3,})(?P<code>[^`\r\n]+)(?P=marks)")
"""A whole line that is a span of code."""
_CLOSING_SLACK = 3
"""Columns by which a closing fence may be indented more than its opening: more is text inside the block."""

PYTHON = frozenset("python python2 python3 py py2 py3 pypy pypy3 cpython sage ipython".split())
"""Tags of Python."""
LANGUAGE_TAGS = {"cpp": frozenset("c++ cc cpp cxx".split())}
"""What answers call another language that problems may ask for, beside its own name."""
_OTHER_LANGUAGES = frozenset(
    "ada asm awk bas basic c c# c++ cc clj clojure cobol coffeescript cpp cs csharp cxx d dart delphi elixir erlang f# "
    "fortran fs fsharp go golang groovy haskell hs java javascript jl js jsx julia kotlin kt lisp lua matlab nim "
    "objective-c objc ocaml pascal perl php pl powershell prolog ps1 r rb rs ruby rust scala scheme solidity sql swift "
    "ts tsx typescript vb verilog vhdl zig".split()
)
"""Tags of other languages."""
NOT_PROGRAMS = frozenset(
    "bash bat cmd console csv diff dockerfile dot error example examples expected graphviz html http ini input json "
    "json5 jsonc jsonl latex log makefile markdown math md mermaid none output patch plain plaintext properties "
    "pseudo pseudocode pycon pytb python-console python-repl python-traceback pytraceback result rst sample sh "
    "shell shell-session stderr stdin stdout svg terminal test tests tex text toml traceback tsv txt usage vtt xml "
    "yaml yml zsh".split()
)
"""Tags of blocks that show something else than a program: sample input and output, sessions, commands, data."""
_TAGS = PYTHON | _OTHER_LANGUAGES | NOT_PROGRAMS


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A fenced block; ``tag`` is the first word after the opening fence, in lower case, or empty."""

    tag: str
    content: str
    closed: bool
    """False when the text ended, or the next block began, before a closing fence."""
    label: str = ""
    """The line of text before the block, blank lines apart; empty when another block, or nothing, comes before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Opening:
    mark: str
    length: int
    column: int
    tag: str
    code: str
    """Code behind the tag on the fence's line."""
    label: str
    quoted: bool = False
    """Whether the block stands in a quotation, each of its lines behind ``>``."""
    glued: bool = False
    """Whether text stands before the fence, so that the code's own indentation says where its first column is."""


class _Scanner:
    """Reads lines, and knows the block they stand in."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.outside: list[str] = []
        self._opening: _Opening | None = None
        self._content: list[str] = []
        self._label = ""

    def read(self, lines: list[str]) -> None:
        """The next lines of a text."""
        until = 0
        for row, line in enumerate(lines):
            if row < until:
                self._content.append(line)
                continue
            if self._opening is not None and self._opening.quoted:
                if not _QUOTE.match(line):  # a quotation ends, and with it its block
                    self._end(closed=False)
                line = _QUOTE.sub("", line, count=1)
            bare = without_controls(line)
            fence = _FENCE.match(bare)
            if self._opening is None:
                self._outside_line(bare, fence)
                continue
            closes = fence is not None and _closes(fence, self._opening)
            reopens = fence is not None and _reopens(fence, self._opening)
            if not (closes or reopens) or (until := _end_of_text(self._opening, self._content, lines, row)):
                self._content.append(line)
            else:
                self._end(closed=closes)
                self._opening = _opened(fence, self._label) if fence and not closes else None

    @property
    def in_block(self) -> bool:
        """Whether a block is open."""
        return self._opening is not None

    @property
    def closing_fence(self) -> str:
        """What would close the block that is open; empty where none is, or its quotation's end does."""
        opening = self._opening
        return "" if opening is None or opening.quoted else opening.mark * opening.length

    def end(self) -> None:
        """The text ends here, and with it a block that is open."""
        self._end(closed=False)

    def _outside_line(self, line: str, fence: re.Match[str] | None) -> None:
        """A line outside all blocks, which may open one, or hold one."""
        self._opening = _opened(fence, self._label) if fence else None
        if self._opening is None and (quoted := _QUOTE.match(line)) and (fence := _FENCE.match(line[quoted.end() :])):
            opening = _opened(fence, self._label)
            self._opening = opening and replace(opening, quoted=True)
        if self._opening is not None:
            return
        if (alone := _SPAN.fullmatch(line.strip())) and _calls(alone["code"].strip()):
            self._add("", alone["code"].strip(), closed=True)
            return
        if (whole := _ONE_LINE.search(line)) and whole["tag"].lower() in _TAGS:
            self._prose(line[: whole.start()])
            self._add(whole["tag"].lower(), whole["code"], closed=True)
            self._prose(line[whole.end() :])
            return
        glued = _GLUED.match(line) if line.count("```") == 1 else None
        if glued is None or not glued["text"].strip(" >") or "`" in glued["text"]:
            self._prose(line)
            return
        self._prose(glued["text"])
        head = _FENCE.match(glued["marks"] + glued["info"])
        assert head is not None
        opening = _opened(head, self._label)
        self._opening = opening and replace(opening, glued=True)

    def _prose(self, line: str) -> None:
        self.outside.append(line)
        if line.strip():
            self._label = line.strip()

    def _end(self, *, closed: bool) -> None:
        """The block that is open, if any, ends here."""
        opening, content = self._opening, self._content
        self._opening, self._content = None, []
        if opening is None:
            return
        if opening.glued:
            column = min((_column(_indent(line)) for line in content if line.strip()), default=0)
            opening = replace(opening, column=column)
        lines = [*([opening.code] if opening.code else []), *(_dedent(line, opening.column) for line in content)]
        cut = _glued_end(lines, opening, closed)
        if cut is None and opening.glued and not (closed or opening.tag or _parses("\n".join(lines))):
            for line in content:  # stray marks behind a line of prose open nothing
                self._prose(line)
            return
        if cut is None:
            self._add(opening.tag, "\n".join(lines), closed=closed, label=opening.label)
            return
        code, rest = cut
        self._add(opening.tag, code, closed=True, label=opening.label)
        for line in rest:
            self._prose(line)

    def _add(self, tag: str, content: str, *, closed: bool, label: str | None = None) -> None:
        label = self._label if label is None else label
        self.blocks.append(Block(tag=tag, content=content, closed=closed, label=label))
        self._label = ""


def split(text: str) -> tuple[list[Block], list[str]]:
    """The blocks of a text in order, and the lines outside all of them (fence lines are in neither).

    Blocks as models write them: a fence may follow text on its line, close behind the last line of code, hold code
    behind its tag, be followed by words or by control tokens, or be forgotten.
    """
    scanner = _Scanner()
    scanner.read(_unwrapped(text.replace("\r\n", "\n").split("\n")))
    scanner.end()
    return scanner.blocks, scanner.outside


def open_fence(text: str) -> str:
    """What closes the block within which a text ends; empty where it ends outside of all."""
    scanner = _Scanner()
    scanner.read(_unwrapped(text.replace("\r\n", "\n").split("\n")))
    return scanner.closing_fence


_MARKDOWN = ("markdown", "md")


def _unwrapped(lines: list[str]) -> list[str]:
    """The lines of an answer that is one block of Markdown, without the block's own fences."""
    filled = [index for index, line in enumerate(lines) if line.strip()]
    fences = [found for line in lines if (found := _FENCE.match(without_controls(line)))]
    if len(fences) < 2 or _FENCE.match(lines[filled[0]]) is None or _FENCE.match(lines[filled[-1]]) is None:
        return lines
    first, second, last = fences[0], fences[1], fences[-1]
    wraps = first["info"].strip().lower() in _MARKDOWN and last["marks"] == first["marks"] and not last["info"].strip()
    nested = len(fences) == 2 or second["marks"] != first["marks"] or bool(second["info"].strip())
    return lines[filled[0] + 1 : filled[-1]] if wraps and nested else lines


def _opened(fence: re.Match[str], label: str) -> _Opening | None:
    marks, info = fence["marks"], fence["info"].strip()
    if marks[0] == "`" and "`" in info:  # an inline code span, by CommonMark
        return None
    word, _, rest = info.partition(" ")
    tag = word.strip("{}.").lower()
    code = rest.strip() if tag in PYTHON and re.search(r"\(|^(?:import|from)\s", rest) and _parses(rest.strip()) else ""
    return _Opening(mark=marks[0], length=len(marks), column=_column(fence["indent"]), tag=tag, code=code, label=label)


def _same_kind(fence: re.Match[str], opening: _Opening) -> bool:
    marks = fence["marks"]
    near = opening.glued or _column(fence["indent"]) <= opening.column + _CLOSING_SLACK
    return marks[0] == opening.mark and len(marks) >= opening.length and near


def _closes(fence: re.Match[str], opening: _Opening) -> bool:
    """A fence with nothing behind it, or with words that are no tag (``` ```Done. ```)."""
    info = fence["info"].strip()
    if not _same_kind(fence, opening):
        return False
    return not info or not (_is_tag(info) or "`" in info)


def _reopens(fence: re.Match[str], opening: _Opening) -> bool:
    tagged = _is_tag(fence["info"].strip())
    return tagged and _same_kind(fence, opening) and len(fence["marks"]) == opening.length


_MOST_FENCES = 8
"""Closing fences after one that are tried, to find whether it stands within a text of the program."""


def _end_of_text(opening: _Opening, content: list[str], lines: list[str], row: int) -> int:
    """Where the block ends whose fence at a row stands within a text in triple quotes; 0 where it does not.

    That is so where the program is none up to this fence, but is up to a later one.
    """
    code = "\n".join(_dedent(line, opening.column) for line in content)
    if opening.quoted or opening.tag not in PYTHON | {""} or not re.search("\"{3}|'{3}", code) or _parses(code):
        return 0
    tried = 0
    for end in range(row + 1, len(lines)):
        fence = _FENCE.match(without_controls(lines[end]))
        if fence is None or not _closes(fence, opening):
            continue
        if _parses("\n".join([code, *(_dedent(line, opening.column) for line in lines[row:end])])):
            return end
        tried += 1
        if tried == _MOST_FENCES:
            break
    return 0


def _is_tag(info: str) -> bool:
    """Whether what stands behind a fence is the tag of a block: a language that is known, or attributes."""
    word = info.split()[0] if info else ""
    return word.strip("{}.").lower() in _TAGS or re.fullmatch(r"\{[^{}]*\}", info) is not None


def _glued_end(lines: list[str], opening: _Opening, closed: bool) -> tuple[str, list[str]] | None:
    """Where a block ends whose closing fence stands behind its last line of code: that code, and the lines after."""
    marks = opening.mark * opening.length
    for index, line in enumerate(lines):
        bare = without_controls(line).rstrip()
        if not bare.endswith(marks) or bare.count(marks) != 1 or not bare[: -len(marks)].strip():
            continue
        code = "\n".join([*lines[:index], bare[: -len(marks)].rstrip()])
        if not closed or (_parses(code) and not _parses("\n".join(lines))):
            return code, lines[index + 1 :]
    return None


def _indent(line: str) -> str:
    return line[: len(line) - len(line.lstrip())]


def _column(indent: str) -> int:
    return len(indent.expandtabs(4))


def _dedent(line: str, columns: int) -> str:
    """The line without its first ``columns`` columns of white space, or without all it has."""
    dropped = 0
    for index, character in enumerate(line):
        if dropped >= columns or character not in " \t":
            return line[index:]
        dropped += 1 if character == " " else 4 - dropped % 4
    return ""


def parsed(code: str) -> ast.Module | None:
    """Python code as a tree; None for what is not Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _parses(code: str) -> bool:
    return parsed(code) is not None


def _calls(code: str) -> bool:
    """Whether code is Python that calls something."""
    tree = parsed(code)
    return tree is not None and any(isinstance(node, ast.Call) for node in ast.walk(tree))
