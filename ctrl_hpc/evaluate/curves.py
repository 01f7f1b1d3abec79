"""Curves of a report: errors that compound over turns, JudgeBench over votes, several runs over RL steps and turns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ctrl_hpc.evaluate.plots import COLOURS, FAINT, OTHER_COLOURS, colours, label, name_ends, running_mean

PALETTE = (*[COLOURS[name] for name in ("rl", "sft", "base", "exec_feedback", "oracle")], *OTHER_COLOURS)
"""Colours of variants, in turn."""


def error_compounding(rows: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """Δ↓ over turns: the share of all samples whose draft was right and whose program is wrong after the turn."""
    figure = Figure(figsize=(8.8, 5.0), layout="constrained")
    ax = figure.subplots()
    paint = colours(list(rows))
    ends = {}
    turns = 0
    for name, row in rows.items():
        values = [0.0, *row["delta_down_by_turn"]]
        turns = max(turns, len(values) - 1)
        bold = name.removesuffix("_greedy") == "rl"
        ax.plot(
            range(len(values)), values, color=paint[name], linewidth=3.0 if bold else 2.0, marker="o", markersize=5.0
        )
        ends[name] = values[-1]
    top = max([*ends.values(), *(value for row in rows.values() for value in row["delta_down_by_turn"])])
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
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.grid(axis="x", visible=False)


def accuracy_over_votes(critics: Mapping[str, Mapping[str, Any]]) -> Figure:
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
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.legend(frameon=False)
    return figure


def learning_curves(runs: Mapping[str, Sequence[Sequence[Mapping[str, float]]]], metric: str, title: str) -> Figure:
    """A metric of RL over its steps: a line for each variant, the mean of its runs, with their range behind it."""
    figure = Figure(figsize=(8.8, 5.4), layout="constrained")
    ax = figure.subplots()
    for index, (name, curves) in enumerate(runs.items()):
        colour = PALETTE[index % len(PALETTE)]
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
        colour = PALETTE[index % len(PALETTE)]
        means, deviations = np.array(row["pass_at_1"]), np.array(row["pass_at_1_sd"])
        turns = max(turns, len(means) - 1)
        x = np.arange(len(means))
        ax.fill_between(x, means - deviations, means + deviations, color=colour, alpha=0.13, linewidth=0)
        ax.plot(x, means, color=colour, marker="o", linewidth=2.2, label=f"{name}  {100 * means[-1]:.1f}")
    _turns(ax, turns, title, "pass@1")
    ax.set_xlim(-0.12, turns + 0.12)
    ax.legend(frameon=False, fontsize=9.5)
    return figure
