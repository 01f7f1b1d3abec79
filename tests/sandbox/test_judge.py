"""Comparison of outputs and values, and the order in which a run's failures are told."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctrl_hpc.records import Execution, Limits
from ctrl_hpc.sandbox import judge
from ctrl_hpc.sandbox.inside import plain
from ctrl_hpc.sandbox.jail import Ended, Reason

EXAMPLES = settings(max_examples=200, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
CASES = [
    # stdout, expected, then whether: exact, float, lines, livecodebench, sandbox_fusion
    (b"1 2\n", b"1 2\n", "yyyyy"),
    (b"1  2", b"1 2\n", "yynyn"),
    (b"1\n2\n", b"1 2\n", "yynnn"),
    (b"1 2 \n\n", b"1 2\n", "yyyyy"),
    (b"1 2\r\n", b"1 2\n", "yyyyy"),
    (b" 1 2\n", b"1 2\n", "yynyy"),
    (b"", b"\n", "yyyyy"),
    (b"", b"0\n", "nnnnn"),
    (b"1000000000", b"1000000007", "nnnny"),
    (b"100001", b"100000", "nnnnn"),
    (b"1.0", b"1", "nynyy"),
    (b"1", b"1.0", "nynyy"),
    (b"0.3333333", b"0.33333333", "nynny"),
    (b"0.333", b"0.333333", "nnnnn"),
    (b"1000000.5", b"1000000.0", "nynny"),
    (b"1000000008.0", b"1000000007", "nnnny"),
    (b"1000000007.0", b"1000000007", "nynyy"),
    (b"1000000007.5", b"1000000007", "nynny"),
    (b"1000000008", b"1000000007.0", "nynny"),
    (b"3000000000001.0", b"3000000000000", "nynny"),
    (b"-0.0", b"0", "nynyy"),
    (b"1e-17", b"0", "nynny"),
    (b"1e-17", b"0.0", "nynny"),
    (b"1_2", b"12", "nnnyy"),
    (b"1_2.0", b"12.0", "nnnyy"),
    (b"nan", b"nan", "yyyyy"),
    (b"nan", b"1.5", "nnnnn"),
    (b"1e999", b"2e999", "nnnnn"),
    (b"1e999", b"10e998", "nynyn"),
    (b"Infinity", b"inf", "nynyn"),
    (b"-inf", b"inf", "nnnnn"),
    (b"inf", b"5.0", "nnnnn"),
    (b"2.0000001", b"2", "nynny"),
    (b"+2", b"2", "nynyy"),
    (b"inf", b"1.5e308", "nnnnn"),
    (b"YES", b"Yes", "nnnny"),
    ("\uff11\uff12".encode(), b"12", "nnnyy"),
    ("1\u00a02".encode(), b"1 2", "nnnyn"),
    (b"1.00 2.00", b"1.0 2.0", "nynyn"),
    (b"1 2 3", b"1 2", "nnnnn"),
    (b"\xff", b"\xfe", "nnnny"),
    (b"1\x002", b"1 2", "nnnnn"),
    (b"1.5abc", b"1.5", "nnnnn"),
    (b"0x10", b"16.0", "nnnnn"),
]
MODES = ("exact", "float", "lines", "livecodebench", "sandbox_fusion")


@pytest.mark.parametrize(("stdout", "expected", "verdicts"), CASES)
def test_comparison_modes(stdout: bytes, expected: bytes, verdicts: str) -> None:
    found = "".join("ny"[judge.comparison(mode)(stdout, expected, b"")] for mode in MODES)
    assert found == verdicts


def test_an_unknown_mode_lists_the_choices() -> None:
    with pytest.raises(ValueError, match="'maybe' is not one of exact, float, lines, livecodebench, sandbox_fusion"):
        judge.comparison("maybe")


whitespace = st.text(" \t\n\r\x0b\x0c", min_size=1).map(str.encode)
tokens = st.lists(st.binary(min_size=1).filter(lambda token: len(token.split()) == 1 and token.split()[0] == token))


@EXAMPLES
@given(tokens, st.data())
def test_exact_ignores_how_much_whitespace_there_is(words: list[bytes], data: st.DataObject) -> None:
    def spaced() -> bytes:
        return b"".join(word + data.draw(whitespace) for word in words)

    assert judge.exact(spaced(), spaced())


@EXAMPLES
@given(tokens, tokens)
def test_exact_accepts_the_same_tokens_only(left: list[bytes], right: list[bytes]) -> None:
    assert judge.exact(b" ".join(left), b"\n".join(right)) == (left == right)


@EXAMPLES
@given(st.binary(max_size=60), st.binary(max_size=60))
def test_comparisons_never_raise_and_are_reflexive(left: bytes, right: bytes) -> None:
    for mode in MODES:
        assert judge.comparison(mode)(left, right, b"") in (True, False)
        assert judge.comparison(mode)(left, left, b"")


@EXAMPLES
@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(-3e-6, 3e-6))
def test_float_tolerance_is_absolute_or_relative(value: float, change: float) -> None:
    other = value + change * max(1.0, abs(value))
    close = abs(other - value) <= 1e-6 * max(1.0, abs(value))
    assert judge.floating(repr(other).encode(), repr(value).encode()) == (close or other == value)


@EXAMPLES
@given(st.integers(), st.integers())
def test_integers_are_always_exact(left: int, right: int) -> None:
    assert judge.floating(b"%d" % left, b"%d" % right) == (left == right)


def test_a_whole_number_with_decimals_is_measured_where_an_estimate_is_allowed() -> None:
    assert judge.comparison("float:rel=0.01")(b"1001.0", b"1000", b"")
    assert judge.comparison("float:abs=2")(b"7.0", b"6", b"")
    assert not judge.comparison("float:abs=1e-9,rel=1e-9")(b"5000000001.0", b"5000000000", b"")


BOUNDS = st.integers(1, 9).map(lambda exponent: f"1e-{exponent}")


@EXAMPLES
@given(st.floats(-1e9, 1e9), st.floats(-3.0, 3.0), BOUNDS, st.sampled_from(["abs", "rel"]))
def test_a_named_error_is_absolute_or_relative_as_it_says(value: float, share: float, bound: str, kind: str) -> None:
    width = float(bound) * (abs(value) if kind == "rel" else 1.0)
    other = value + share * width
    slack = 2e-15 * max(1.0, abs(value))  # of the judge, and of the sum above
    if abs(abs(other - value) - width) <= slack:
        return  # on the boundary
    accepted = judge.comparison(f"float:{kind}={bound}")(repr(other).encode(), repr(value).encode(), b"")
    assert accepted == (abs(other - value) < width or other == value)


WORDS = st.lists(st.sampled_from("YES yes No nO a1 Z 3 3.0 -".split()), max_size=5).map(" ".join)


@EXAMPLES
@given(WORDS, WORDS)
def test_any_letter_case_is_exact_of_lower_case(left: str, right: str) -> None:
    for mode in ("exact", "float"):
        lower = judge.comparison(mode)(left.lower().encode(), right.lower().encode(), b"")
        assert judge.comparison(f"{mode}:nocase")(left.encode(), right.encode(), b"") == lower
    returned = judge.same_result(left.split(), right.split(), judge.rule("exact:nocase"))
    assert returned == (left.lower().split() == right.lower().split())


atoms = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.fractions()
)
hashable = st.recursive(atoms, lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3), max_leaves=5)
values = st.recursive(
    hashable,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(hashable, inner, max_size=4)
        | st.sets(hashable, max_size=4)
        | st.lists(inner, max_size=3).map(deque)
    ),
    max_leaves=12,
)


@EXAMPLES
@given(values)
def test_plain_values_cross_and_equal_themselves(value: Any) -> None:
    text = plain.dumps(value)
    back = plain.loads(text)
    assert back == value and type(back) is type(value)
    assert judge.same_value(plain.encode(value), value, tolerant=False)


@EXAMPLES
@given(values, values)
def test_values_are_the_same_as_python_says(left: Any, right: Any) -> None:
    """But for a returned tuple, which equals an expected list."""
    same = judge.same_value(plain.encode(left), right, tolerant=False)
    assert same >= (left == right)
    if same and not _holds(tuple, left):
        assert left == right


def _holds(kind: type, value: Any) -> bool:
    if isinstance(value, kind):
        return True
    items = [*value, *value.values()] if isinstance(value, dict) else value
    return isinstance(items, (list, set, frozenset, deque)) and any(_holds(kind, item) for item in items)


def test_values_that_differ() -> None:
    for data, expected in (
        ({"tuple": [1, 2]}, [1, 2]),
        ([1, {"tuple": [2]}], [1, [2]]),
        (1, True),
        (1.0, 1),
        ({"int": hex(1 << 80)}, 1 << 80),
        ({"iterator": []}, None),
    ):
        assert judge.same_value(data, expected, tolerant=False) == (expected is not None)
    for data, expected in (
        ([1, 2], (1, 2)),
        ([1, 2], {1, 2}),
        ("5", 5),
        ({"dict": [["a", 1], ["a", 1]]}, {"a": 1, "b": 1}),
        ({"set": [1, 1]}, {1, 2}),
        ({"Fraction": "1/3"}, Fraction(1, 2)),
        ({"tuple": [1], "set": [1]}, [1]),
        (None, 0),
    ):
        assert not judge.same_value(data, expected, tolerant=False)
    assert judge.same_value([0.1 + 0.2], [0.3], tolerant=True) and not judge.same_value([0.1 + 0.2], [0.3], False)
    assert not judge.same_value([3.0000001], [3], tolerant=True)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[" * 100_000, '{"a": 1, "b": 2}', '{"evil": []}', '{"bytes": "xyz"}', '{"range": [0, 1, 0]}',
     '{"set": [[1]]}', '{"dict": [[[], 1]]}', '{"Decimal": "1e"}', '{"Fraction": "1/0"}', '{"Fraction": "1e999999999"}',
     '{"int": "' + "9" * 10 + 'x"}', '{"complex": ["x"]}', '{"dict": 5}', '{"tuple": {}}', "1" * 200_000],
)  # fmt: skip
def test_malformed_values_are_unsupported(text: str) -> None:
    with pytest.raises(plain.Unsupported):
        plain.loads(text)


tags = st.sampled_from(
    ["int", "numpy_bool", "complex", "bytes", "dict", "tuple", "set", "range", "deque", "Decimal", "Fraction"]
)
tagged = st.recursive(
    st.none() | st.integers() | st.text() | tags, lambda inner: st.lists(inner) | st.dictionaries(tags, inner)
)


@EXAMPLES
@given(tagged)
def test_any_json_is_decoded_or_refused(data: Any) -> None:
    """Nothing but Unsupported is raised, and what is decoded can cross again."""
    try:
        value = plain.loads(json.dumps(data))
    except plain.Unsupported:
        return
    plain.encode(value)


LIMITS = Limits(cpu_s=1.0, wall_s=2.0, memory_mb=100, output_bytes=1000)
FINE = Ended(
    reason=Reason.FINISHED,
    exit_code=0,
    signal=None,
    cpu_s=0.1,
    wall_s=0.1,
    peak_memory_mb=20.0,
    dirty=False,
    out_of_memory=False,
)


def test_failures_are_told_in_order() -> None:
    """Output, time, memory, runtime error: each hides those after it."""
    everything = replace(
        FINE, reason=Reason.CPU_LIMIT, exit_code=None, signal=9, peak_memory_mb=200.0, out_of_memory=True
    )
    assert judge.failure(everything, 1001, LIMITS) == "output_limit"
    assert judge.failure(everything, 1000, LIMITS) == "time_limit"
    in_time = replace(everything, reason=Reason.FINISHED)
    assert judge.failure(in_time, 0, LIMITS) == "memory_limit"
    assert judge.failure(replace(in_time, out_of_memory=False), 0, LIMITS) == "memory_limit"
    assert judge.failure(replace(in_time, out_of_memory=False, peak_memory_mb=100.0), 0, LIMITS) == "runtime_error"
    assert judge.failure(replace(FINE, exit_code=1), 0, LIMITS) == "runtime_error"
    assert judge.failure(replace(FINE, exit_code=None, signal=25), 0, LIMITS) == "output_limit"
    assert judge.failure(replace(FINE, exit_code=None, signal=24), 0, LIMITS) == "time_limit"
    assert judge.failure(FINE, 1000, LIMITS) is None


def test_limits_are_checked() -> None:
    for change, message in (
        ({"cpu_s": 0.0}, "limits.cpu_s: 0.0 is not in"),
        ({"wall_s": float("nan")}, "limits.wall_s: nan"),
        ({"memory_mb": 0}, "limits.memory_mb: 0"),
        ({"output_bytes": -1}, "limits.output_bytes: -1"),
        ({"processes": 0}, "limits.processes: 0"),
    ):
        with pytest.raises(ValueError, match=message):
            judge.check(Execution(program="", tests=(), limits=replace(LIMITS, **change)))  # type: ignore[arg-type]
