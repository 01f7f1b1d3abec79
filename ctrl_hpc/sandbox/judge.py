"""Judging: how an output is compared with the expected one, and which status a run earns.

Outputs are bytes. The default compares tokens exactly; everything laxer has a name and is used only where a problem
asks for it. A name may carry options, as in ``float:abs=0.01,nocase``:

* ``abs=E``, ``rel=E``: the absolute and the relative error that numbers may have (``float`` alone: both 1e-6);
* ``nocase``: letters of either case are the same;
* ``any``: several answers are right, so that another than the expected one is ``unsupported``, not wrong.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
import re
import string
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal, DecimalException
from pathlib import Path
from typing import Any

from ctrl_hpc.records import Execution, Limits, TestStatus
from ctrl_hpc.sandbox.inside import plain
from ctrl_hpc.sandbox.jail import Ended, Reason

Comparison = Callable[[bytes, bytes, bytes], bool]
"""``(stdout, expected, stdin) -> accepted``."""

_NONE: Mapping[str, Comparison] = {}

_FLOAT_TOLERANCE = 1e-6
"""Absolute or relative, whichever is wider, as in DMOJ's and testlib's float checkers."""
_ROUNDING = 1e-15
"""As testlib's, so that 1.51 is within 0.01 of 1.5."""
_FUSION_TOLERANCE = 1e-5
_XFSZ, _XCPU = 25, 24
MOST_OUTPUT_BYTES = 1 << 30
_NUMBER = re.compile(rb"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?|inf(?:inity)?)", re.IGNORECASE)
_INTEGER = re.compile(rb"[+-]?[0-9]+")
_WHOLE = re.compile(rb"[+-]?[0-9]+\.0*")
_ROUNDED = 1e12
"""From here on sums of doubles may err by one."""


def exact(stdout: bytes, expected: bytes, stdin: bytes = b"") -> bool:
    """The same tokens, byte for byte; ASCII whitespace separates tokens and how much of it does not matter."""
    return stdout.split() == expected.split()


def lines(stdout: bytes, expected: bytes, stdin: bytes = b"") -> bool:
    """The same lines, but for whitespace at their ends and empty lines at the end."""
    return _stripped_lines(stdout) == _stripped_lines(expected)


def _stripped_lines(text: bytes) -> list[bytes]:
    return [line.rstrip() for line in text.rstrip().split(b"\n")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """How far a number may be from the expected one: by either bound."""

    absolute: float = _FLOAT_TOLERANCE
    relative: float = _FLOAT_TOLERANCE
    rounding: float = 0.0
    """What the subtraction itself may err, of numbers near 1."""

    @property
    def is_for_rounding(self) -> bool:
        """Whether it forgives what arithmetic errs, and not an estimate."""
        return max(self.absolute, self.relative) <= _FLOAT_TOLERANCE

    def allows(self, value: float, expected: float) -> bool:
        """Whether two numbers are close; infinities only equal themselves, and not a number nothing."""
        if not (math.isfinite(value) and math.isfinite(expected)):
            return value == expected
        size = abs(expected)
        return abs(value - expected) <= max(self.absolute, self.relative * size) + self.rounding * max(1.0, size)


def floating(
    stdout: bytes, expected: bytes, stdin: bytes = b"", tolerance: Tolerance = Tolerance(), nocase: bool = False
) -> bool:
    """Like :func:`exact`, but numbers may differ by a tolerance, and integers be written as ``2.0``.

    Two integers must be the same: a count is not measured. So must a whole number written as ``2.0`` and an expected
    integer, where no rounding of doubles is as large as one and the tolerance is one for rounding.
    """
    ours, theirs = _tokens(stdout, nocase), _tokens(expected, nocase)
    return len(ours) == len(theirs) and all(_close_tokens(*pair, tolerance) for pair in zip(ours, theirs, strict=True))


def _tokens(text: bytes, nocase: bool) -> list[bytes]:
    return text.lower().split() if nocase else text.split()


def _close_tokens(token: bytes, expected: bytes, tolerance: Tolerance) -> bool:
    if token == expected:
        return True
    if not (_NUMBER.fullmatch(expected) and _NUMBER.fullmatch(token)):
        return False
    if _INTEGER.fullmatch(token) and _INTEGER.fullmatch(expected):
        return _same_decimals(token.decode(), expected.decode())
    value, target = float(token), float(expected)
    if tolerance.is_for_rounding and _counts(token, expected, target):
        return value == target
    if math.isinf(value) and math.isinf(target):  # infinite as written, or too large for a float
        return _same_decimals(token.decode(), expected.decode())
    return tolerance.allows(value, target)


def _counts(token: bytes, expected: bytes, target: float) -> bool:
    """Whether an integer is expected, and a whole number printed with decimals."""
    return abs(target) < _ROUNDED and _INTEGER.fullmatch(expected) is not None and _WHOLE.fullmatch(token) is not None


def _same_decimals(line: str, expected: str) -> bool:
    """Whether two lines are the same numbers, as exact decimals."""
    try:
        return [Decimal(token) for token in line.split()] == [Decimal(token) for token in expected.split()]
    except DecimalException:
        return False


def sandbox_fusion(stdout: bytes, expected: bytes, stdin: bytes = b"") -> bool:
    """SandboxFusion's rule, for compatibility only: line by line, case ignored, numbers within a relative 1e-5.

    It accepts 1000000000 for 1000000007 and ``1_2`` for 12, and rejects ``1.00 2.00`` for ``1.0 2.0``.
    """
    ours, theirs = _fusion_lines(stdout), _fusion_lines(expected)
    return len(ours) == len(theirs) and all(map(_fusion_equal, ours, theirs))


def _fusion_lines(text: bytes) -> list[str]:
    return [line.lower().strip() for line in text.decode("utf-8", "replace").strip().split("\n")]


def _fusion_equal(line: str, expected: str) -> bool:
    if line == expected:
        return True
    try:
        value, target = float(line), float(expected)
    except ValueError:
        return False
    return abs(value - target) / max(abs(target), 1e-10) < _FUSION_TOLERANCE


def livecodebench(stdout: bytes, expected: bytes, stdin: bytes = b"") -> bool:
    """LiveCodeBench's rule: line by line without surrounding whitespace, or the same numbers as exact decimals.

    Numbers are what :class:`decimal.Decimal` reads: ``1_2``, ``Infinity`` and other scripts' digits are; as there, no
    error is allowed, whatever a statement says.
    """
    ours, theirs = _text_lines(stdout), _text_lines(expected)
    pairs = zip(ours, theirs, strict=False)
    return len(ours) == len(theirs) and all(line == target or _same_decimals(line, target) for line, target in pairs)


def _text_lines(text: bytes) -> list[str]:
    return [line.strip() for line in _text(text).strip().split("\n")]


def _text(text: bytes) -> str:
    return text.decode("utf-8", "surrogateescape")


def taco(stdout: bytes, expected: bytes, stdin: bytes = b"") -> bool:
    """TACO's own rule: the same text but for whitespace around it; where it is not, sets of characters decide.

    The second part, which comes of an earlier form of its code, accepts ``21`` for ``1 2`` and ``2 1`` for lines 1 and
    2. As published; problems of TACO are judged by it only where a configuration asks for it.
    """
    ours, theirs = _text(stdout), _text(expected)
    if ours.strip() == theirs.strip():
        return True
    lines = [line.strip() for line in theirs.split("\n") if line]
    if _close_characters(ours, lines):
        return True
    tokens = [set(token) for token in ours.split()]
    rows = [set(line.split()) for line in lines]
    return _same_sets(tokens, rows, str) or _same_sets(tokens, rows, lambda text: round(float(text), 3))


def _close_characters(text: str, lines: list[str]) -> bool:
    """numpy's ``allclose`` of the characters of a text and the lines of another, all of them numbers."""
    try:
        values, targets = list(map(float, text)), list(map(float, lines))
    except ValueError:
        return False
    return len(values) == len(targets) and all(
        abs(value - target) <= 1e-8 + 1e-5 * abs(target) < math.inf or value == target
        for value, target in zip(values, targets, strict=True)
    )


def _same_sets(ours: list[set[str]], theirs: list[set[str]], read: Callable[[str], Any]) -> bool:
    try:
        found, wanted = ({frozenset(map(read, row)) for row in rows} for rows in (ours, theirs))
    except (ValueError, OverflowError):
        return False
    return found == wanted


COMPARISONS: dict[str, Comparison] = {
    "exact": exact,
    "float": floating,
    "lines": lines,
    "livecodebench": livecodebench,
    "sandbox_fusion": sandbox_fusion,
    "taco": taco,
}
"""Comparison modes by name; a sandbox may have special judges beside them (``ctrl_hpc.sandbox.judge``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A comparison with its options."""

    compare: Comparison
    values: str
    """How the results of function tests are compared: a name of :data:`_VALUE_RULES`."""
    tolerance: Tolerance = Tolerance()
    nocase: bool = False
    """Letters of either case are the same, in what is returned too."""
    several_answers: bool = False
    """Another answer than the expected one may be right."""


_OPTIONS = "nocase, any, and with float abs=ERROR, rel=ERROR"


def rule(name: str, special: Mapping[str, Comparison] = _NONE) -> Rule:
    """What a comparison's name, with its options, or a special judge's says; ValueError lists what there is."""
    if name in special:
        return Rule(compare=special[name], values="float")
    mode, _, text = name.partition(":")
    if mode not in COMPARISONS:
        raise ValueError(f"comparison: {name!r} is not one of {', '.join([*COMPARISONS, *special])}")
    return _rule(mode, text)


@functools.cache
def _rule(mode: str, text: str) -> Rule:
    flags, bounds = set[str](), dict[str, float]()
    for option in filter(None, text.split(",")):
        key, equals, number = option.partition("=")
        if equals and key in ("abs", "rel") and mode == "float" and _NUMBER.fullmatch(number.encode()):
            bounds[key] = float(number)
        elif option == "any" or (option == "nocase" and mode in ("exact", "float")):
            flags.add(option)
        else:
            raise ValueError(f"comparison: {option!r} is not an option of {mode}; allowed: {_OPTIONS}")
    tolerance = Tolerance()
    if bounds:
        tolerance = Tolerance(absolute=bounds.get("abs", 0.0), relative=bounds.get("rel", 0.0), rounding=_ROUNDING)
    nocase = "nocase" in flags
    compare = COMPARISONS[mode]
    if mode == "float":
        compare = functools.partial(floating, tolerance=tolerance, nocase=nocase)
    elif nocase:
        compare = _without_case
    values = mode if mode in _VALUE_RULES else "exact"
    return Rule(compare=compare, values=values, tolerance=tolerance, nocase=nocase, several_answers="any" in flags)


def _without_case(stdout: bytes, expected: bytes, stdin: bytes = b"") -> bool:
    return exact(stdout.lower(), expected.lower())


def comparison(name: str, special: Mapping[str, Comparison] = _NONE) -> Comparison:
    """The comparison, or special judge, of that name; ValueError lists the names there are."""
    return rule(name, special).compare


_LONGEST_S = 86400 * 365


def check(execution: Execution, special: Mapping[str, Comparison] = _NONE) -> None:
    """ValueError names the comparison that there is not, or the limit that is out of range."""
    rule(execution.comparison, special)
    for name, low, high in (
        ("cpu_s", 0.001, 86400),
        ("wall_s", 1e-6, 86400),
        ("memory_mb", 1, 1 << 20),
        ("output_bytes", 0, MOST_OUTPUT_BYTES),
        ("processes", 1, 4096),
    ):
        value = getattr(execution.limits, name)
        if not low <= value <= high:
            raise ValueError(f"limits.{name}: {value} is not in [{low}, {high}]")
    for name in ("compile_timeout_s", "time_budget_s"):
        value = getattr(execution, name)
        if value is not None and not value <= _LONGEST_S:
            raise ValueError(f"{name}: {value} is more than {_LONGEST_S}")


def failure(ended: Ended, output_bytes: int, limits: Limits) -> TestStatus | None:
    """Why a run failed, whatever it printed: output before time before memory before runtime error; None if it did not.

    ``output_bytes`` is the larger of its stdout and stderr.
    """
    if output_bytes > limits.output_bytes or ended.signal == _XFSZ:
        return "output_limit"
    if ended.reason in (Reason.CPU_LIMIT, Reason.WALL_LIMIT) or ended.signal == _XCPU:
        return "time_limit"
    if ended.out_of_memory or ended.peak_memory_mb > limits.memory_mb:
        return "memory_limit"
    if ended.signal is not None or ended.exit_code != 0:
        return "runtime_error"
    return None


_VALUE_RULES = ("exact", "float", "livecodebench", "taco")
"""How the results of function tests are compared: by ``==``, where a tuple is a list, as JSON cannot say tuple;
``float`` with a tolerance; the benchmarks' own take the outermost tuple alone for a list (TACO: and those in it)."""


def same_result(data: Any, expected: Any, rule: Rule) -> bool:
    """Whether encoded plain data that a solution returned is the expected result, by a rule."""
    if rule.values == "livecodebench":
        return same_value(_as_list(data), expected, tuples_are_lists=False)
    if rule.values == "taco":
        data = _as_list(data)
        rows = isinstance(data, list) and bool(data) and _as_list(data[0]) is not data[0]
        again = list(map(_as_list, data)) if rows else data
        return (
            same_value(data, expected, tuples_are_lists=False)
            or same_value(data, [expected], tuples_are_lists=False)
            or same_value(again, expected, tuples_are_lists=False)
        )
    if rule.nocase:
        data, expected = _lower(data, keys=False), _lower(expected, keys=True)
    return same_value(data, expected, rule.tolerance if rule.values == "float" else False)


def _lower(value: Any, *, keys: bool) -> Any:
    """Data with its texts in lower case, those of ASCII; of encoded data without the keys, which name kinds."""
    if isinstance(value, str):
        return value.translate(_LOWER)
    if isinstance(value, (list, tuple)):
        return type(value)(_lower(item, keys=keys) for item in value)
    if not isinstance(value, dict):
        return value
    return {_lower(key, keys=keys) if keys else key: _lower(item, keys=keys) for key, item in value.items()}


_LOWER = {ord(letter): letter.lower() for letter in string.ascii_uppercase}


def _as_list(data: Any) -> Any:
    return data["tuple"] if isinstance(data, dict) and set(data) == {"tuple"} else data


def same_value(data: Any, expected: Any, tolerant: Tolerance | bool = False, *, tuples_are_lists: bool = True) -> bool:
    """Whether encoded plain data (see ``inside/plain.py``) from a solution equals ``expected``, as ``==`` would say.

    Walks along ``expected``, so that hostile data costs no more than the expected value is large. With
    ``tuples_are_lists`` a returned tuple equals an expected list, as the usual JSON test files cannot say tuple.
    ``tolerant`` allows an error where a float is expected, True the default one.
    """
    tolerance = (Tolerance() if tolerant else None) if isinstance(tolerant, bool) else tolerant
    how = (tolerance, tuples_are_lists)
    if isinstance(expected, list):
        return _same_items(_as_list(data) if tuples_are_lists else data, expected, *how)
    if isinstance(expected, tuple):
        return isinstance(data, dict) and set(data) == {"tuple"} and _same_items(data["tuple"], expected, *how)
    if isinstance(expected, deque):
        return isinstance(data, dict) and set(data) == {"deque"} and _same_items(data["deque"], expected, *how)
    if isinstance(expected, dict):
        return _same_dict(data, expected, *how)
    if isinstance(expected, (set, frozenset)):
        body = next(iter(data.values())) if isinstance(data, dict) and set(data) in ({"set"}, {"frozenset"}) else None
        return isinstance(body, list) and len(body) == len(expected) and _same_members(body, expected)
    if isinstance(data, list) or (isinstance(data, dict) and not set(data) <= _SCALARS):
        return False
    value: Any = plain.decode(data)
    if tolerance is not None and isinstance(expected, float) and type(value) in (int, float):
        return _close_numbers(value, expected, tolerance)
    return bool(value == expected)


def _close_numbers(value: float, expected: float, tolerance: Tolerance) -> bool:
    try:
        return tolerance.allows(float(value), float(expected))
    except OverflowError:  # an integer beyond all floats
        return value == expected


def _same_items(items: Any, expected: Any, tolerant: Tolerance | None, tuples_are_lists: bool) -> bool:
    return (
        isinstance(items, list)
        and len(items) == len(expected)
        and all(
            same_value(item, target, tolerant or False, tuples_are_lists=tuples_are_lists)
            for item, target in zip(items, expected, strict=True)
        )
    )


def _same_dict(data: Any, expected: dict[Any, Any], tolerant: Tolerance | None, tuples_are_lists: bool) -> bool:
    body = data["dict"] if isinstance(data, dict) and set(data) == {"dict"} else None
    if not isinstance(body, list) or len(body) != len(expected):
        return False
    remaining, largest = set(expected), _largest_set(expected)
    for pair in body:
        if not (isinstance(pair, list) and len(pair) == 2 and _fits(pair[0], largest)):
            return False
        key = plain.decode(pair[0])
        if key not in remaining or not same_value(
            pair[1], expected[key], tolerant or False, tuples_are_lists=tuples_are_lists
        ):
            return False
        remaining.remove(key)
    return True


def _same_members(body: list[Any], expected: set[Any] | frozenset[Any]) -> bool:
    remaining, largest = set(expected), _largest_set(expected)
    for item in body:
        if not _fits(item, largest):
            return False
        member = plain.decode(item)
        if member not in remaining:
            return False
        remaining.remove(member)
    return True


def _largest_set(members: Iterable[Any]) -> int:
    """How many members the largest set has that is nested in members of a set, or in keys."""
    inner = [item for item in members if isinstance(item, (tuple, frozenset))]
    return max((max(len(item) * isinstance(item, frozenset), _largest_set(item)) for item in inner), default=0)


def _fits(data: Any, largest: int) -> bool:
    """Whether a member can be made at little cost: sets of numbers whose hashes collide take the square of their size.

    Only tags of hashable data fit, and sets that are not larger than ``largest``.
    """
    if isinstance(data, dict):
        ((tag, body),) = data.items() if len(data) == 1 else [("", None)]
        if tag in _SCALARS:
            return True
        if tag not in ("tuple", "frozenset") or not isinstance(body, list):
            return False
        return (tag == "tuple" or len(body) <= largest) and all(_fits(item, largest) for item in body)
    return not isinstance(data, list)


_SCALARS = frozenset({"int", "numpy_bool", "complex", "bytes", "bytearray", "range", "Decimal", "Fraction"})
"""Tags of plain data that hold no collections."""


def load(places: Mapping[str, str]) -> dict[str, Comparison]:
    """The judges by name, from their places; ValueError says which of them cannot be had and why."""
    return {name: _load(name, place) for name, place in places.items()}


def _load(name: str, place: str) -> Comparison:
    from ctrl_hpc.config.functions import read_function

    file, _, function = place.rpartition(":")
    if not name.isidentifier() or not function.isidentifier() or not file.endswith(".py"):
        raise ValueError(f"judge {name}: {place!r} is not FILE.py:FUNCTION")
    if name in COMPARISONS:
        raise ValueError(f"judge: {name} is a comparison already")
    path = Path(file).absolute()
    if not path.is_file():
        raise ValueError(f"judge {name}: there is no file {path}")
    return read_function(f"judge {name}", f"{path}:{function}")


def digest(judges: Mapping[str, Comparison]) -> str:
    """A hash of the judges' names and files, which verdicts depend on. Raises ValueError where a source is unknown."""
    total = hashlib.sha256()
    for name, compare in sorted(judges.items()):
        try:
            source = Path(inspect.getsourcefile(compare) or "").read_bytes()
        except (TypeError, OSError):
            raise ValueError(f"judge {name}: verdicts of a function without a source file cannot be cached") from None
        total.update(f"{name}={compare.__qualname__}:{len(source)}\n".encode() + source)
    return total.hexdigest()
