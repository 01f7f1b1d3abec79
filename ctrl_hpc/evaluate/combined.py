"""The report of several runs: variants beside each other, the paper's tables, samples of all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from ctrl_hpc import jsonl
from ctrl_hpc.evaluate import gallery, paper, report, samples, tables
from ctrl_hpc.evaluate.results import read_histories
from ctrl_hpc.evaluate.runs import FinishedRun, focus, read_all, summary

SHOWN = 60
"""Samples of all runs together on the page, of each critic."""


def write(folders: Sequence[str | Path], out: Path, title: str = "Several runs") -> dict[str, Any]:
    """Write the report of finished runs to ``out``; returns its results.json.

    Raises ValueError when a folder holds no finished run.
    """
    runs = read_all(folders)
    variants = summary(runs)
    results = {
        "runs": {run.name: {"folder": str(run.folder), "seed": run.config.seed, **run.results} for run in runs},
        "variants": variants,
    }
    out.mkdir(parents=True, exist_ok=True)
    jsonl.write_text(out / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    made = tables_of(runs, variants)
    pictures = gallery.draw_runs(runs, variants, out)
    shown = samples_of(runs)
    about = [
        f"{len(runs)} runs of {len(variants)} variants: "
        + "; ".join(f"{name} (seeds {', '.join(map(str, entry['seeds']))})" for name, entry in variants.items())
        + "."
    ]
    report.write_files(out, made, report.page(title, about, made, pictures, shown, {}))
    console = Console(width=max(Console().width, 120))
    for table in made:
        console.print(tables.rich_table(table))
    console.print(f"report: {out / 'index.html'}", soft_wrap=True, highlight=False)
    return results


def tables_of(runs: Sequence[FinishedRun], variants: dict[str, Any]) -> list[tables.Table]:
    """For each data set the variants' main critic and then all critics; the paper's tables."""
    made = []
    for dataset in dict.fromkeys(name for entry in variants.values() for name in entry["datasets"]):
        critics = [
            name for entry in variants.values() for name in entry["datasets"].get(dataset, {}).get("critics", {})
        ]
        made.append(tables.variants_table(dataset, variants, focus(critics)))
        made.append(tables.variants_table(dataset, variants))
    for run in runs:
        if run.results.get("judgebench", {}).get("critics"):
            made.append(tables.judgebench_table(run.results["judgebench"]))
    return made + paper.tables(runs)


def samples_of(runs: Sequence[FinishedRun]) -> list[dict[str, Any]]:
    """A few samples of every run whose records are still there."""
    each = max(SHOWN // len(runs), 4)
    out = []
    for run in runs:
        for dataset in run.config.data.eval_names:
            if (run.folder / "eval" / dataset / "drafts.jsonl").exists():
                histories = {dataset: read_histories(run.config, run.folder, dataset)}
                out += [row | {"run": run.name} for row in samples.rows(histories, each)]
    return out
