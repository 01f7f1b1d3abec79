"""The operations of the tiny world and what they mean: a problem is one operation a slot, applied in order.

Every operation has a *partner*, the one it is easily confused with. A composition is a tuple of four indices into
:data:`SLOTS`, for example ``(0, 3, 1, 5)``. The meaning (``apply``) and the Python text (``code``) of an operation are
written separately, so that each checks the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Composition = tuple[int, int, int, int]
Line = tuple[int, ...]

_OPENING = "For each line of integers:"
_CLOSING = " print it."
_HEADER = "for line in open(0):\n    x = [int(v) for v in line.split()]"
_FOOTER = "    print(r)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One step of a problem."""

    phrase: str
    """What the problem asks for, in words."""
    code: str
    """One line of Python: on the list ``x`` in the first two slots, on the number ``r`` in the last two."""
    apply: Callable[[Any, int], Any]
    """Its meaning: (list or number, count of numbers on the line) to list or number."""
    tricky: bool = False
    """Whether it depends on order or on several elements at once; counts towards the problem's difficulty."""


def _operation(phrase: str, code: str, apply: Callable[[Any, int], Any], tricky: bool = False) -> Operation:
    return Operation(phrase=phrase, code=code, apply=apply, tricky=tricky)


def _keep(phrase: str, condition: str, test: Callable[[int], bool]) -> Operation:
    return _operation(phrase, f"x = [v for v in x if {condition}]", lambda x, n: [v for v in x if test(v)])


def _map(phrase: str, expression: str, function: Callable[[int], int]) -> Operation:
    return _operation(phrase, f"x = [{expression} for v in x]", lambda x, n: [function(v) for v in x])


def _alternating(x: Sequence[int], n: int) -> int:
    return sum(value if index % 2 == 0 else -value for index, value in enumerate(x))


_FILTERS = (
    _keep("keep the even ones", "v % 2 == 0", lambda v: not v & 1),
    _keep("keep the odd ones", "v % 2 == 1", lambda v: bool(v & 1)),
    _keep("keep the positive ones", "v > 0", lambda v: v >= 1),
    _keep("keep the negative ones", "v < 0", lambda v: v <= -1),
    _keep("keep those above five", "v > 5", lambda v: v >= 6),
    _keep("keep those below five", "v < 5", lambda v: v <= 4),
    _keep("keep multiples of three", "v % 3 == 0", lambda v: divmod(v, 3)[1] == 0),
    _keep("drop multiples of three", "v % 3 != 0", lambda v: divmod(v, 3)[1] in (1, 2)),
    _operation("take every second one", "x = x[::2]", lambda x, n: [v for i, v in enumerate(x) if i % 2 == 0], True),
    _operation("skip every second one", "x = x[1::2]", lambda x, n: [v for i, v in enumerate(x) if i % 2 == 1], True),
    _operation("leave out the first", "x = x[1:]", lambda x, n: [v for i, v in enumerate(x) if i != 0], True),
    _operation("leave out the last", "x = x[:-1]", lambda x, n: [v for i, v in enumerate(x) if i != len(x) - 1], True),
)
MAPS = (
    _map("square each", "v * v", lambda v: v**2),
    _map("cube each", "v ** 3", lambda v: v * v * v),
    _map("double each", "v * 2", lambda v: v + v),
    _map("halve each", "v // 2", lambda v: v >> 1),
    _map("make each absolute", "abs(v)", lambda v: v if v >= 0 else -v),
    _map("negate each", "-v", lambda v: 0 - v),
    _map("add three to each", "v + 3", lambda v: v - -3),
    _map("take three from each", "v - 3", lambda v: v + -3),
    _map("keep the last digit", "abs(v) % 10", lambda v: int(str(v)[-1])),
    _map("drop the last digit", "abs(v) // 10", lambda v: int(str(abs(v))[:-1] or "0")),
)
_TOTALS = (
    _operation("sum up", "r = sum(x)", lambda x, n: sum(x)),
    _operation("sum with alternating signs", "r = sum(x[::2]) - sum(x[1::2])", _alternating, True),
    _operation("find the largest", "r = max(x, default=0)", lambda x, n: sorted(x)[-1] if x else 0),
    _operation("find the smallest", "r = min(x, default=0)", lambda x, n: sorted(x)[0] if x else 0),
    _operation(
        "largest less smallest",
        "r = max(x, default=0) - min(x, default=0)",
        lambda x, n: sorted(x)[-1] - sorted(x)[0] if x else 0,
        True,
    ),
    _operation(
        "largest plus smallest",
        "r = max(x, default=0) + min(x, default=0)",
        lambda x, n: sorted(x)[-1] + sorted(x)[0] if x else 0,
        True,
    ),
    _operation("sum the two largest", "r = sum(sorted(x)[-2:])", lambda x, n: sum(sorted(x, reverse=True)[:2]), True),
    _operation("sum the two smallest", "r = sum(sorted(x)[:2])", lambda x, n: sum(sorted(x, reverse=True)[-2:]), True),
    _operation("count different values", "r = len(set(x))", lambda x, n: len(dict.fromkeys(x))),
    _operation("sum different values", "r = sum(set(x))", lambda x, n: sum(dict.fromkeys(x))),
)
_FINALS = (
    _operation("add one", "r = r + 1", lambda r, n: r - -1),
    _operation("take one", "r = r - 1", lambda r, n: r + -1),
    _operation("double it", "r = r * 2", lambda r, n: r + r),
    _operation("square it", "r = r * r", lambda r, n: r**2),
    _operation("make it absolute", "r = abs(r)", lambda r, n: max(r, -r)),
    _operation("negate it", "r = -r", lambda r, n: 0 - r),
    _operation("take it modulo seven", "r = r % 7", lambda r, n: divmod(r, 7)[1]),
    _operation("take it modulo nine", "r = r % 9", lambda r, n: divmod(r, 9)[1]),
    _operation("add the line's length", "r = r + len(line.split())", lambda r, n: n + r, True),
    _operation("take the line's length", "r = r - len(line.split())", lambda r, n: -(n - r), True),
)
SLOTS: tuple[tuple[Operation, ...], ...] = (_FILTERS, MAPS, _TOTALS, _FINALS)
"""The four slots; the partner of operation ``i`` is operation ``i ^ 1`` of the same slot."""
SIZES = tuple(len(slot) for slot in SLOTS)


def partner(operation: int) -> int:
    """The operation that this one is confused with."""
    return operation ^ 1


def phrases(composition: Sequence[int]) -> list[str]:
    """The four phrases of a composition."""
    return [slot[index].phrase for slot, index in zip(SLOTS, composition, strict=True)]


def prompt(composition: Sequence[int]) -> str:
    """The problem's statement: ``For each line of integers: PHRASE; PHRASE; PHRASE; PHRASE; print it.``"""
    return _OPENING + "".join(f" {phrase};" for phrase in phrases(composition)) + _CLOSING


def program(composition: Sequence[int]) -> str:
    """The Python program that does the four steps for each line of its standard input."""
    lines = [f"    {slot[index].code}" for slot, index in zip(SLOTS, composition, strict=True)]
    return "\n".join([_HEADER, *lines, _FOOTER])


def parse(text: str) -> Composition | None:
    """The composition whose program this text is, or None when it is no program of the grammar."""
    lines = text.strip("\n").split("\n")
    head = _HEADER.split("\n")
    if len(lines) != len(head) + len(SLOTS) + 1 or lines[: len(head)] != head or lines[-1] != _FOOTER:
        return None
    found = []
    for slot, line in zip(SLOTS, lines[len(head) : -1], strict=True):
        matches = [index for index, operation in enumerate(slot) if f"    {operation.code}" == line]
        if not matches:
            return None
        found.append(matches[0])
    return found[0], found[1], found[2], found[3]


def run(composition: Sequence[int], stdin: str) -> str:
    """What a composition prints for its standard input, by the meaning of its operations."""
    printed = []
    for line in stdin.splitlines():
        value: Any = [int(word) for word in line.split()]
        n = len(value)
        for slot, index in zip(SLOTS, composition, strict=True):
            value = slot[index].apply(value, n)
        printed.append(f"{value}\n")
    return "".join(printed)


def answers(lines: Sequence[Line]) -> npt.NDArray[np.int64]:
    """What every composition prints for every line: ``answers_FMTEL[f, m, t, e, l]`` with ``l`` the line."""
    answers_FMTEL = np.empty((*SIZES, len(lines)), dtype=np.int64)
    for number, line in enumerate(lines):
        n = len(line)
        for f, filter_ in enumerate(_FILTERS):
            kept = filter_.apply(list(line), n)
            for m, map_ in enumerate(MAPS):
                mapped = map_.apply(kept, n)
                for t, total in enumerate(_TOTALS):
                    value = total.apply(mapped, n)
                    for e, final in enumerate(_FINALS):
                        answers_FMTEL[f, m, t, e, number] = final.apply(value, n)
    return answers_FMTEL
