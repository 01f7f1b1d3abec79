"""The pictures of a report: of one run, and of several beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

from ctrl_hpc.evaluate import bars, curves, plots
from ctrl_hpc.evaluate.runs import FinishedRun, focus

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
                files.append(plots.save(curves.error_compounding(working, title), file))
            if any(row["similarity"] is not None for row in working.values()):
                file = folder / f"similarity-{dataset}.png"
                files.append(plots.save(bars.similarity(working, f"{dataset}: how much revisions change"), file))
            if any(row["by_difficulty"] for row in working.values()):
                file = folder / f"difficulty-{dataset}.png"
                files.append(plots.save(bars.by_difficulty(working, f"{dataset}: by difficulty"), file))
        if "judgebench" in results and results["judgebench"]["critics"]:
            figure = curves.accuracy_over_votes(results["judgebench"]["critics"])
            files.append(plots.save(figure, folder / "judgebench.png"))
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
                files.append(plots.save(curves.learning_curves(lines, metric, title), file))
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
            figure = bars.variants(values, baseline, f"{dataset}: pass@1 after one turn, {told}")
            files.append(plots.save(figure, folder / f"variants-{dataset}.png"))
            figure = curves.scaling(chosen, f"{dataset}: pass@1 over critique-revision turns, {told}")
            files.append(plots.save(figure, folder / f"scaling-{dataset}.png"))
    return files
