"""The results of a run as a table (Markdown), a plot (PNG) and raw numbers (JSON)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

OURS, OTHERS = "#1b6ca8", "#b8b8b8"


def write(folder: Path, results: dict[str, Any]) -> None:
    """All three, as results.json, results.md and results.png."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "results.md").write_text(markdown(results))
    plot(results["rows"], folder / "results.png", results["environment"]["device"])


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}" if abs(value) < 1e4 else f"{value:.0f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)]


def markdown(results: dict[str, Any]) -> str:
    """The whole report."""
    facts, limits = results["environment"], results["limits"]
    lines = [
        f"# {facts['device']}",
        "",
        f"torch {facts['torch']}, triton {facts['triton']}, CUDA {facts['cuda']}, {facts['date']}; {facts['peers']}; "
        f"{results['seconds']:.0f} s in all. Limits measured in this run: {limits['copy_tb_per_s']:.2f} TB/s for a "
        f"copy, {limits['matmul_tflop_per_s']:.0f} TFLOP/s for a bf16 product.",
        "",
        "Times are medians in ms, each call after a flush of the cache; (graph) marks a GPU's time alone, of a CUDA "
        "graph, the others hold the launches. The percentages are parts of the copy's bandwidth (logits, gae, policy "
        "loss) or of "
        "the product's operations (linear, one pass). `peak` is memory in use at most beyond the inputs, gradients "
        "included. `x ctrl` is the time of forward and backward over that of the fastest of our rows of the case.",
        "",
    ]
    rows = results["rows"]
    for family in dict.fromkeys(row["family"] for row in rows):
        lines += [f"## {family}", "", *_family([row for row in rows if row["family"] == family]), ""]
    lines += ["## goals", "", *_goals(results["goals"]), "", "## accuracy", "", *_accuracy(results["accuracy"]), ""]
    if results["skipped"]:
        lines += ["## skipped", "", *(f"* {name}: {why}" for name, why in results["skipped"].items()), ""]
    if results["left_out"]:
        lines += ["## left out, for the time budget was spent", "", *(f"* {name}" for name in results["left_out"]), ""]
    return "\n".join(lines)


def _family(rows: list[dict[str, Any]]) -> list[str]:
    best: dict[str, float] = {}
    for row in rows:
        if row["ours"] and "failed" not in row:
            best[row["case"]] = min(row["total_ms"], best.get(row["case"], row["total_ms"]))
    table = []
    for row in sorted(rows, key=lambda row: (row["rows"], row["width"], row["shards"], not row["ours"])):
        if "failed" in row:
            table.append([row["case"], row["contender"], row["failed"], "", "", "", "", "", ""])
            continue
        table.append(
            [
                row["case"],
                f"{row['contender']}{' (graph)' if row['captured'] else ''}",
                _number(row["forward_ms"]),
                _percent(row.get("forward_limit")),
                _number(row["backward_ms"]),
                _percent(row.get("backward_limit")),
                _number(row["total_ms"]),
                "" if row["case"] not in best else f"{row['total_ms'] / best[row['case']]:.2f}",
                _number(row["peak_mb"]),
            ]
        )
    header = ["case", "", "forward", "of limit", "backward", "of limit", "both", "x ctrl", "peak MiB"]
    return _table(header, table)


def _goals(goals: list[dict[str, Any]]) -> list[str]:
    said = {None: "not measured", True: "met", False: "missed"}
    return _table(
        ["goal", "wanted", "found", ""],
        [[item["goal"], item["wanted"], _number(item["found"]), said[item["met"]]] for item in goals],
    )


def _accuracy(rows: list[dict[str, Any]]) -> list[str]:
    """Errors against float64; those of values in units of 5e-6 (1 + the largest logit)."""
    keys = ("values", "d_logits", "d_hidden", "d_weight")
    table = [
        [row["family"], row["contender"], *(_number(row.get(key), 2) for key in keys), row.get("failed", "")]
        for row in rows
    ]
    return _table(["family", "", "values / limit", "d logits", "d hidden", "d weight", ""], table)


def plot(rows: list[dict[str, Any]], path: Path, device: str) -> None:
    """Forward and backward together, a panel a case: those without shards, and the vocabulary's largest split."""
    rows = [row for row in rows if "failed" not in row]
    most = max((row["shards"] for row in rows), default=1)
    names = list(dict.fromkeys(row["case"] for row in rows if row["shards"] in (1, most)))
    across = 3
    down = max(1, -(-len(names) // across))
    figure, axes = pyplot.subplots(down, across, figsize=(6 * across, 2.6 * down), squeeze=False)
    for axis, name in zip(axes.flat, names, strict=False):
        shown = sorted((row for row in rows if row["case"] == name), key=lambda row: -row["total_ms"])
        labels = [row["contender"] for row in shown]
        axis.barh(labels, [row["total_ms"] for row in shown], color=[OURS if row["ours"] else OTHERS for row in shown])
        axis.set_xscale("log")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("ms, forward and backward", fontsize=8)
        axis.tick_params(labelsize=8)
    for axis in list(axes.flat)[len(names) :]:
        axis.set_visible(False)
    figure.suptitle(device)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
