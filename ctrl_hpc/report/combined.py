"""The report of several runs: variants beside each other, the paper's tables, samples of all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ctrl_hpc import jsonl
from ctrl_hpc.config import Config
from ctrl_hpc.evaluate.metrics import bootstrap_weights, interval
from ctrl_hpc.report import figures, page, paper, samples, tables
from ctrl_hpc.report.results import History, read_histories
from ctrl_hpc.report.runs import FinishedRun, focus, read_all, summary, to_reward

SHOWN = 60
"""Samples of all runs together on the page, of each critic."""


def write(folders: Sequence[str | Path], out: Path, title: str = "Several runs") -> dict[str, Any]:
    """Write the report of finished runs to ``out``; returns its results.json.

    Raises ValueError when a folder holds no finished run.
    """
    runs = read_all(folders)
    variants = summary(runs)
    differences, reached = _differences_of(runs), to_reward(runs)
    results = {
        "runs": {run.name: {"folder": str(run.folder), "seed": run.config.seed, **run.results} for run in runs},
        "variants": variants,
        "differences": differences,
        "to_reward": reached,
    }
    out.mkdir(parents=True, exist_ok=True)
    jsonl.write_text(out / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    made = tables_of(runs, variants, differences)
    if reached:
        made.append(tables.to_reward_table(reached))
    pictures = figures.draw_runs(runs, variants, out)
    shown = _samples_of(runs)
    about = [
        f"{len(runs)} runs of {len(variants)} variants: "
        + "; ".join(f"{name} (seeds {', '.join(map(str, entry['seeds']))})" for name, entry in variants.items())
        + ".",
        page.made_by([run.folder for run in runs]),
    ]
    page.write_files(out, made, page.page(title, about, made, pictures, shown, {}))
    console = Console(width=max(Console().width, 120))
    for table in made:
        console.print(tables.rich_table(table))
    console.print(f"report: {out / 'index.html'}", soft_wrap=True, highlight=False)
    return results


def _differences_of(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """By data set: how much the main critic's pass@1 differs between each variant and the first.

    After one turn and, in ``last``, after the last one that both have. Paired by seed and problem: the mean over shared
    seeds, the bootstrap over problems. Runs whose records are gone, and seeds that only one of the two has, take no
    part. ``{DATASET: {"critic", "baseline", "variants": {...}}}``
    """
    out: dict[str, Any] = {}
    for dataset in dict.fromkeys(name for run in runs for name in run.results["datasets"]):
        here = [run for run in runs if dataset in run.results["datasets"] and _has_records(run, dataset)]
        critic = focus([name for run in here for name in run.results["datasets"][dataset]["critics"]])
        told: dict[str, dict[int, tuple[FinishedRun, list[History]]]] = {}
        for run in here:
            histories = read_histories(run.config, run.folder, dataset).get(critic)
            if histories:
                told.setdefault(run.variant, {})[run.config.seed] = run, histories
        baseline, *others = told or [""]
        found = {}
        for name in others:
            one, other = told[name], told[baseline]
            last = min(run.turns(dataset, critic) for run, _ in (*one.values(), *other.values()))
            pair = [{seed: histories for seed, (_, histories) in each.items()} for each in (one, other)]
            if (value := _compared(pair[0], pair[1], last, runs[0].config)) is not None:
                found[name] = value
        if found:
            out[dataset] = {"critic": critic, "baseline": baseline, "variants": found}
    return out


def _has_records(run: FinishedRun, dataset: str) -> bool:
    return (run.folder / "eval" / dataset / "drafts.jsonl").exists()


def _compared(
    one: Mapping[int, Sequence[History]], other: Mapping[int, Sequence[History]], last: int, config: Config
) -> dict[str, Any] | None:
    """The difference after one turn, and in ``last`` the one after turn ``last``, from histories by seed."""
    after = {}
    for turn in (1, last):
        shares = [{seed: _share_by_problem(items, turn) for seed, items in each.items()} for each in (one, other)]
        found = _paired(shares[0], shares[1], config)
        if found is None:
            return None
        after[turn] = found
    return after[1] | ({"last": {"turn": last} | after[last]} if last > 1 else {})


def _share_by_problem(histories: Sequence[History], turn: int) -> dict[str, float]:
    """The share of each problem's samples that pass after so many turns; environment faults left out."""
    right: dict[str, list[bool]] = {}
    for history in histories:
        verdict = history.verdicts(turn)[turn]
        if verdict.status != "sandbox_error":
            right.setdefault(history.problem.id, []).append(verdict.accepted)
    return {problem: sum(values) / len(values) for problem, values in right.items()}


def _paired(
    one: dict[int, dict[str, float]], other: dict[int, dict[str, float]], config: Config
) -> dict[str, Any] | None:
    seeds = sorted(set(one) & set(other))
    if not seeds:
        return None
    common = sorted(set.intersection(*(set(shares[seed]) for shares in (one, other) for seed in seeds)))
    if not common:
        return None
    gaps_SP = np.array([[one[seed][problem] - other[seed][problem] for problem in common] for seed in seeds])
    gap_P = gaps_SP.mean(axis=0)
    weights_BP = bootstrap_weights(len(common), config.eval.bootstrap, config.seed)
    return {
        "pass_at_1": float(gap_P.mean()),
        "ci95": interval(weights_BP @ gap_P / len(common)),
        "seeds": seeds,
        "n_problems": len(common),
    }


def tables_of(runs: Sequence[FinishedRun], variants: dict[str, Any], differences: dict[str, Any]) -> list[tables.Table]:
    """For each data set the variants' main critic, their differences, and all critics; the paper's tables."""
    made = []
    for dataset in dict.fromkeys(name for entry in variants.values() for name in entry["datasets"]):
        critics = [
            name for entry in variants.values() for name in entry["datasets"].get(dataset, {}).get("critics", {})
        ]
        made.append(tables.variants_table(dataset, variants, focus(critics)))
        if dataset in differences:
            entry = differences[dataset]
            made.append(
                tables.variant_differences_table(dataset, entry["critic"], entry["baseline"], entry["variants"])
            )
        made.append(tables.variants_table(dataset, variants))
    for run in runs:
        made += [replace(table, title=f"{run.name}: {table.title}") for table in tables.judging_tables(run.results)]
    return made + paper.tables(runs)


def _samples_of(runs: Sequence[FinishedRun]) -> list[dict[str, Any]]:
    """A few samples of every run whose records are still there."""
    each = max(SHOWN // len(runs), 4)
    out = []
    for run in runs:
        for dataset in run.config.data.eval_names:
            if _has_records(run, dataset):
                histories = {dataset: read_histories(run.config, run.folder, dataset)}
                out += [row | {"run": run.name} for row in samples.rows(histories, each)]
    return out
