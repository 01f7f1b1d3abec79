"""The goals on an H200, each against what was measured in the same run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from measure import MIB, Limits

Row = dict[str, Any]


def _pick(measured: list[Row], contender: str, /, **wanted: Any) -> Row | None:
    for row in measured:
        if row["contender"] == contender and "failed" not in row and all(row[k] == v for k, v in wanted.items()):
            return row
    return None


def _ratio(measured: list[Row], ours: str, theirs: str, keys: tuple[str, ...], /, **wanted: Any) -> float | None:
    mine, other = _pick(measured, ours, **wanted), _pick(measured, theirs, **wanted)
    if mine is None or other is None:
        return None
    return sum(other[key] for key in keys) / sum(mine[key] for key in keys)


def _extra_mb(row: Row) -> float:
    """Memory beyond the gradients in half precision and their fp32 accumulators."""
    elements = (row["rows"] + row["columns"]) * row["width"]
    return row["peak_mb"] - 6 * elements / MIB


def judge(measured: list[Row], limits: Limits) -> list[dict[str, Any]]:
    """Goals with the value that was measured, or None where a part of it was not."""
    holds: dict[str, Callable[[float, float], bool]] = {">=": lambda a, b: a >= b, "<=": lambda a, b: a <= b}
    return [
        {"goal": name, "wanted": f"{sign} {wanted:g}", "found": value}
        | {"met": None if value is None else holds[sign](value, wanted)}
        for name, value, sign, wanted in (*_logits(measured), *_linear(measured, limits), *_tokens(measured))
    ]


Goal = tuple[str, float | None, str, float]  # what, found, "<=" or ">=", wanted
BOTH = ("forward_ms", "backward_ms")


def _of(measured: list[Row], contender: str, key: str, /, **wanted: Any) -> float | None:
    row = _pick(measured, contender, **wanted)
    return None if row is None else row.get(key)


def _logits(measured: list[Row]) -> list[Goal]:
    at = {"family": "logits", "rows": 8192, "shards": 1}
    liger = _ratio(measured, "ctrl", "Liger vocabulary-parallel CE", BOTH, **at)
    eager = _ratio(measured, "ctrl", "torch eager", BOTH[:1], **at)
    compiled = _ratio(measured, "ctrl", "torch.compile", BOTH, **at)
    return [
        ("logits forward, part of copy bandwidth", _of(measured, "ctrl", "forward_limit", **at), ">=", 0.85),
        ("logits backward, part of copy bandwidth", _of(measured, "ctrl", "backward_limit", **at), ">=", 0.80),
        ("logits, times as fast as Liger's vocabulary-parallel CE", liger, ">=", 3.0),
        ("logits forward, times as fast as eager", eager, ">=", 12.0),
        ("logits, times as fast as torch.compile", compiled, ">=", 1.5),
    ]


def _linear(measured: list[Row], limits: Limits) -> list[Goal]:
    linear: dict[str, Any] = {"family": "linear", "rows": 8192, "shards": 1, "width": 3584}
    one_pass = linear | {"family": "one pass"}
    recomputed = "ctrl, logits recomputed"
    row = _pick(measured, "ctrl", **one_pass)
    floor_ratio = memory = None
    if row is not None:
        floor_ms = 6 * row["rows"] * row["columns"] * row["width"] / limits.matmul_tflop_per_s / 1e9
        floor_ratio, memory = row["total_ms"] / floor_ms, _extra_mb(row)
    eager = _ratio(measured, "ctrl", "torch eager", ("total_ms",), **one_pass)
    return [
        ("linear forward, TFLOP/s", _of(measured, recomputed, "forward_tflop_per_s", **linear), ">=", 640.0),
        ("linear backward, TFLOP/s", _of(measured, recomputed, "backward_tflop_per_s", **linear), ">=", 700.0),
        ("linear, times as fast as verl", _ratio(measured, recomputed, "verl", BOTH, **linear), ">=", 1.35),
        ("one pass, times the time of its operations at the matrix limit", floor_ratio, "<=", 1.15),
        ("one pass, MiB beyond gradients and accumulators", memory, "<=", 2080.0),
        ("one pass, times as fast as eager", eager, ">=", 1.5),
    ]


def _tokens(measured: list[Row]) -> list[Goal]:
    at = {"rows": 1024}
    loss = at | {"family": "policy loss"}
    groups_ms = _of(measured, "ctrl", "forward_ms", family="group advantages", **at)
    eager = _ratio(measured, "ctrl", "torch eager", ("total_ms",), **loss)
    return [
        ("group advantages, microseconds", None if groups_ms is None else 1e3 * groups_ms, "<=", 10.0),
        ("gae, part of copy bandwidth", _of(measured, "ctrl", "forward_limit", family="gae", **at), ">=", 0.70),
        ("policy loss, part of copy bandwidth", _of(measured, "ctrl", "forward_limit", **loss), ">=", 0.65),
        ("policy loss, times as fast as eager", eager, ">=", 15.0),
    ]
