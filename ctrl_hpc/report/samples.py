"""Samples for people to read: what became of single drafts, as plain data for the report's page."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from ctrl_hpc.flow.reward import transition
from ctrl_hpc.records import TRANSITIONS, Verdict
from ctrl_hpc.report.plots import label
from ctrl_hpc.report.results import History

COLUMNS = (
    *("dataset", "critic", "solution_id", "difficulty", "problem", "turn", "draft", "draft_verdict"),
    *("critique", "judgement", "kept", "revision", "verdict", "transition"),
)
"""Of the table that wandb gets: ``draft`` is what the turn began with, ``transition`` the first turn's."""


def rows(histories: Mapping[str, Mapping[str, Sequence[History]]], count: int) -> list[dict[str, Any]]:
    """Samples of every data set and critic, as plain data for the page."""
    return [
        {"run": "", "dataset": dataset, **sample, "critic": label(sample["critic"])}
        for dataset, items in histories.items()
        for sample in choose(items, count)
    ]


def choose(histories: Mapping[str, Sequence[History]], count: int) -> list[dict[str, Any]]:
    """Up to ``count`` samples of every critic that wrote any, its transitions in turn so that each is represented."""
    out = []
    for critic, items in histories.items():
        if critic.endswith("_greedy") and items == histories.get(critic.removesuffix("_greedy")):
            continue  # computed feedback: its greedy critiques are the sampled ones
        groups: dict[str, list[History]] = {name: [] for name in TRANSITIONS}
        for history in items:
            if history.nodes and history.draft.verdict is not None:
                groups[transition(history.draft.verdict, history.nodes[0].verdict)].append(history)
        queues = [group for group in groups.values() if group]
        taken = 0
        while queues and taken < count:
            for queue in queues:
                if taken < count:
                    out.append(describe(critic, queue.pop(0)))
                    taken += 1
            queues = [queue for queue in queues if queue]
    return out


def cells(shown: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """The samples as rows of :data:`COLUMNS`, a turn each."""
    return [
        [
            *(sample[name] for name in ("dataset", "critic", "id", "difficulty", "problem")),
            *(number, before["program"], before["verdict"]),
            *(turn[name] for name in ("critique", "judgement", "kept", "program", "verdict")),
            sample["transition"],
        ]
        for sample in shown
        for number, (before, turn) in enumerate(zip(_before(sample), sample["turns"], strict=True), 1)
    ]


def _before(sample: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What each turn began with: the draft, then the revision of the turn before."""
    return [{"program": sample["draft"], "verdict": sample["draft_verdict"]}, *sample["turns"][:-1]]


def describe(critic: str, history: History) -> dict[str, Any]:
    """A history as plain data: problem, draft, and for every turn critique, judgement, diff and verdict."""
    before = history.draft
    assert before.verdict is not None
    turns = []
    program = before.program
    for node in history.nodes:
        turns.append(
            {
                "critique": node.critique,
                "judgement": node.judgement or "none",
                "kept": node.kept,
                "program": node.program or "",
                "diff": diff(program or "", node.program or ""),
                "verdict": _verdict_text(node.verdict),
                "accepted": node.verdict.accepted,
            }
        )
        program = node.program
    return {
        "critic": critic,
        "id": before.id,
        "difficulty": history.problem.difficulty or "unknown",
        "problem": history.problem.prompt,
        "draft": before.program or before.text,
        "draft_verdict": _verdict_text(before.verdict),
        "draft_accepted": before.verdict.accepted,
        "transition": transition(before.verdict, history.nodes[0].verdict),
        "turns": turns,
    }


def _verdict_text(verdict: Verdict) -> str:
    """The status, with how many tests passed."""
    return f"{verdict.status.replace('_', ' ')}, {verdict.passed}/{verdict.total} tests"


def diff(before: str, after: str) -> list[list[str]]:
    """Lines of the change as ``[mark, text]``: mark "+", "-" or " "; empty when nothing changed."""
    if before == after:
        return []
    lines = difflib.ndiff(before.split("\n"), after.split("\n"))
    return [[line[0], line[2:]] for line in lines if line[0] != "?"]
