"""The plots of an evaluation: turns, transitions, and bars by group."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, MaxNLocator

_LABELS = {
    "none": "no critic",
    "base": "base critic",
    "sft": "SFT critic",
    "rl": "RL critic",
    "exec_feedback": "execution feedback",
    "self_exec_feedback": "self-critique, feedback",
    "oracle": "oracle",
}
COLOURS = {
    "none": "#8a8f98",
    "base": "#d98a00",
    "sft": "#3b8fd4",
    "rl": "#0a7d4b",
    "exec_feedback": "#a04fb0",
    "self_exec_feedback": "#c2649a",
    "oracle": "#2b2d33",
}
OTHER_COLOURS = ("#c2373a", "#6d5f00", "#00818a", "#7a4a2b")
"""Colours of further critics, in turn."""
INK, FAINT, GRID = "#22252b", "#6a707a", "#e4e6ea"
WHISKER = "#9aa0aa"
"""Intervals on bars: seen on every colour of a bar and on the ground."""
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 11.0,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12.0,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.9,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "figure.facecolor": "white",
}
_PANELS = (
    ("reward", "Reward", "mean over critiques"),
    ("kl", "KL to the SFT critic", "nats a token"),
    ("entropy", "Entropy", "nats a token"),
    ("clip_fraction", "Clip fraction", "share of tokens"),
)
"""Panels of the learning curve: metric, title, unit."""


def label(critic: str) -> str:
    """What a critic is called in plots and tables."""
    greedy = critic.endswith("_greedy")
    name = critic.removesuffix("_greedy")
    return _LABELS.get(name, name) + (" (greedy)" if greedy else "")


def colours(critics: Sequence[str]) -> dict[str, str]:
    """A colour for every critic; sampled and greedy ones share it."""
    others = [name for name in dict.fromkeys(item.removesuffix("_greedy") for item in critics) if name not in COLOURS]
    more = {name: OTHER_COLOURS[index % len(OTHER_COLOURS)] for index, name in enumerate(others)}
    return {item: (COLOURS | more)[item.removesuffix("_greedy")] for item in critics}


PERCENT = FuncFormatter(lambda value, _: f"{round(100 * value, 6):g}%")
"""Ticks of fractions: as many decimals as the value has."""
NARROW = "narrow"
"""The folder beside the pictures that holds each again, narrow enough to be read on a phone."""
_NARROW_INCHES = (4.9, 4.6)
"""Width of a narrow picture, and its least height; its text has the size of the wide one's."""
_NARROW_TITLE = 40
"""Characters of a line of its title."""


def save(figure: Figure, file: Path) -> Path:
    """Write a figure as PNG, as SVG beside it for a paper, and as narrow PNG for phones; returns the first."""
    figure.savefig(file, dpi=160, bbox_inches="tight", pad_inches=0.18)
    figure.savefig(file.with_suffix(".svg"), bbox_inches="tight", pad_inches=0.18, metadata={"Date": None})
    narrow = file.parent / NARROW / file.name
    narrow.parent.mkdir(exist_ok=True)
    width, height = _NARROW_INCHES
    figure.set_size_inches(width, min(max(figure.get_figheight(), height), figure.get_figheight() * 1.2))
    for ax in figure.axes:
        ax.set_title(textwrap.fill(ax.get_title(loc="left"), _NARROW_TITLE), fontsize=11.5)
    figure.savefig(narrow, dpi=150, bbox_inches="tight", pad_inches=0.1)
    return file


def learning_curve(points: Sequence[Mapping[str, float]]) -> Figure:
    """Reward, KL, entropy and clip fraction over RL steps: each step thin, a running mean bold."""
    figure = Figure(figsize=(10.0, 6.2), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True).ravel()
    steps = np.array([point["step"] for point in points], dtype=float)
    for ax, (name, title, unit) in zip(axes, _PANELS, strict=True):
        values = np.array([point.get(name, np.nan) for point in points], dtype=float)
        ax.set_title(title)
        ax.set_ylabel(unit)
        if np.isfinite(values).any():
            ax.plot(steps, values, color=COLOURS["rl"], alpha=0.28, linewidth=1.1)
            ax.plot(steps, running_mean(values, max(len(values) // 20, 1)), color=COLOURS["rl"], linewidth=2.3)
            _room(ax, values)
        else:
            ax.text(0.5, 0.5, "not logged", transform=ax.transAxes, ha="center", color=FAINT)
    for ax in axes[2:]:
        ax.set_xlabel("RL step")
        ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    return figure


def running_mean(values: npt.NDArray[np.float64], half: int) -> npt.NDArray[np.float64]:
    """The mean over each value and ``half`` neighbours on both sides, fewer at the ends; NaN counts for nothing."""
    known = np.isfinite(values)
    window = np.ones(2 * half + 1)
    sums = np.convolve(np.where(known, values, 0.0), window)[half:-half]
    counts = np.convolve(known.astype(float), window)[half:-half]
    return np.divide(sums, counts, out=np.full_like(values, np.nan), where=counts > 0)


def _room(ax: Axes, values: npt.NDArray[np.float64]) -> None:
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    margin = 0.08 * (high - low) or 0.01
    ax.set_ylim(max(low - margin, 0.0) if low >= 0 else low - margin, high + margin)


def pass_over_turns(rows: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """pass@1 after 0, 1, 2 ... turns, a line a critic with its 95 % band, named at its end."""
    figure = Figure(figsize=(8.8, 5.4), layout="constrained")
    ax = figure.subplots()
    paint = colours(list(rows))
    ends = {}
    turns = 0
    for name, row in rows.items():
        means = np.array(row["pass_at_1"])
        turns = max(turns, len(means) - 1)
        bands = np.array([row["ci95"][f"pass_at_1@{turn}"] for turn in range(len(means))])
        x = np.arange(len(means))
        bold = name.removesuffix("_greedy") == "rl"
        dashed = name.removesuffix("_greedy") in ("none", "oracle")
        ax.fill_between(x, bands[:, 0], bands[:, 1], color=paint[name], alpha=0.16 if bold else 0.09, linewidth=0)
        ax.plot(
            x,
            means,
            color=paint[name],
            linewidth=3.0 if bold else 2.0,
            linestyle=(0, (4, 2)) if dashed else "-",
            marker=None if dashed else "o",
            markersize=6.5 if bold else 5.0,
            zorder=4 if bold else 3,
        )
        ends[name] = float(means[-1])
    _limits(ax, rows)
    name_ends(ax, ends, paint, turns)
    ax.set_title(title)
    ax.set_xlabel("critique-revision turns")
    ax.set_ylabel("pass@1")
    ax.set_xticks(range(turns + 1))
    ax.set_xlim(-0.12, turns + 0.06)
    ax.yaxis.set_major_formatter(PERCENT)
    ax.grid(axis="x", visible=False)
    return figure


def _limits(ax: Axes, rows: Mapping[str, Mapping[str, Any]]) -> None:
    ends = [end for row in rows.values() for name, pair in row["ci95"].items() if "@" in name for end in pair]
    ax.set_ylim(max(min(ends) - 0.04, 0.0), min(max(ends) + 0.04, 1.02))


def name_ends(ax: Axes, ends: Mapping[str, float], paint: Mapping[str, str], turns: int) -> None:
    """Names and values right of the lines' ends, pushed apart so that none covers another."""
    low, high = ax.get_ylim()
    gap = 0.05 * (high - low)
    order = sorted(ends, key=lambda name: ends[name])
    places = spread([ends[name] for name in order], gap, low, high)
    for name, place in zip(order, places, strict=True):
        ax.annotate(  # one figure's critics are sampled or greedy alike, as its title says
            f"{label(name.removesuffix('_greedy'))}  {100 * ends[name]:.1f}",
            xy=(turns, ends[name]),
            xytext=(turns + 0.03 * max(turns, 1) + 0.04, place),
            color=paint[name],
            fontweight="bold" if name.removesuffix("_greedy") == "rl" else "normal",
            va="center",
            annotation_clip=False,
        )


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Ascending values moved as little as it takes to lie ``gap`` apart, within [low, high] as far as there is room.

    Neighbours that are too close form a block around their common mean.
    """
    blocks: list[list[float]] = []
    for value in values:
        blocks.append([value])
        while len(blocks) > 1 and _centre(blocks[-1], gap, low, high)[0] - _centre(blocks[-2], gap, low, high)[1] < gap:
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    out: list[float] = []
    for block in blocks:
        first, _ = _centre(block, gap, low, high)
        out += [first + gap * index for index in range(len(block))]
    return out


def _centre(block: Sequence[float], gap: float, low: float, high: float) -> tuple[float, float]:
    """The first and last place of a block."""
    half = gap * (len(block) - 1) / 2.0
    middle = min(max(sum(block) / len(block), low + half), max(high - half, low + half))
    return middle - half, middle + half


def deltas(rows: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """Δ↑ against Δ↓ of one turn with 95 % bars, greedy critics hollow; along a grey diagonal the gain is the same."""
    figure = Figure(figsize=(7.8, 6.0), layout="constrained")
    ax = figure.subplots()
    paint = colours(list(rows))
    shown = {
        name: row for name, row in rows.items() if not name.startswith("none") and not _same_as_sampled(name, rows)
    }
    top = max([row["ci95"]["delta_up"][1] for row in shown.values()] + [0.05]) * 1.12
    right = max([row["ci95"]["delta_down"][1] for row in shown.values()] + [0.05]) * 1.25
    _gain_lines(ax, right, top)
    for name, row in shown.items():
        x, y = row["delta_down"], row["delta_up"]
        (left, far), (below, above) = row["ci95"]["delta_down"], row["ci95"]["delta_up"]
        greedy = name.endswith("_greedy")
        ax.errorbar(
            x,
            y,
            xerr=[[max(x - left, 0.0)], [max(far - x, 0.0)]],
            yerr=[[max(y - below, 0.0)], [max(above - y, 0.0)]],
            color=paint[name],
            fmt="o",
            markersize=9.5,
            markerfacecolor="white" if greedy else paint[name],
            markeredgewidth=1.9,
            elinewidth=1.1,
            ecolor=(paint[name], 0.45),
            zorder=3,
        )
    _name_points(ax, {name: row for name, row in shown.items() if not name.endswith("_greedy")}, paint, right, top)
    ax.set_xlim(-0.04 * right, right)
    ax.set_ylim(-0.03 * top, top)
    ax.set_title(title)
    modes = "\n● sampled   ○ greedy" if any(name.endswith("_greedy") for name in shown) else ""
    ax.set_xlabel(f"Δ↓  right drafts made wrong (share of all samples){modes}")
    ax.set_ylabel("Δ↑  wrong drafts made right (share of all samples)")
    ax.xaxis.set_major_formatter(PERCENT)
    ax.yaxis.set_major_formatter(PERCENT)
    ax.grid(visible=False)
    return figure


def _same_as_sampled(name: str, rows: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a greedy row repeats the sampled one: computed feedback has no temperature."""
    sampled = rows.get(name.removesuffix("_greedy"))
    return name.endswith("_greedy") and sampled is not None and sampled["pass_at_1"] == rows[name]["pass_at_1"]


def _gain_lines(ax: Axes, right: float, top: float) -> None:
    """Diagonals of equal gain, with their gain in points where they leave the plot."""
    for points in range(-90, 100, 10):
        gain = points / 100.0
        style = {"color": FAINT, "linestyle": (0, (4, 3))} if points == 0 else {"color": GRID, "linestyle": "-"}
        ax.plot([0.0, right], [gain, gain + right], linewidth=1.1, zorder=1, **style)
        if 0.0 < gain + right < 0.97 * top:
            text = "no gain" if points == 0 else f"{points:+d}"
            ax.annotate(
                text, (right, gain + right), (5, 0), textcoords="offset points", color=FAINT, fontsize=9.0, va="center"
            )


def _name_points(
    ax: Axes, rows: Mapping[str, Mapping[str, Any]], paint: Mapping[str, str], right: float, top: float
) -> None:
    """Names beside the points; where points lie close, one under the other."""
    order = sorted(rows, key=lambda name: rows[name]["delta_up"])
    places = spread([rows[name]["delta_up"] for name in order], 0.05 * top, 0.0, top)
    for name, place in zip(order, places, strict=True):
        text = ax.text(
            rows[name]["delta_down"] + 0.028 * right,
            place + 0.014 * top,
            label(name),
            color=paint[name],
            fontweight="bold" if name == "rl" else "normal",
            va="bottom",
            zorder=2.5,
        )
        text.set_path_effects([withStroke(linewidth=3.5, foreground="white")])


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
        low, high = rows[name]["ci95"]["similarity"]
        ax.hlines(place, low, high, color=WHISKER, linewidth=1.6)
        ax.text(max(shown[name], high) + 0.012, place, f"{shown[name]:.3f}", va="center", color=INK)
    ax.set_xlim(0.0, 1.16)
    ax.set_xticks(np.arange(0.0, 1.01, 0.2))
    ax.set_title(title)
    ax.set_xlabel("similarity of the first revision to its draft")
    ax.grid(axis="y", visible=False)
    return figure


def by_difficulty(rows: Mapping[str, Mapping[str, Any]], title: str) -> Figure:
    """pass@1 of the drafts and after the last turn with its 95 % interval, and the gain in points, by difficulty."""
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
        bands = [groups[level]["ci95"][-1] if level in groups else (0.0, 0.0) for level in levels]
        ax.bar(x, after, width=0.92 * width, color=paint[name], label=label(name))
        ax.hlines(before, x - 0.46 * width, x + 0.46 * width, color=INK, linewidth=1.6)
        ax.vlines(x, *zip(*bands, strict=True), color=WHISKER, linewidth=1.4)
        for place, level, first, last, (_, top) in zip(x, levels, before, after, bands, strict=True):
            if level in groups:
                above = max(first, last, top) + 0.015
                told = f"{100 * (last - first):+.0f}"
                ax.text(place, above, told, ha="center", va="bottom", fontsize=8.5, color=FAINT, rotation=90)
    ax.set_xticks(range(len(levels)), levels)
    ax.set_title(title)
    ax.set_ylabel("pass@1 after the last turn")
    ax.set_ylim(0.0, 1.2)
    ax.set_yticks(np.arange(0.0, 1.01, 0.2))
    ax.yaxis.set_major_formatter(PERCENT)
    ax.grid(axis="x", visible=False)
    if names:  # below the axes, where no bar's label is
        columns = min(len(names), 3)
        told = "lines: the drafts; numbers: gain in points"
        figure.legend(loc="outside lower center", frameon=False, fontsize=9.5, ncols=columns, title=told)
    return figure


def variants(
    values: Mapping[str, Sequence[float]], bands: Mapping[str, Sequence[float]], baseline: float | None, title: str
) -> Figure:
    """One number of every variant: a bar for the mean of its runs with its band, a dot for each run, highest first."""
    order = sorted(values, key=lambda name: float(np.mean(values[name])))
    figure = Figure(figsize=(8.4, 1.3 + 0.48 * len(order)), layout="constrained")
    ax = figure.subplots()
    means = [float(np.mean(values[name])) for name in order]
    ax.barh(order, means, color=COLOURS["rl"], alpha=0.78, height=0.62)
    ax.set_ylim(-0.7, len(order) - 0.3)
    for place, name in enumerate(order):
        ax.plot(values[name], [place] * len(values[name]), "o", color=INK, markersize=4.5, zorder=3)
        ax.hlines(place, *bands[name], color=WHISKER, linewidth=1.6, zorder=2.5)
        ax.text(max(*values[name], bands[name][1]) + 0.012, place, f"{100 * means[place]:.1f}", va="center", color=INK)
    if baseline is not None:
        ax.axvline(baseline, color=FAINT, linestyle=(0, (4, 3)), linewidth=1.2)
        ax.annotate(
            "drafts", (baseline, len(order) - 0.3), (3, -11), textcoords="offset points", color=FAINT, fontsize=9.0
        )
    highest = max(value for name in order for value in (*values[name], bands[name][1]))
    ax.set_xlim(0.0, min(highest + 0.1, 1.14))
    ax.set_title(title)
    ax.set_xlabel("bands: ± one standard deviation over runs; of a single run its 95 % interval", fontsize=9.5)
    ax.xaxis.set_major_formatter(PERCENT)
    ax.grid(axis="y", visible=False)
    return figure


def reliability(bins: Sequence[Mapping[str, float]], title: str) -> Figure:
    """Share of right answers against the critic's probability, a point a bin with its number of answers."""
    figure = Figure(figsize=(5.2, 5.0), layout="constrained")
    ax = figure.subplots()
    ax.plot([0, 1], [0, 1], color="0.6", linewidth=1.0, linestyle="--")
    confidence = [item["confidence"] for item in bins]
    accuracy = [item["accuracy"] for item in bins]
    ax.plot(confidence, accuracy, color=COLOURS["rl"], marker="o", linewidth=2.0)
    for item in bins:
        place = (item["confidence"], item["accuracy"])
        ax.annotate(f"{item['n']:.0f}", place, xytext=(4, 6), textcoords="offset points", fontsize=8)
    ax.set(xlim=(-0.04, 1.04), ylim=(-0.04, 1.08), title=title)
    ax.set_xlabel("probability that the answer is right")
    ax.set_ylabel("share of right answers")
    return figure
