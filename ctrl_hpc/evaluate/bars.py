"""Bars of a report: similarity of revisions, gains by difficulty, variants beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from ctrl_hpc.evaluate.plots import COLOURS, FAINT, INK, colours, label

DIFFICULTIES = ("easy", "medium", "medium hard", "hard", "very hard")
"""The order of difficulties; others come after these, by name."""


def similarity(rows: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """How like its draft a first revision is, a bar a critic: low values are deep changes."""
    shown = {name: row["similarity"] for name, row in rows.items() if row["similarity"] is not None}
    figure = Figure(figsize=(7.8, 0.6 + 0.52 * max(len(shown), 1) + 0.7), layout="constrained")
    ax = figure.subplots()
    paint = colours(list(shown))
    names = list(reversed(shown))
    ax.barh([label(name) for name in names], [shown[name] for name in names], color=[paint[name] for name in names])
    for place, name in enumerate(names):
        ax.text(shown[name] + 0.012, place, f"{shown[name]:.3f}", va="center", color=INK)
    ax.set_xlim(0.0, 1.08)
    ax.set_title(title)
    ax.set_xlabel("similarity of the first revision to its draft")
    ax.grid(axis="y", visible=False)
    return figure


def by_difficulty(rows: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """pass@1 of the drafts and after the last turn, by difficulty and critic, with the relative gain."""
    names = [name for name, row in rows.items() if row["by_difficulty"] and not name.startswith("none")]
    found = {level for name in names for level in rows[name]["by_difficulty"]}
    levels = [level for level in DIFFICULTIES if level in found] + sorted(found - set(DIFFICULTIES))
    figure = Figure(figsize=(max(7.8, 1.2 + 2.1 * len(levels)), 5.2), layout="constrained")
    ax = figure.subplots()
    paint = colours(names)
    width = 0.8 / max(len(names), 1)
    for index, name in enumerate(names):
        groups = rows[name]["by_difficulty"]
        x = np.arange(len(levels)) - 0.4 + width * (index + 0.5)
        before = [groups[level]["pass_at_1"][0] if level in groups else 0.0 for level in levels]
        after = [groups[level]["pass_at_1"][-1] if level in groups else 0.0 for level in levels]
        ax.bar(x, after, width=0.92 * width, color=paint[name], label=label(name))
        ax.hlines(before, x - 0.46 * width, x + 0.46 * width, color=INK, linewidth=1.6)
        for place, low, high in zip(x, before, after, strict=True):
            if low > 0.0:
                told = f"{100 * (high / low - 1):+.0f}%"
                ax.text(place, max(low, high) + 0.012, told, ha="center", fontsize=8.5, color=FAINT, rotation=90)
    ax.set_xticks(range(len(levels)), levels)
    ax.set_title(title)
    ax.set_ylabel("pass@1 after the last turn")
    ax.set_ylim(0.0, 1.2)
    ax.set_yticks(np.arange(0.0, 1.01, 0.2))
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.grid(axis="x", visible=False)
    ax.legend(frameon=False, fontsize=9.5, ncols=min(len(names), 4) or 1, loc="upper left", title="lines: the drafts")
    return figure


def variants(values: Mapping[str, Sequence[float]], baseline: float | None, title: str) -> Figure:
    """One number of every variant: a bar for the mean of its runs, a dot for each run, the highest first."""
    order = sorted(values, key=lambda name: float(np.mean(values[name])))
    figure = Figure(figsize=(8.4, 1.3 + 0.48 * len(order)), layout="constrained")
    ax = figure.subplots()
    means = [float(np.mean(values[name])) for name in order]
    ax.barh(order, means, color=COLOURS["rl"], alpha=0.78, height=0.62)
    ax.set_ylim(-0.7, len(order) - 0.3)
    for place, name in enumerate(order):
        ax.plot(values[name], [place] * len(values[name]), "o", color=INK, markersize=4.5, zorder=3)
        ax.text(max(*values[name], means[place]) + 0.012, place, f"{100 * means[place]:.1f}", va="center", color=INK)
    if baseline is not None:
        ax.axvline(baseline, color=FAINT, linestyle=(0, (4, 3)), linewidth=1.2)
        ax.annotate(
            "drafts", (baseline, len(order) - 0.3), (3, -11), textcoords="offset points", color=FAINT, fontsize=9.0
        )
    highest = max(value for name in order for value in values[name])
    ax.set_xlim(0.0, min(highest + 0.1, 1.1))
    ax.set_title(title)
    ax.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.grid(axis="y", visible=False)
    return figure
