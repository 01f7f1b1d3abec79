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
    logits = {"family": "logits", "rows": 8192, "shards": 1}
    linear = {"family": "linear", "rows": 8192, "shards": 1, "width": 3584}
    one_pass = {"family": "one pass", "rows": 8192, "shards": 1, "width": 3584}
    recomputed = "ctrl, logits recomputed"
    both = ("forward_ms", "backward_ms")

    def of(contender: str, key: str, /, **wanted: Any) -> float | None:
        row = _pick(measured, contender, **wanted)
        return None if row is None else row.get(key)

    def floor_ratio() -> float | None:
        row = _pick(measured, "ctrl", **one_pass)
        if row is None:
            return None
        floor_ms = 6 * row["rows"] * row["columns"] * row["width"] / limits.matmul_tflop_per_s / 1e9
        return row["total_ms"] / floor_ms

    def memory() -> float | None:
        row = _pick(measured, "ctrl", **one_pass)
        return None if row is None else _extra_mb(row)

    def micro(row_ms: float | None) -> float | None:
        return None if row_ms is None else 1e3 * row_ms

    groups = {"family": "group advantages", "rows": 1024}
    gae = {"family": "gae", "rows": 1024}
    loss = {"family": "policy loss", "rows": 1024}
    listed: list[tuple[str, float | None, str, float]] = [
        ("logits forward, part of copy bandwidth", of("ctrl", "forward_limit", **logits), ">=", 0.85),
        ("logits backward, part of copy bandwidth", of("ctrl", "backward_limit", **logits), ">=", 0.80),
        (
            "logits, times as fast as Liger's vocabulary-parallel CE",
            _ratio(measured, "ctrl", "Liger vocabulary-parallel CE", both, **logits),
            ">=",
            3.0,
        ),
        (
            "logits forward, times as fast as eager",
            _ratio(measured, "ctrl", "torch eager", both[:1], **logits),
            ">=",
            12.0,
        ),
        (
            "logits, times as fast as torch.compile",
            _ratio(measured, "ctrl", "torch.compile", both, **logits),
            ">=",
            1.5,
        ),
        ("linear forward, TFLOP/s", of(recomputed, "forward_tflop_per_s", **linear), ">=", 640.0),
        ("linear backward, TFLOP/s", of(recomputed, "backward_tflop_per_s", **linear), ">=", 700.0),
        ("linear, times as fast as verl", _ratio(measured, recomputed, "verl", both, **linear), ">=", 1.35),
        ("one pass, times the time of its operations at the matrix limit", floor_ratio(), "<=", 1.15),
        ("one pass, MiB beyond gradients and accumulators", memory(), "<=", 2080.0),
        (
            "one pass, times as fast as eager",
            _ratio(measured, "ctrl", "torch eager", ("total_ms",), **one_pass),
            ">=",
            1.5,
        ),
        ("group advantages, microseconds", micro(of("ctrl", "forward_ms", **groups)), "<=", 10.0),
        ("gae, part of copy bandwidth", of("ctrl", "forward_limit", **gae), ">=", 0.70),
        ("policy loss, part of copy bandwidth", of("ctrl", "forward_limit", **loss), ">=", 0.65),
        (
            "policy loss, times as fast as eager",
            _ratio(measured, "ctrl", "torch eager", ("total_ms",), **loss),
            ">=",
            15.0,
        ),
    ]
    holds: dict[str, Callable[[float, float], bool]] = {">=": lambda a, b: a >= b, "<=": lambda a, b: a <= b}
    return [
        {"goal": name, "wanted": f"{sign} {wanted:g}", "found": value}
        | {"met": None if value is None else holds[sign](value, wanted)}
        for name, value, sign, wanted in listed
    ]
