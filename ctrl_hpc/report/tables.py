"""The table of results, for the terminal, Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable
from rich.text import Text

from ctrl_hpc.report.plots import label


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Cells as text; columns of words are left-aligned, the others right-aligned."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[tuple[int, int]] = frozenset()
    """Cells, by row and column, that stand out."""
    note: str = ""
    """What to know of it, below it."""
    text_columns: int = 1
    """Columns of words, which are left-aligned."""


def results_table(dataset: str, entry: Mapping[str, Any]) -> Table:
    """A data set's critics: pass@1 by turn, the gain of the first with its interval, Δ↑, Δ↓, judgement; in per cent."""
    critics: Mapping[str, Any] = entry["critics"]
    turns = max(len(row["pass_at_1"]) for row in critics.values())
    columns = ("critic", "drafts", *(f"turn {turn}" for turn in range(1, turns)))
    columns += ("gain [95 %]", "Δ↑", "Δ↓", "accuracy", "F1 pass", "F1 fail", "F1 macro")
    shown = [f"pass_at_1@{turn}" for turn in range(turns)]
    shown += ["gain", "delta_up", "delta_down", "accuracy", "f1_pass", "f1_fail", "f1_macro"]
    return Table(
        title=f"{dataset}: {entry['n_problems']} problems, {entry['n_samples']} draft(s) each; pass@1 in %",
        columns=columns,
        rows=tuple(_row(name, row) for name, row in critics.items()),
        strong=best(critics, shown),
        note=_BOLD,
    )


_BOLD = (
    "Bold: the best of a column, its 95 % interval apart from all others', among critics that are sampled or greedy "
    "alike; without the oracle, and in judgement without execution feedback, which know the answer."
)
_KNOWING = {"oracle": (), "exec_feedback": ("accuracy", "f1_pass", "f1_fail", "f1_macro")}
"""Critics that know the answer, and the metrics that this concerns; none: all."""
_LOWER_IS_BETTER = ("delta_down",)


def best(critics: Mapping[str, Any], metrics: Sequence[str]) -> frozenset[tuple[int, int]]:
    """The cells of a table that are best with their interval, where metric k stands in column k + 1.

    That is where the interval lies beyond those of all others of the same mode (sampled or greedy).
    """
    found = set()
    for column, metric in enumerate(metrics, start=1):
        sign = -1.0 if metric in _LOWER_IS_BETTER else 1.0
        for greedy in (False, True):
            bands = {
                index: sorted(sign * end for end in row["ci95"][metric])
                for index, (name, row) in enumerate(critics.items())
                if name.endswith("_greedy") is greedy and metric in row["ci95"] and not _knows(name, metric)
            }
            for index, (low, _) in bands.items():
                others = [high for other, (_, high) in bands.items() if other != index]
                if others and low > max(others):
                    found.add((index, column))
    return frozenset(found)


def _knows(critic: str, metric: str) -> bool:
    known = _KNOWING.get(critic.removesuffix("_greedy"))
    return known is not None and (not known or metric in known)


def _row(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = row["ci95"]["gain"]
    judgement = row["judgement"]
    gain = "–" if judgement["accuracy"] is None else f"{100 * row['gain']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return (
        label(name),
        *(percent(value) for value in row["pass_at_1"]),
        gain,
        percent(row["delta_up"]),
        percent(row["delta_down"]),
        *(percent(judgement[key]) for key in ("accuracy", "f1_pass", "f1_fail", "f1_macro")),
    )


def differences_table(dataset: str, entry: Mapping[str, Any]) -> Table:
    """How much pass@1 after one turn differs between critics, paired by problem; in points."""
    rows = []
    for name, value in entry["differences"].items():
        one, other = name.split(" - ")
        low, high = value["ci95"]
        points = f"{100 * value['pass_at_1']:+.1f}"
        rows.append((f"{label(one)} − {label(other)}", points, f"[{100 * low:+.1f}, {100 * high:+.1f}]"))
    return Table(
        title=f"{dataset}: differences after one turn", columns=("critics", "points", "95 %"), rows=tuple(rows)
    )


def percent(value: float | None) -> str:
    """A fraction in per cent with one decimal; a dash for None."""
    return "–" if value is None else f"{100 * value:.1f}"


def terminal_table(dataset: str, entry: Mapping[str, Any]) -> Table:
    """What of :func:`results_table` fits into 80 columns, critics by the names that ``results.json`` uses."""
    critics: Mapping[str, Any] = entry["critics"]
    turns = max(len(row["pass_at_1"]) for row in critics.values())
    rows = []
    for name, row in critics.items():
        shares = [*row["pass_at_1"], row["delta_up"], row["delta_down"]]
        shares += [row["judgement"]["f1_pass"], row["judgement"]["f1_fail"]]
        rows.append((name, *map(percent, shares)))
    return Table(
        title=f"{dataset}: {entry['n_problems']} problems, pass@1 in % of drafts and after each turn; Δ of turn 1; F1",
        columns=("critic", "draft", *(f"t{turn}" for turn in range(1, turns)), "Δ↑", "Δ↓", "right", "wrong"),
        rows=tuple(rows),
        strong=best(
            critics, [*(f"pass_at_1@{t}" for t in range(turns)), "delta_up", "delta_down", "f1_pass", "f1_fail"]
        ),
    )


def rich_table(table: Table) -> RichTable:
    """For the terminal."""
    out = RichTable(title=table.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, column in enumerate(table.columns):
        out.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for number, row in enumerate(table.rows):
        out.add_row(*(_shown(cell, (number, place) in table.strong) for place, cell in enumerate(row)))
    return out


def _shown(cell: str, strong: bool) -> Text:
    return Text(cell, style="bold green" if strong else "")


def markdown(table: Table) -> str:
    """For a README or an issue."""
    rule = ["---"] * table.text_columns + ["---:"] * (len(table.columns) - table.text_columns)
    rows = [
        [f"**{cell}**" if (number, place) in table.strong else cell for place, cell in enumerate(row)]
        for number, row in enumerate(table.rows)
    ]
    lines = [table.columns, rule, *rows]
    note = f"\n{table.note}\n" if table.note else ""
    return f"**{table.title}**\n\n" + "".join("| " + " | ".join(line) + " |\n" for line in lines) + note


_LATEX = {"%": r"\%", "&": r"\&", "_": r"\_", "#": r"\#", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "Δ": r"$\Delta$"}
_LATEX |= {"–": "--", "−": "$-$", "×": r"$\times$", "±": r"$\pm$"}


def latex(table: Table) -> str:
    """A ``tabular`` with booktabs' rules; the title and the note as comments."""
    columns = "l" * table.text_columns + "r" * (len(table.columns) - table.text_columns)
    lines = [f"% {text}" for text in (table.title, table.note) if text]
    lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    lines.append(_latex_row(table.columns))
    lines.append(r"\midrule")
    for number, row in enumerate(table.rows):
        cells = [
            rf"\textbf{{{cell}}}" if (number, place) in table.strong else cell
            for place, cell in enumerate(map(_escaped, row))
        ]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(_escaped, cells)) + r" \\"


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def seeds_table(dataset: str, entry: Mapping[str, Any]) -> Table:
    """pass@1 after one and after all turns, with the standard deviation over seeds, pass@k, time-outs."""
    rows = []
    for name, row in entry["critics"].items():
        deviations, ks = row["seeds"]["std"], row["pass_at_k"]
        shares = [f"{100 * row['pass_at_1'][turn]:.1f} ± {100 * deviations[turn]:.1f}" for turn in (0, 1, -1)]
        most = max(ks, key=int)
        timeouts = row["timeout_rate"]
        rows.append((label(name), *shares, percent(ks[most][-1]), percent(timeouts[-1] if timeouts else None)))
    most = max(next(iter(entry["critics"].values()))["pass_at_k"], key=int)
    columns = ("critic", "drafts", "turn 1", "last turn", f"pass@{most}, last turn", "time-outs, last turn")
    title = f"{dataset}: over {entry['n_samples']} seeds, mean ± standard deviation; in %"
    return Table(title=title, columns=columns, rows=tuple(rows))


def judgebench_table(entry: Mapping[str, Any]) -> Table:
    """JudgeBench: accuracy by category with the most votes, overall by number of votes; in per cent."""
    critics: Mapping[str, Any] = entry["critics"]
    first = next(iter(critics.values()))
    votes = list(first["overall"]["accuracy"])
    most = max(votes, key=int)
    categories = [name for name in first if name != "overall"]
    rows = []
    for name, found in critics.items():
        low, high = found["overall"]["ci95"][most]
        cells = [percent(found[category]["accuracy"][most]) for category in categories]
        cells += [percent(found["overall"]["accuracy"][n]) for n in votes]
        rows.append((label(name), *cells, f"[{100 * low:.1f}, {100 * high:.1f}]"))
    columns = ("critic", *(f"{name}, {most} votes" for name in categories), *(f"overall, {n}" for n in votes), "95 %")
    title = f"JudgeBench: {entry['n_pairs']} pairs, {entry['mode']}; accuracy in %, no decision counts as wrong"
    return Table(title=title, columns=columns, rows=tuple(rows))


_JUDGING = (
    "critic",
    "score",
    "95 %",
    "accuracy",
    "F1 macro",
    "no judgement",
    "agreement",
    "ECE",
    "best of n",
    "stopping rule",
    "first place",
    "same in both orders",
    "refused",
)


def critic_benchmark_tables(source: str, critics: Mapping[str, Any]) -> list[Table]:
    """A benchmark of critics: its own score, what the critics' opinions are worth, and the score by category; in %."""
    if not critics:
        return []
    first = next(iter(critics.values()))
    note = ""
    if first["questions"]["n_questions"]:
        chance, most = (percent(first["questions"][key]) for key in ("random", "oracle"))
        note = f"Best of n and stopping rule: what the answer taken is worth; by chance {chance}, at most {most}."
    helpful = {name: row["normalised_helpfulness"] for name, row in critics.items() if "normalised_helpfulness" in row}
    if helpful:
        told = ", ".join(f"{label(name)} {percent(value)}" for name, value in helpful.items())
        note += f" Normalised helpfulness: {told}."
    made = [
        Table(
            title=f"{source}: {first['n']} questions, the critics as judges; in %",
            columns=_JUDGING,
            rows=tuple((label(name), *_judging_cells(row)) for name, row in critics.items()),
            note=note,
        )
    ]
    categories = {name: row["n"] for name, row in first["categories"].items()}
    if len(categories) > 1:
        rows = [
            (name, str(n), *(percent(row["categories"][name]["score"]) for row in critics.values()))
            for name, n in categories.items()
        ]
        columns = ("category", "questions", *map(label, critics))
        made.append(Table(title=f"{source}: score by category; in %", columns=columns, rows=tuple(rows)))
    return made


def judging_tables(results: Mapping[str, Any]) -> list[Table]:
    """Of JudgeBench and the benchmarks of critics, where a run has any."""
    judged = results.get("judgebench", {})
    made = [judgebench_table(judged)] if judged.get("critics") else []
    for source, critics in results.get("critic_benchmarks", {}).items():
        made += critic_benchmark_tables(source, critics)
    return made


def in_brief(table: Table) -> Table:
    """The first table of a benchmark of critics with the columns that a terminal has room for."""
    shown = [_JUDGING.index(name) for name in ("critic", "score", "95 %", "accuracy", "no judgement", "ECE", "refused")]
    columns, *rows = (tuple(row[place] for place in shown) for row in (table.columns, *table.rows))
    return replace(table, columns=columns, rows=tuple(rows))


def _judging_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    answers, questions, position = row["answers"], row["questions"], row["position"]
    low, high = row["ci95"] or (None, None)
    values = [answers.get(key) for key in ("accuracy", "f1_macro", "abstention", "agreement")]
    values += [answers.get("calibration", {}).get("ece"), questions.get("best_of_n")]
    values += [questions.get("stopping", {}).get("worth"), position["first_place"], position["consistent"]]
    interval = f"[{percent(low)}, {percent(high)}]"
    return (percent(row["score"]), interval, *map(percent, values), str(row["errors"]))


def ablation_tables(dataset: str, entry: Mapping[str, Any], most: int = 5) -> list[Table]:
    """On which sentences the fixes of each critic hang: shares, and ``most`` critiques of each with their sentences."""
    found = {name: row["ablation"] for name, row in entry["critics"].items() if row.get("ablation", {}).get("n_fixes")}
    if not found:
        return []

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}"

    shares = ("single_decisive", "none_decisive", "names_failure", "all_sentences_name_failure")
    rows = [
        (
            *(label(name), str(row["n_fixes"]), number(row["sentences"]), number(row["decisive"])),
            *(percent(row[share]) for share in shares),
        )
        for name, row in found.items()
    ]
    columns = ("critic", "fixes", "sentences", "decisive", "hang on one", "on none", "it names the failure", "any does")
    title = f"{dataset}: sentences without which a fix fails, a critique; shares of the fixes in %"
    examples = [
        (label(name), item["sample"], " | ".join(item["decisive"]), str(item["sentences"]))
        for name, row in found.items()
        for item in row["examples"][:most]
    ]
    made = [Table(title=title, columns=columns, rows=tuple(rows))]
    if examples:
        title = f"{dataset}: sentences on which a fix hangs"
        made.append(Table(title=title, columns=("critic", "sample", "sentences", "of"), rows=tuple(examples)))
    return made


def data_tables(data: Mapping[str, Any], most: int = 20) -> list[Table]:
    """The ledger of the training problems, and the rows left out of every data set that has bad ones."""
    made = []
    if "ledger" in data:
        ledger = data["ledger"]
        wrong = ledger["wrong_solutions"]
        title = (
            f"training problems: {ledger['verified']} of {ledger['problems']} canonical solutions pass their tests; "
            f"{wrong['passed']} of {wrong['run']} known-wrong programs do"
        )
        made.append(_named_rows(title, [(item["id"], item["reason"]) for item in ledger["failed"]], most))
    sets = {"training": data.get("training", {}).get("left_out", []), **data.get("evaluation", {})}
    for name, rows in sets.items():
        if rows:
            title = f"{name}: {len(rows)} bad rows left out"
            made.append(_named_rows(title, [(item["where"], item["reason"]) for item in rows], most))
    return made


def _named_rows(title: str, rows: Sequence[tuple[str, str]], most: int) -> Table:
    note = f"and {len(rows) - most} more" if len(rows) > most else ""
    return Table(title=title, columns=("which", "why"), rows=tuple(rows[:most]), note=note, text_columns=2)


def variants_table(dataset: str, variants: Mapping[str, Any], critic: str | None = None) -> Table:
    """Several runs by variant: mean ± standard deviation over their seeds, of one critic or of all; in per cent."""
    rows = []
    for variant, entry in variants.items():
        critics = entry["datasets"].get(dataset, {"critics": {}})["critics"]
        for name, row in critics.items():
            if critic in (None, name):
                rows.append((variant, label(name), str(row["n_runs"]), *_variant_cells(row)))
    columns = ("variant", "critic", "runs", "drafts", "turn 1", "last turn", "Δ↑", "Δ↓", "F1 pass", "F1 fail")
    told = "all critics" if critic is None else label(critic)
    title = f"{dataset}: variants, {told}; pass@1 in %, mean ± standard deviation over seeds"
    return Table(title=title, columns=columns, rows=tuple(rows), text_columns=2)


def _variant_cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    shares = [percent(row["pass_at_1"][turn]) for turn in (0, 1, -1)]
    if row["n_runs"] > 1:
        deviations = [row["pass_at_1_sd"][turn] for turn in (0, 1, -1)]
        shares = [f"{share} ± {percent(deviation)}" for share, deviation in zip(shares, deviations, strict=True)]
    return (*shares, *(percent(row[name]) for name in ("delta_up", "delta_down", "f1_pass", "f1_fail")))


def variant_differences_table(
    dataset: str, critic: str, baseline: str, found: Mapping[str, Mapping[str, Any]]
) -> Table:
    """How much pass@1 differs from the first variant's after one turn and the last, paired by seed and problem."""
    rows = []
    for variant, value in found.items():
        row = [f"{variant} − {baseline}", str(len(value["seeds"]))]
        for after in (value, value.get("last")):
            if after is None:
                row += ["–", "–"]
            else:
                low, high = after["ci95"]
                row += [f"{100 * after['pass_at_1']:+.1f}", f"[{100 * low:+.1f}, {100 * high:+.1f}]"]
        rows.append(tuple(row))
    title = f"{dataset}: differences between variants in points of pass@1, {label(critic)}, paired by seed and problem"
    turns = {value["last"]["turn"] for value in found.values() if "last" in value}
    last = f"after {turns.pop()} turns" if len(turns) == 1 else "after the last turn"
    columns = ("variants", "seeds", "after 1 turn", "95 %", last, "95 %")
    return Table(title=title, columns=columns, rows=tuple(rows))


def to_reward_table(found: Mapping[str, Any]) -> Table:
    """How many critiques each variant took to nine tenths of the first variant's rise in reward, by seed."""
    seeds = list(dict.fromkeys(seed for values in found["variants"].values() for seed in values))
    rows = []
    for variant, values in found["variants"].items():
        counts = [values.get(seed) for seed in seeds]
        cells = [
            f"{count:,}" if count is not None else "not reached" if seed in values else "–"
            for seed, count in zip(seeds, counts, strict=True)
        ]
        rows.append((variant, *cells))
    title = f"critiques to nine tenths of the rise in reward of {found['baseline']}"
    return Table(title=title, columns=("variant", *(f"seed {seed}" for seed in seeds)), rows=tuple(rows))
