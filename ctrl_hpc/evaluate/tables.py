"""The table of results, for the terminal, Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable

from ctrl_hpc.evaluate.plots import label


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Cells as text; the first column is left-aligned, the others are right-aligned. ``strong`` rows stand out."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[int] = frozenset()


def results_table(dataset: str, entry: Mapping[str, Any]) -> Table:
    """A data set's critics: pass@1 by turn, the gain of the first with its interval, Δ↑, Δ↓, judgement; in per cent."""
    critics: Mapping[str, Any] = entry["critics"]
    turns = max(len(row["pass_at_1"]) for row in critics.values())
    columns = ("critic", "drafts", *(f"turn {turn}" for turn in range(1, turns)))
    columns += ("gain [95 %]", "Δ↑", "Δ↓", "accuracy", "F1 pass", "F1 fail", "F1 macro")
    return Table(
        title=f"{dataset}: {entry['n_problems']} problems, {entry['n_samples']} draft(s) each; pass@1 in %",
        columns=columns,
        rows=tuple(_row(name, row) for name, row in critics.items()),
        strong=frozenset(index for index, name in enumerate(critics) if name in ("rl", "rl_greedy")),
    )


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
    return Table(title=f"{dataset}: differences after one turn", columns=("", "points", "95 %"), rows=tuple(rows))


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
        strong=frozenset(index for index, name in enumerate(critics) if name in ("rl", "rl_greedy")),
    )


def rich_table(table: Table) -> RichTable:
    """For the terminal."""
    out = RichTable(title=table.title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for index, column in enumerate(table.columns):
        out.add_column(column, justify="left" if index == 0 else "right", no_wrap=index == 0)
    for number, row in enumerate(table.rows):
        out.add_row(*row, style="bold green" if number in table.strong else None)
    return out


def markdown(table: Table) -> str:
    """For a README or an issue."""
    rule = ["---", *["---:"] * (len(table.columns) - 1)]
    lines = [table.columns, rule, *table.rows]
    return f"**{table.title}**\n\n" + "".join("| " + " | ".join(line) + " |\n" for line in lines)


_LATEX = {"%": r"\%", "&": r"\&", "_": r"\_", "#": r"\#", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "Δ": r"$\Delta$"}
_LATEX |= {"–": "--", "−": "$-$"}


def latex(table: Table) -> str:
    """A ``tabular`` with booktabs' rules."""
    lines = [r"\begin{tabular}{l" + "r" * (len(table.columns) - 1) + "}", r"\toprule"]
    lines.append(_latex_row(table.columns))
    lines.append(r"\midrule")
    for number, row in enumerate(table.rows):
        cells = [rf"\textbf{{{cell}}}" for cell in map(_escaped, row)] if number in table.strong else map(_escaped, row)
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(_escaped, cells)) + r" \\"


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
