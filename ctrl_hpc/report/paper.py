"""The paper's tables with its numbers beside ours."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ctrl_hpc.report.runs import FinishedRun
from ctrl_hpc.report.tables import Table

DATASETS = {"codecontests": "CodeContests", "livecodebench": "LiveCodeBench", "mbppplus": "MBPP+"}
"""The paper's benchmarks of code, by our names."""
_CITED = "arXiv 2502.03492v2"


@functools.cache
def numbers() -> dict[str, Any]:
    """The paper's numbers: ``paper.yaml``."""
    return yaml.safe_load((Path(__file__).parent / "paper.yaml").read_text(encoding="utf-8"))


def tables(runs: Sequence[FinishedRun]) -> list[Table]:
    """Those of the paper's tables that the runs have something to say to; of several seeds the mean."""
    out = [_pass_table(entry, runs) for entry in numbers()["tables"]]
    out.append(_judgement_table(runs))
    out.append(_judgebench_table(runs))
    out.append(_votes_table(runs))
    out.append(_share_table("similarity", "Similarity of first revisions to their drafts", "codecontests", runs))
    out.append(_share_table("timeout", "Time-outs on LiveCodeBench, %", "livecodebench", runs))
    out.append(_difficulty_table(runs))
    return [table for table in out if table is not None]


def _generator_of(run: FinishedRun) -> str:
    """The paper's generator that a run's stands for: ``GPT-4o`` when it is called so, else ``Qwen``."""
    name = run.config.generator_model or run.config.generator
    return "GPT-4o" if "gpt-4o" in name.lower() else "Qwen"


ALIASES = {"rl": ("rl", "ctrl"), "sft": ("sft", "ctrl_sft")}
"""Names under which a critic that another run trained is evaluated (``eval.models``)."""


def _rows(runs: Sequence[FinishedRun], dataset: str, critic: str, generator: str | None = None) -> list[dict[str, Any]]:
    return [
        run.results["datasets"][dataset]["critics"][name]
        for run in runs
        for name in ALIASES.get(critic, (critic,))
        if name in run.results["datasets"].get(dataset, {"critics": {}})["critics"]
        and (generator is None or _generator_of(run) == generator)
    ]


def _title(title: str, source: str, runs: Sequence[FinishedRun]) -> str:
    generators = dict.fromkeys(Path(run.config.generator_model or run.config.generator).name for run in runs)
    return f"{title} ({_CITED}, {source}); ours with {', '.join(generators)}"


def _pass_table(entry: dict[str, Any], runs: Sequence[FinishedRun]) -> Table | None:
    datasets = [name for name in DATASETS if any(name in row for row in entry["rows"])]
    rows: list[tuple[str, ...]] = []
    matched = False
    for row in entry["rows"]:
        cells = [row["generator"], row["name"] + (f" ×{row['turns']}" if row["turns"] > 1 else "")]
        for dataset in datasets:
            ours = _ours(_rows(runs, dataset, row["critic"], row["generator"]), row["turns"])
            matched |= ours is not None
            cells += [_triple(row.get(dataset)), _triple(ours)]
        rows.append(tuple(cells))
    if not matched:
        return None
    columns = ["generator", "critic"]
    for dataset in datasets:
        columns += [f"{DATASETS[dataset]}: paper", "ours"]
    return Table(
        title=_title(entry["title"], entry["source"], runs),
        columns=tuple(columns),
        rows=tuple(rows),
        note=entry["note"],
        text_columns=2,
    )


def _ours(rows: Sequence[dict[str, Any]], turns: int) -> dict[str, float] | None:
    """Our numbers after some turns, in per cent; None when nobody went so far."""
    far = [row for row in rows if len(row["pass_at_1"]) > turns]
    if not far:
        return None
    out = {"pass_at_1": 100 * statistics.fmean(row["pass_at_1"][turns] for row in far)}
    if turns:
        out["delta_up"] = 100 * statistics.fmean(row["delta_up_by_turn"][turns - 1] for row in far)
        out["delta_down"] = 100 * statistics.fmean(row["delta_down_by_turn"][turns - 1] for row in far)
    return out


def _triple(values: dict[str, float] | None) -> str:
    if values is None:
        return "–"
    deltas = f" ({values['delta_up']:.2f}/{values['delta_down']:.2f})" if "delta_up" in values else ""
    return f"{values['pass_at_1']:.2f}{deltas}"


def _judgement_table(runs: Sequence[FinishedRun]) -> Table | None:
    entry = numbers()["judgement"]
    names = ("f1_pass", "f1_fail", "f1_macro")
    rows, matched = [], False
    for row in entry["rows"]:
        found = [item["judgement"] for item in _rows(runs, "codecontests", row["critic"])]
        cells = [row["name"]]
        for name in names:
            values = [item[name] for item in found if item[name] is not None]
            matched |= bool(values)
            cells += [f"{row[name]:.2f}", f"{100 * statistics.fmean(values):.2f}" if values else "–"]
        rows.append(tuple(cells))
    columns = ("critic", "pass: paper", "ours", "fail: paper", "ours", "macro: paper", "ours")
    title = _title(entry["title"], entry["source"], runs)
    return Table(title=title, columns=columns, rows=tuple(rows)) if matched else None


def _judgebench_table(runs: Sequence[FinishedRun]) -> Table | None:
    entry = numbers()["judgebench"]
    rows, matched = [], False
    for row in entry["rows"]:
        found = _judged(runs, row["critic"])
        cells = [row["name"]]
        for category in ("coding", "overall"):
            values = [item[category]["accuracy"] for item in found if category in item]
            best = [100 * accuracy[max(accuracy, key=int)] for accuracy in values]
            matched |= bool(best)
            cells += [f"{row[category]:.1f}", f"{statistics.fmean(best):.1f}" if best else "–"]
        rows.append(tuple(cells))
    columns = ("judge", "coding: paper", "ours", "overall: paper", "ours")
    title = f"{entry['title']} ({entry['source']}); ours with the most votes"
    return Table(title=title, columns=columns, rows=tuple(rows)) if matched else None


def _judged(runs: Sequence[FinishedRun], critic: str) -> list[dict[str, Any]]:
    found = [run.results.get("judgebench", {"critics": {}})["critics"] for run in runs]
    return [critics[name] for critics in found for name in ALIASES.get(critic, (critic,)) if name in critics]


def _votes_table(runs: Sequence[FinishedRun]) -> Table | None:
    votes = numbers()["judgebench"]["votes"]
    found = [item["overall"]["accuracy"] for item in _judged(runs, votes["critic"])]
    counts = sorted({int(n) for n in votes if n != "critic"} | {int(n) for accuracy in found for n in accuracy})
    rows = []
    for n in counts:
        ours = [100 * accuracy[str(n)] for accuracy in found if str(n) in accuracy]
        said = f"{votes[str(n)]:.1f}" if str(n) in votes else "–"
        rows.append((str(n), said, f"{statistics.fmean(ours):.1f}" if ours else "–"))
    title = f"JudgeBench: accuracy of CTRL by votes ({_CITED})"
    return Table(title=title, columns=("votes", "paper", "ours"), rows=tuple(rows)) if found else None


def _share_table(key: str, title: str, dataset: str, runs: Sequence[FinishedRun]) -> Table | None:
    """A number of each critic on one data set: the similarity, or the rate of time-outs after the first turn."""
    entry = numbers()[key]
    rows, matched = [], False
    for row in entry["rows"]:
        found = _rows(runs, dataset, row["critic"])
        if key == "similarity":
            values = [item["similarity"] for item in found if item["similarity"] is not None]
            said = f"{row['similarity']:.3f}"
            ours = f"{statistics.fmean(values):.3f}" if values else "–"
        else:
            values = [item["timeout_rate"][1] for item in found if item["timeout_rate"]]
            said = f"{row['timeout_rate']:.2f}"
            ours = f"{100 * statistics.fmean(values):.2f}" if values else "–"
        matched |= bool(values)
        rows.append((row["name"], said, ours))
    title = _title(title, entry["source"], runs)
    return Table(title=title, columns=("critic", "paper", "ours"), rows=tuple(rows)) if matched else None


def _difficulty_table(runs: Sequence[FinishedRun]) -> Table | None:
    entry = numbers()["difficulty"]
    rows, matched = [], False
    for row in entry["rows"]:
        cells = [row["name"]]
        for level in ("easy", "medium", "hard"):
            groups = [item["by_difficulty"].get(level) for item in _rows(runs, "codecontests", row["critic"])]
            gains = [group["pass_at_1"][-1] / group["pass_at_1"][0] - 1 for group in groups if _measurable(group)]
            matched |= bool(gains)
            cells += [f"+{row[level]:.1f}", f"{100 * statistics.fmean(gains):+.1f}" if gains else "–"]
        rows.append(tuple(cells))
    columns = ("critic", "easy: paper", "ours", "medium: paper", "ours", "hard: paper", "ours")
    title = _title("Relative gain by difficulty, %", entry["source"], runs)
    return Table(title=title, columns=columns, rows=tuple(rows)) if matched else None


def _measurable(group: dict[str, Any] | None) -> bool:
    return group is not None and group["pass_at_1"][0] > 0.0
