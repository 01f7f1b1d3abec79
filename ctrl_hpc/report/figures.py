"""Which figures a report holds, and the curves of training among them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ctrl_hpc.report import plots
from ctrl_hpc.report.plots import COLOURS, FAINT, OTHER_COLOURS, PERCENT, colours, label, name_ends, running_mean
from ctrl_hpc.report.runs import FinishedRun, focus

_PALETTE = (*[COLOURS[name] for name in ("rl", "sft", "base", "exec_feedback", "oracle")], *OTHER_COLOURS)
"""Colours of variants, in turn."""


def error_compounding(rows: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """Δ↓ over turns, with its 95 % band: the share of all samples whose draft was right and whose program is wrong."""
    figure = Figure(figsize=(8.8, 5.0), layout="constrained")
    ax = figure.subplots()
    paint = colours(list(rows))
    ends = {}
    turns = 0
    for name, row in rows.items():
        values = [0.0, *row["delta_down_by_turn"]]
        bands = np.array([(0.0, 0.0), *(row["ci95"][f"delta_down@{turn}"] for turn in range(1, len(values)))])
        turns = max(turns, len(values) - 1)
        bold = name.removesuffix("_greedy") == "rl"
        ax.fill_between(range(len(values)), bands[:, 0], bands[:, 1], color=paint[name], alpha=0.12, linewidth=0)
        ax.plot(
            range(len(values)), values, color=paint[name], linewidth=3.0 if bold else 2.0, marker="o", markersize=5.0
        )
        ends[name] = values[-1]
    top = max(row["ci95"][f"delta_down@{turn}"][1] for row in rows.values() for turn in range(1, turns + 1))
    ax.set_ylim(-0.02 * max(top, 0.02), 1.12 * max(top, 0.02))
    name_ends(ax, ends, paint, turns)
    _turns(ax, turns, title, "Δ↓ since the draft (share of all samples)")
    return figure


def _turns(ax: Axes, turns: int, title: str, unit: str) -> None:
    ax.set_title(title)
    ax.set_xlabel("critique-revision turns")
    ax.set_ylabel(unit)
    ax.set_xticks(range(turns + 1))
    ax.set_xlim(-0.12, turns + 0.06)
    ax.yaxis.set_major_formatter(PERCENT)
    ax.grid(axis="x", visible=False)


def _accuracy_over_votes(critics: Mapping[str, Mapping[str, Any]]) -> Figure:
    """JudgeBench: overall accuracy over the number of votes, with its 95 % band; half is chance."""
    figure = Figure(figsize=(8.8, 5.0), layout="constrained")
    ax = figure.subplots()
    paint = colours(list(critics))
    for name, rows in critics.items():
        accuracy = {int(n): value for n, value in rows["overall"]["accuracy"].items()}
        bands = np.array([rows["overall"]["ci95"][str(n)] for n in accuracy])
        ax.fill_between(list(accuracy), bands[:, 0], bands[:, 1], color=paint[name], alpha=0.12, linewidth=0)
        ax.plot(
            list(accuracy), list(accuracy.values()), color=paint[name], marker="o", linewidth=2.2, label=label(name)
        )
    ax.axhline(0.5, color=FAINT, linestyle=(0, (4, 3)), linewidth=1.1)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter("{x:.0f}")
    ax.set_title("JudgeBench: accuracy over votes")
    ax.set_xlabel("votes")
    ax.set_ylabel("pairs decided rightly")
    ax.yaxis.set_major_formatter(PERCENT)
    ax.legend(frameon=False)
    return figure


def learning_curves(runs: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], metric: str, title: str) -> Figure:
    """A metric of RL over its steps: a line for each variant, the mean of its runs, with their range behind it."""
    figure = Figure(figsize=(8.8, 5.4), layout="constrained")
    ax = figure.subplots()
    for index, (name, curves) in enumerate(runs.items()):
        colour = _PALETTE[index % len(_PALETTE)]
        length = min(len(curve) for curve in curves)
        steps = [point["step"] for point in curves[0][:length]]
        values_KT = np.array([[point.get(metric, np.nan) for point in curve[:length]] for curve in curves], dtype=float)
        smooth_KT = np.stack([running_mean(values, max(length // 20, 1)) for values in values_KT])
        ax.fill_between(steps, smooth_KT.min(axis=0), smooth_KT.max(axis=0), color=colour, alpha=0.13, linewidth=0)
        ax.plot(steps, smooth_KT.mean(axis=0), color=colour, linewidth=2.2, label=name)
    ax.set_title(title)
    ax.set_xlabel("RL step")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(frameon=False, fontsize=9.5)
    return figure


def scaling(variants: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """pass@1 over turns for one critic of several variants: the mean of their runs and its standard deviation."""
    figure = Figure(figsize=(8.8, 5.4), layout="constrained")
    ax = figure.subplots()
    turns = 0
    for index, (name, row) in enumerate(variants.items()):
        colour = _PALETTE[index % len(_PALETTE)]
        means, deviations = np.array(row["pass_at_1"]), np.array(row["pass_at_1_sd"])
        turns = max(turns, len(means) - 1)
        x = np.arange(len(means))
        ax.fill_between(x, means - deviations, means + deviations, color=colour, alpha=0.13, linewidth=0)
        ax.plot(x, means, color=colour, marker="o", linewidth=2.2, label=f"{name}  {100 * means[-1]:.1f}")
    _turns(ax, turns, title, "pass@1")
    ax.set_xlim(-0.12, turns + 0.12)
    ax.legend(frameon=False, fontsize=9.5)
    return figure


METRICS = {
    "pass_rate": "Revisions that pass over RL steps",
    "reward": "Reward over RL steps (each variant's own)",
    "kl": "KL to the SFT critic over RL steps",
}
"""Metrics of RL whose curves are drawn for several runs."""


def draw_all(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Every plot for which ``results`` (``report/results.json``) has data; returns the files."""
    files = []
    with matplotlib.rc_context(plots.STYLE):
        if results["learning_curve"]:
            files.append(plots.save(plots.learning_curve(results["learning_curve"]), folder / "learning_curve.png"))
        for dataset, entry in results["datasets"].items():
            for greedy, suffix in ((False, ""), (True, "_greedy")):
                rows = {name: row for name, row in entry["critics"].items() if name.endswith("_greedy") is greedy}
                if rows:
                    title = f"{dataset}: pass@1 over critique-revision turns" + (", greedy critics" if greedy else "")
                    files.append(
                        plots.save(plots.pass_over_turns(rows, title), folder / f"pass_at_1{suffix}-{dataset}.png")
                    )
            critics = entry["critics"]
            sampled = {name: row for name, row in critics.items() if not name.endswith("_greedy")}
            title = f"{dataset}: what one turn mends and breaks"
            files.append(plots.save(plots.deltas(critics, title), folder / f"deltas-{dataset}.png"))
            working = {name: row for name, row in sampled.items() if name != "none"}
            if working:
                title = f"{dataset}: errors that compound"
                file = folder / f"error_compounding-{dataset}.png"
                files.append(plots.save(error_compounding(working, title), file))
            if any(row["similarity"] is not None for row in working.values()):
                file = folder / f"similarity-{dataset}.png"
                files.append(plots.save(plots.similarity(working, f"{dataset}: how much revisions change"), file))
            if any(row["by_difficulty"] for row in working.values()):
                file = folder / f"difficulty-{dataset}.png"
                files.append(plots.save(plots.by_difficulty(working, f"{dataset}: by difficulty"), file))
        if "judgebench" in results and results["judgebench"]["critics"]:
            figure = _accuracy_over_votes(results["judgebench"]["critics"])
            files.append(plots.save(figure, folder / "judgebench.png"))
        for source, critics in results.get("critic_benchmarks", {}).items():
            files += _reliability(source, critics, folder)
    return files


def _reliability(source: str, critics: Mapping[str, Any], folder: Path) -> list[Path]:
    """A reliability diagram of every critic that has judged answers which are right or wrong."""
    files = []
    for name, row in critics.items():
        calibration = row["answers"].get("calibration", {})
        if calibration.get("bins"):
            title = f"{source}: {plots.label(name)}, ECE {calibration['ece']:.3f}"
            file = folder / f"reliability-{source.replace('/', '-')}-{name}.png"
            files.append(plots.save(plots.reliability(calibration["bins"], title), file))
    return files


def draw_runs(runs: Sequence[FinishedRun], variants: Mapping[str, Any], folder: Path) -> list[Path]:
    """Every plot that compares the variants of several runs; returns the files. ``variants``: see ``summary``."""
    files = []
    with matplotlib.rc_context(plots.STYLE):
        lines: dict[str, list[list[dict[str, float]]]] = {}
        for run in runs:
            if run.results["learning_curve"]:
                lines.setdefault(run.variant, []).append(run.results["learning_curve"])
        if lines:
            for metric, title in METRICS.items():
                if not any(metric in point for variant in lines.values() for curve in variant for point in curve):
                    continue
                file = folder / f"learning_curves_{metric}.png"
                files.append(plots.save(learning_curves(lines, metric, title), file))
        datasets = dict.fromkeys(name for entry in variants.values() for name in entry["datasets"])
        for dataset in datasets:
            rows = {
                name: entry["datasets"][dataset] for name, entry in variants.items() if dataset in entry["datasets"]
            }
            critic = focus([name for row in rows.values() for name in row["critics"]])
            chosen = {name: row["critics"][critic] for name, row in rows.items() if critic in row["critics"]}
            told = plots.label(critic)
            values = {name: row["turn_1_of_runs"] for name, row in chosen.items()}
            drafts = [row["pass_at_1"][0] for row in chosen.values()]
            baseline = sum(drafts) / len(drafts) if max(drafts) - min(drafts) < 0.02 else None
            bands = {name: row["turn_1_band"] for name, row in chosen.items()}
            figure = plots.variants(values, bands, baseline, f"{dataset}: pass@1 after one turn, {told}")
            files.append(plots.save(figure, folder / f"variants-{dataset}.png"))
            figure = scaling(chosen, f"{dataset}: pass@1 over critique-revision turns, {told}")
            files.append(plots.save(figure, folder / f"scaling-{dataset}.png"))
    return files
