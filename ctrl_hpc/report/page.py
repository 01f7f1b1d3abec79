"""The report of a run: ``report/`` with results.json, index.html, tables, and plots as PNG."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console

from ctrl_hpc import jsonl
from ctrl_hpc.config import Config
from ctrl_hpc.config.facts import is_url
from ctrl_hpc.evaluate.metrics import check_identity
from ctrl_hpc.records import TRANSITIONS
from ctrl_hpc.report import figures, paper, samples, tables
from ctrl_hpc.report.plots import NARROW
from ctrl_hpc.report.results import collect, read_histories
from ctrl_hpc.report.runs import FOCUS, FinishedRun
from ctrl_hpc.run.journal import STAGES, Artifact, Journal, Table

_TABLE_WIDTH = 92
"""Columns of the results' table: wider than a classical terminal, so that no figure is cut."""


def write(config: Config, run_dir: Path) -> dict[str, Any]:
    """Write the report of an evaluated run, print its table, journal it; returns ``results.json``.

    Raises ValueError when the run's evaluation is not there.
    """
    histories = {name: read_histories(config, run_dir, name) for name in config.data.eval_names}
    results = collect(config, run_dir, histories)
    if data := data_of(run_dir):
        results["data"] = data
    for entry in results["datasets"].values():
        for row in entry["critics"].values():
            check_identity(row)
    folder = run_dir / "report"
    folder.mkdir(parents=True, exist_ok=True)
    jsonl.write_text(folder / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    made = tables_of(results)
    this = FinishedRun(folder=run_dir, variant=config.name, config=config, results=results)
    made += paper.tables([this])
    pictures = figures.draw_all(results, folder)
    shown = samples.rows(histories, config.eval.report_samples)
    about = (
        f"Seed {config.seed}, generator {named(config.generator)}, base critic {named(config.critic.model)}, sampling "
        f"temperature {config.eval.temperature}."
    )
    write_files(
        folder, made, page(config.name, [about, made_by([run_dir])], made, pictures, shown, results["wall_time_s"])
    )
    journal = Journal(run_dir, "report")
    journal.log(
        journal.next,
        metrics(results),
        tables={"eval/samples": Table(columns=samples.COLUMNS, rows=samples.cells(shown))},
        images=pictures,
        artifacts=artifacts(config, run_dir),
        summary=metrics(results),
    )
    console = Console(width=max(Console().width, _TABLE_WIDTH))
    for name, entry in results["datasets"].items():
        console.print(tables.rich_table(tables.terminal_table(name, entry)))
    if "judgebench" in results:
        console.print(tables.rich_table(tables.judgebench_table(results["judgebench"])))
    for source, critics in results.get("critic_benchmarks", {}).items():
        for table in tables.critic_benchmark_tables(source, critics)[:1]:
            console.print(tables.rich_table(tables.in_brief(table)))
    console.print(f"report: {folder / 'index.html'}", soft_wrap=True, highlight=False)
    return results


def named(place: str) -> str:
    """A model as a reader elsewhere knows it: the last two names of its path, or its URL."""
    return place if is_url(place) else "/".join(Path(place).parts[-2:])


def made_by(run_dirs: Sequence[Path]) -> str:
    """When, by which code and which command runs were made, as their versions tell."""
    told = [f"Report of {time.strftime('%Y-%m-%d')}"]
    told += dict.fromkeys(text for run_dir in run_dirs for text in _code_of(run_dir))
    folder = run_dirs[0].resolve().name if len(run_dirs) == 1 else "RUN"
    return f"{', '.join(told)}. The run again: ctrl-hpc run {folder}/config.yaml run_dir=ANOTHER."


def _code_of(run_dir: Path) -> list[str]:
    """The day, the code and the libraries of a run."""
    file = run_dir / "versions.json"
    if not file.is_file():
        return []
    versions = json.loads(file.read_text(encoding="utf-8"))
    commit = (versions.get("git_commit") or "")[:9] + (", changed" if versions.get("git_dirty") else "")
    told = [f"run of {time.strftime('%Y-%m-%d', time.localtime(file.stat().st_mtime))}"]
    told += [f"code {versions['code']}" + (f" (commit {commit})" if commit else "")] if versions.get("code") else []
    return told + [f"{name} {versions[name]}" for name in ("torch", "transformers") if versions.get(name)]


_DESCRIPTIONS = {
    "learning_curve": "Reward, KL, entropy and clip fraction over the steps of RL",
    "learning_curves": "A metric over the steps of RL, a line for each run",
    "pass_at_1": "pass@1 of each critic over critique-revision turns, with 95 % intervals",
    "deltas": "Shares of samples that one turn makes right and makes wrong, by critic",
    "error_compounding": "Share of right drafts that revisions break, over turns, by critic",
    "similarity": "Similarity of the first revision to its draft, by critic",
    "difficulty": "pass@1 of drafts and after the last turn, by difficulty and critic",
    "variants": "pass@1 of each variant, a dot for each run",
    "reliability": "Share of right answers against the critic's probability, with the number of answers",
    "scaling": "pass@1 over the number of samples",
}
"""What a picture shows, by the beginning of its name; the figures themselves stand in the tables."""


def described(stem: str) -> str:
    """The alternative text of a picture."""
    kind = max((name for name in _DESCRIPTIONS if stem.startswith(name)), key=len, default=None)
    if kind is None:
        return stem.replace("_", " ")
    rest = stem.removeprefix(kind).strip("-_").replace("_", " ")
    return _DESCRIPTIONS[kind] + (f" ({rest})" if rest else "")


def artifacts(config: Config, run_dir: Path) -> list[Artifact]:
    """What is kept of a run: its report, and the critics it trained where ``wandb.checkpoints`` says so."""
    kept = [Artifact(name=f"{config.name}-report", type="report", path=run_dir / "report")]
    for stage in STAGES if config.wandb.checkpoints != "none" else ():
        if (trained := run_dir / stage / "hf").is_dir():
            kept.append(Artifact(name=f"{config.name}-{stage}", type="model", path=trained))
    return kept


def data_of(run_dir: Path) -> dict[str, Any]:
    """What became of the run's data: the ledger of verification, and the rows left out, as their files have them."""
    folder = run_dir / "problems"
    out: dict[str, Any] = {}
    for key, name in (("ledger", "ledger.json"), ("training", "left-out.json")):
        if (folder / name).is_file():
            out[key] = json.loads((folder / name).read_text())
    left_out = {
        file.stem.removeprefix("left-out-"): json.loads(file.read_text())["left_out"]
        for file in sorted(folder.glob("left-out-*.json"))
    }
    return out | ({"evaluation": left_out} if left_out else {})


def tables_of(results: Mapping[str, Any]) -> list[tables.Table]:
    """The tables of one run's results."""
    datasets = results["datasets"].items()
    made = [tables.results_table(name, entry) for name, entry in datasets]
    made += [tables.differences_table(name, entry) for name, entry in datasets if entry["differences"]]
    made += [tables.seeds_table(name, entry) for name, entry in datasets if entry["n_samples"] > 1]
    made += [table for name, entry in datasets for table in tables.ablation_tables(name, entry)]
    made += tables.judging_tables(results)
    if "data" in results:
        made += tables.data_tables(results["data"])
    return made


def write_files(folder: Path, made: Sequence[tables.Table], index: str) -> None:
    """The tables as Markdown and LaTeX, and the page."""
    jsonl.write_text(folder / "results.md", "\n".join(map(tables.markdown, made)))
    jsonl.write_text(folder / "results.tex", "\n".join(map(tables.latex, made)))
    jsonl.write_text(folder / "index.html", index)


def metrics(results: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that are journalled: ``eval/DATASET/CRITIC/...``, and ``eval/pass_at_1``, the objective of sweeps.

    pass@1 is that after one turn; the objective is its mean over the data sets, of the first critic of ``FOCUS`` that
    was evaluated. JudgeBench's accuracy is that with the most votes;
    a benchmark of critics has its own score.
    """
    out: dict[str, float] = {}
    objective = []
    for dataset, entry in results["datasets"].items():
        critics = entry["critics"]
        for name, row in critics.items():
            prefix = f"eval/{dataset}/{name}"
            out[f"{prefix}/pass_at_1"] = row["pass_at_1"][1]
            out[f"{prefix}/pass_at_1_last"] = row["pass_at_1"][-1]
            out[f"{prefix}/delta_up"], out[f"{prefix}/delta_down"] = row["delta_up"], row["delta_down"]
            if row["judgement"]["f1_macro"] is not None:
                out[f"{prefix}/f1_macro"] = row["judgement"]["f1_macro"]
        best = next(name for name in (*FOCUS, *critics) if name in critics)
        objective.append(critics[best]["pass_at_1"][1])
    if objective:
        out["eval/pass_at_1"] = sum(objective) / len(objective)
    for name, rows in results.get("judgebench", {}).get("critics", {}).items():
        accuracy = rows["overall"]["accuracy"]
        out[f"eval/judgebench/{name}/accuracy"] = accuracy[max(accuracy, key=int)]
    for source, found in results.get("critic_benchmarks", {}).items():
        for name, row in found.items():
            if row["score"] is not None:
                out[f"eval/critic_benchmarks/{source}/{name}/score"] = row["score"]
    return out


def encoded(picture: Path) -> str:
    """A picture's bytes as text."""
    return base64.b64encode(picture.read_bytes()).decode("ascii")


def page(
    title: str,
    about: Sequence[str],
    made: Sequence[tables.Table],
    pictures: Sequence[Path],
    shown: Sequence[Mapping[str, Any]],
    wall_time_s: Mapping[str, float],
) -> str:
    """``index.html``: one file that needs nothing else, pictures and samples inside."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    # a "<" inside a script element could end it
    data = json.dumps(shown, separators=(",", ":")).replace("<", "\\u003c")
    return environment.get_template("report.html.j2").render(
        title=title,
        about=about,
        tables=made,
        pictures=[
            (described(picture.stem), encoded(picture), encoded(picture.parent / NARROW / picture.name))
            for picture in pictures
        ],
        wall_time_s=wall_time_s,
        samples=data,
        transitions=TRANSITIONS,
    )
