"""Judging: how an output is compared with the expected one, and which status a run earns.

Outputs are bytes. The default compares tokens exactly; everything laxer has a name and is used only where a problem
asks for it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from ctrl_hpc.records import Execution, Limits, TestStatus
from ctrl_hpc.sandbox.inside import plain
from ctrl_hpc.sandbox.jail import Ended, Reason

Comparison = Callable[[bytes, bytes, bytes], bool]
"""``(stdout, expected, stdin) -> accepted``."""

_NONE: Mapping[str, Comparison] = {}

FLOAT_TOLERANCE = 1e-6
"""Absolute or relative, whichever is wider, as in DMOJ's and testlib's float checkers."""
_FUSION_TOLERANCE = 1e-5
_XFSZ, _XCPU = 25, 24
_FLOAT = re.compile(rb"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")


def exact(stdout: bytes, expected: bytes, stdin: bytes = b"") -> bool:
    """The same tokens, byte for byte; ASCII whitespace separates tokens and how much of it does not matter."""
    return stdout.split() == expected.split()


def lines(stdout: bytes, expected: bytes, stdin: bytes = b"") -> bool:
    """The same lines, but for whitespace at their ends and empty lines at the end."""
    return _stripped_lines(stdout) == _stripped_lines(expected)


def _stripped_lines(text: bytes) -> list[bytes]:
    return [line.rstrip() for line in text.rstrip().split(b"\n")]


def floating(stdout: bytes, expected: bytes, stdin: bytes = b"") -> bool:
    """Like :func:`exact`, but a token expected with a ``.`` or an exponent may differ by :data:`FLOAT_TOLERANCE`."""
    ours, theirs = stdout.split(), expected.split()
    return len(ours) == len(theirs) and all(map(_close_tokens, ours, theirs))


def _close_tokens(token: bytes, expected: bytes) -> bool:
    if token == expected:
        return True
    if not (set(expected) & set(b".eE") and _FLOAT.fullmatch(expected) and _FLOAT.fullmatch(token)):
        return False
    return close(float(token), float(expected))


def close(value: float, expected: float) -> bool:
    """Whether two finite numbers differ by at most :data:`FLOAT_TOLERANCE`, absolute or relative."""
    if not (math.isfinite(value) and math.isfinite(expected)):
        return value == expected
    return abs(value - expected) <= FLOAT_TOLERANCE * max(1.0, abs(expected))


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
    """LiveCodeBench's rule: line by line without surrounding whitespace, or the same numbers as exact decimals."""
    ours = [line.strip() for line in stdout.strip().split(b"\n")]
    theirs = [line.strip() for line in expected.strip().split(b"\n")]
    return len(ours) == len(theirs) and all(map(_same_decimals, ours, theirs))


def _same_decimals(line: bytes, expected: bytes) -> bool:
    if line == expected:
        return True
    tokens, targets = line.split(), expected.split()
    if len(tokens) != len(targets) or not all(map(_FLOAT.fullmatch, [*tokens, *targets])):
        return False
    try:
        return all(Decimal(a.decode()) == Decimal(b.decode()) for a, b in zip(tokens, targets, strict=True))
    except InvalidOperation:  # an exponent that no decimal can have
        return False


COMPARISONS: dict[str, Comparison] = {
    "exact": exact,
    "float": floating,
    "lines": lines,
    "livecodebench": livecodebench,
    "sandbox_fusion": sandbox_fusion,
}
"""Comparison modes by name; a sandbox may have special judges beside them (``ctrl_hpc.sandbox.judge``)."""


def comparison(name: str, special: Mapping[str, Comparison] = _NONE) -> Comparison:
    """The comparison, or special judge, of that name; ValueError lists the names there are."""
    found = COMPARISONS.get(name) or special.get(name)
    if found is None:
        raise ValueError(f"comparison: {name!r} is not one of {', '.join([*COMPARISONS, *special])}")
    return found


def check(execution: Execution, special: Mapping[str, Comparison] = _NONE) -> None:
    """ValueError names the comparison that there is not, or the limit that is out of range."""
    comparison(execution.comparison, special)
    for name, low, high in (
        ("cpu_s", 0.001, 86400),
        ("wall_s", 0.001, 86400),
        ("memory_mb", 1, 1 << 20),
        ("output_bytes", 0, 1 << 30),
        ("processes", 1, 4096),
    ):
        value = getattr(execution.limits, name)
        if not low <= value <= high:
            raise ValueError(f"limits.{name}: {value} is not in [{low}, {high}]")


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


def same_value(data: Any, expected: Any, tolerant: bool) -> bool:
    """Whether encoded plain data (see ``inside/plain.py``) from a solution equals ``expected``, as ``==`` would say.

    Walks along ``expected``, so that hostile data costs no more than the expected value is large. A returned tuple
    equals an expected list, as the usual JSON test files cannot say tuple. ``tolerant`` allows :data:`FLOAT_TOLERANCE`
    on floats.
    """
    if isinstance(expected, list):
        items = data["tuple"] if isinstance(data, dict) and set(data) == {"tuple"} else data
        return _same_items(items, expected, tolerant)
    if isinstance(expected, tuple):
        return isinstance(data, dict) and set(data) == {"tuple"} and _same_items(data["tuple"], expected, tolerant)
    if isinstance(expected, deque):
        return isinstance(data, dict) and set(data) == {"deque"} and _same_items(data["deque"], expected, tolerant)
    if isinstance(expected, dict):
        return _same_dict(data, expected, tolerant)
    if isinstance(expected, (set, frozenset)):
        body = next(iter(data.values())) if isinstance(data, dict) and set(data) in ({"set"}, {"frozenset"}) else None
        return isinstance(body, list) and len(body) == len(expected) and _same_members(body, expected)
    if isinstance(data, list) or (isinstance(data, dict) and not set(data) <= _SCALARS):
        return False
    value = plain.decode(data)
    if tolerant and isinstance(expected, float) and isinstance(value, (int, float)):
        return close(float(value), expected)
    return bool(value == expected)


def _same_items(items: Any, expected: Any, tolerant: bool) -> bool:
    return (
        isinstance(items, list)
        and len(items) == len(expected)
        and all(same_value(item, target, tolerant) for item, target in zip(items, expected, strict=True))
    )


def _same_dict(data: Any, expected: dict[Any, Any], tolerant: bool) -> bool:
    body = data["dict"] if isinstance(data, dict) and set(data) == {"dict"} else None
    if not isinstance(body, list) or len(body) != len(expected):
        return False
    remaining, largest = set(expected), _largest_set(expected)
    for pair in body:
        if not (isinstance(pair, list) and len(pair) == 2 and _fits(pair[0], largest)):
            return False
        key = plain.decode(pair[0])
        if key not in remaining or not same_value(pair[1], expected[key], tolerant):
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


_SCALARS = frozenset({"int", "complex", "bytes", "bytearray", "range", "Decimal", "Fraction"})
"""Tags of plain data that hold no collections."""


def load(places: Mapping[str, str]) -> dict[str, Comparison]:
    """The judges by name, from their places; ValueError says which of them cannot be had and why."""
    return {name: _load(name, place) for name, place in places.items()}


def _load(name: str, place: str) -> Comparison:
    file, _, function = place.rpartition(":")
    if not name.isidentifier() or not function.isidentifier() or not file.endswith(".py"):
        raise ValueError(f"judge {name}: {place!r} is not FILE.py:FUNCTION")
    if name in COMPARISONS:
        raise ValueError(f"judge: {name} is a comparison already")
    path = Path(file).absolute()
    if not path.is_file():
        raise ValueError(f"judge {name}: there is no file {path}")
    found = importlib.util.spec_from_file_location(f"ctrl_hpc_judge_{name}", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"judge {name}: {path} fails: {type(error).__name__}: {error}") from error
    compare = getattr(module, function, None)
    if not callable(compare):
        raise ValueError(f"judge {name}: {path} defines no function {function}")
    return compare  # type: ignore[no-any-return]


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
