"""The numbers of a run, from its records: what ``report/results.json`` holds.

Per data set and critic: pass@1 over turns, Δ↑, Δ↓, judgement metrics, their intervals and breakdowns; the wall time of
every stage; the learning curve of RL.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ctrl_hpc import jsonl
from ctrl_hpc.config import Config
from ctrl_hpc.evaluate import ablation, benchmarked, judgebench, metrics, tree
from ctrl_hpc.evaluate.critics import critics, unaided
from ctrl_hpc.evaluate.metrics import Outcomes
from ctrl_hpc.evaluate.run import MODES, drafts_file, folder_of, widths
from ctrl_hpc.evaluate.tree import Node
from ctrl_hpc.flow.reward import leaks_solution
from ctrl_hpc.records import Problem, Solution, Verdict
from ctrl_hpc.run import journal

PAIRS = (("base", "none"), ("sft", "base"), ("sft", "none"), ("rl", "sft"), ("rl", "none"), ("exec_feedback", "none"))
"""Critics whose difference is reported, paired by problem."""


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """One draft and what each turn made of it: a path of its tree; turns after the last node left it as it was."""

    problem: Problem
    draft: Solution
    nodes: tuple[Node, ...]

    def verdicts(self, turns: int) -> list[Verdict]:
        """The verdict of the draft and after each of the turns."""
        assert self.draft.verdict is not None
        found = [self.draft.verdict, *(node.verdict for node in self.nodes)]
        return found + [found[-1]] * (turns + 1 - len(found))


def collect(config: Config, run_dir: Path, histories: Mapping[str, dict[str, list[History]]]) -> dict[str, Any]:
    """All numbers of ``report/results.json``, from the histories by data set and critic."""
    datasets = {name: _dataset(config, items) for name, items in histories.items()}
    if config.eval.ablate:
        for name, entry in datasets.items():
            _add_ablations(config, run_dir, name, entry["critics"])
    out = {"datasets": datasets, "wall_time_s": _wall_times(run_dir), "learning_curve": learning_curve(run_dir)}
    if config.judge.votes:
        models = [name for name, critic in critics(config).items() if critic.model is not None]
        out["judgebench"] = judgebench.numbers(config, run_dir, models)
    if config.eval.critic_benchmarks.sources:
        out["critic_benchmarks"] = benchmarked.results(config, run_dir, unaided(config))
    return out


def _add_ablations(config: Config, run_dir: Path, dataset: str, rows: Mapping[str, dict[str, Any]]) -> None:
    """``ablation`` in the row of every critic whose fixes were ablated."""
    for name, critic in critics(config).items():
        for mode in MODES:
            file = ablation.file_of(folder_of(run_dir, dataset, name, critic, mode))
            if name + mode in rows and file.exists():
                fixes = jsonl.read(ablation.Fix, file)
                rows[name + mode]["ablation"] = ablation.numbers(fixes, config.eval.report_samples)


def read_histories(config: Config, run_dir: Path, dataset: str) -> dict[str, list[History]]:
    """Every sample's history, by critic (``NAME``, and ``NAME_greedy`` when greedy critics were evaluated).

    Raises ValueError when the evaluation's records are not there.
    """
    problems_file = run_dir / "problems" / f"eval-{dataset}.jsonl"
    if not problems_file.exists() or not drafts_file(run_dir, dataset, "").exists():
        raise ValueError(
            f"{run_dir}: holds no evaluation of {dataset}; run `ctrl-hpc eval` with the same arguments first"
        )
    problems = {problem.id: problem for problem in jsonl.read(Problem, problems_file)}
    modes = MODES if config.eval.greedy else MODES[:1]
    drafts = {mode: jsonl.read(Solution, drafts_file(run_dir, dataset, mode)) for mode in modes}
    out = {}
    for name, critic in critics(config).items():
        for mode in modes:
            if critic.model is None and critic.feedback is None and not critic.oracle:
                paths: list[tuple[Solution, tuple[Node, ...]]] = [(draft, ()) for draft in drafts[mode]]
            else:
                paths = _paths(config, drafts[""], folder_of(run_dir, dataset, name, critic, mode))
            out[name + mode] = [
                History(problem=problems[draft.problem_id], draft=draft, nodes=path) for draft, path in paths
            ]
    return out


def _paths(config: Config, drafts: Sequence[Solution], folder: Path) -> list[tuple[Solution, tuple[Node, ...]]]:
    """Every draft with every path of its tree."""
    if not tree.is_grown(folder, config.eval.turns):
        raise ValueError(f"{folder}: the evaluation has not finished; run `ctrl-hpc eval` with the same arguments")
    turns = [tree.children_of(nodes.values()) for nodes in tree.read(folder, config.eval.turns)]
    return [(draft, path) for draft in drafts for path in tree.paths(draft.id, turns, widths(config))]


def outcomes(histories: Sequence[History], turns: int, order: dict[str, int]) -> tuple[Outcomes, int]:
    """The histories as arrays, and how many were left out because of environment faults.

    ``order`` gives each problem its index.
    """
    problem, correct, judged, timeout = [], [], [], []
    sides = {"correct": 1, "incorrect": -1, None: 0}
    for history in histories:
        verdicts = history.verdicts(turns)
        if any(verdict.status == "sandbox_error" for verdict in verdicts):
            continue
        problem.append(order[history.problem.id])
        correct.append([verdict.accepted for verdict in verdicts])
        timeout.append([verdict.status == "time_limit" for verdict in verdicts])
        judged.append(sides[history.nodes[0].judgement] if history.nodes else 0)
    size = len(problem)
    found = Outcomes(
        problem_N=np.array(problem, dtype=np.int64),
        correct_NT=np.array(correct, dtype=bool).reshape(size, turns + 1),
        judged_N=np.array(judged, dtype=np.int64),
        timeout_NT=np.array(timeout, dtype=bool).reshape(size, turns + 1),
    )
    return found, len(histories) - size


def _dataset(config: Config, histories: dict[str, list[History]]) -> dict[str, Any]:
    ids = sorted({history.problem.id for items in histories.values() for history in items})
    order = {problem_id: index for index, problem_id in enumerate(ids)}
    weights_BP = metrics.bootstrap_weights(len(ids), config.eval.bootstrap, config.seed)
    rows, found = {}, {}
    for name, items in histories.items():
        found[name], masked = outcomes(items, config.eval.turns, order)
        judges = any(history.nodes for history in items)
        row = metrics.summary(found[name], weights_BP, judges=judges)
        row["n_masked"] = masked
        row["by_difficulty"] = _by_difficulty(items, config.eval.turns, order, weights_BP)
        row["similarity"], band = _similarity(items, order, weights_BP)
        row["ci95"] |= {"similarity": band} if band else {}
        row["leak_rate"] = _leak_rate(items)
        row["critique_tokens"] = _critique_tokens(items)
        if config.eval.n_samples > 1:
            row["pass_at_k"] = _pass_at_k(found[name])
            row["seeds"] = _seeds(items, config.eval.turns)
        rows[name] = row
    differences = {
        f"{one}{mode} - {other}": metrics.difference(
            found[one + mode], found[other + mode * (other != "none")], weights_BP
        )
        for one, other in PAIRS
        for mode in MODES
        if one + mode in found and other in found and not (mode and one == "exec_feedback")
    }
    return {
        "n_problems": len(ids),
        "n_samples": config.eval.n_samples,
        "widths": list(widths(config)),
        "critics": rows,
        "differences": differences,
    }


def _by_difficulty(
    histories: Sequence[History], turns: int, order: dict[str, int], weights_BP: npt.NDArray[np.float64]
) -> dict[str, Any]:
    """pass@1 by turn with its interval, and the number of samples, for each difficulty the problems name."""
    groups: dict[str, list[History]] = {}
    for history in histories:
        if history.problem.difficulty is not None:
            groups.setdefault(history.problem.difficulty, []).append(history)
    out = {}
    for name, items in sorted(groups.items()):
        found, _ = outcomes(items, turns, order)
        if len(found.problem_N):
            shares = [
                metrics.Ratio(numerator_N=right_N.astype(np.float64), denominator_N=np.ones(len(right_N)))
                for right_N in found.correct_NT.T
            ]
            out[name] = {
                "n_samples": len(found.problem_N),
                "pass_at_1": [share.value() for share in shares],
                "ci95": [metrics.interval(share.resampled(found.problem_N, weights_BP)) for share in shares],
            }
    return out


def _seeds(histories: Sequence[History], turns: int) -> dict[str, Any]:
    """pass@1 by turn of each seed (draft k of every problem), and its standard deviation over the seeds."""
    groups: dict[str, list[list[bool]]] = {}
    for history in histories:
        verdicts = history.verdicts(turns)
        if not any(item.status == "sandbox_error" for item in verdicts):
            seed = history.draft.id.rpartition("/")[2]
            groups.setdefault(seed, []).append([verdict.accepted for verdict in verdicts])
    shares_KT = np.array([np.mean(rows, axis=0) for rows in groups.values()])
    deviation = shares_KT.std(axis=0, ddof=1).tolist() if len(shares_KT) > 1 else [0.0] * (turns + 1)
    return {"pass_at_1": dict(zip(groups, shares_KT.tolist(), strict=True)), "std": deviation}


def _similarity(
    histories: Sequence[History], order: dict[str, int], weights_BP: npt.NDArray[np.float64]
) -> tuple[float | None, list[float] | None]:
    """Mean similarity of first revisions to their drafts, over the words of the programs (Ratcliff-Obershelp).

    With its interval; None where nothing was revised.
    """
    pairs = [
        (
            order[history.problem.id],
            SequenceMatcher(None, history.draft.program.split(), node.program.split(), autojunk=False).ratio(),
        )
        for history in histories
        for node in history.nodes[:1]
        if not node.kept and history.draft.program is not None and node.program is not None
    ]
    if not pairs:
        return None, None
    problem_N = np.array([problem for problem, _ in pairs], dtype=np.int64)
    mean = metrics.Ratio(numerator_N=np.array([ratio for _, ratio in pairs]), denominator_N=np.ones(len(pairs)))
    return mean.value(), metrics.interval(mean.resampled(problem_N, weights_BP))


def _leak_rate(histories: Sequence[History]) -> float | None:
    """Share of first critiques that give the solution away."""
    found = [
        leaks_solution(node.critique, history.draft.program, None if node.kept else node.program)
        for history in histories
        for node in history.nodes[:1]
    ]
    return float(np.mean(found)) if found else None


def _critique_tokens(histories: Sequence[History]) -> float | None:
    """Mean length of the first critiques in tokens."""
    lengths = [node.critique_tokens for history in histories for node in history.nodes[:1] if node.critique_tokens]
    return float(np.mean(lengths)) if lengths else None


def _pass_at_k(found: Outcomes) -> dict[str, list[float]]:
    """pass@k by turn, for k = 1, 2, 4, ... up to the number of samples of a problem that has the fewest."""
    counts_P = np.bincount(found.problem_N)
    present = np.flatnonzero(counts_P)
    right_PT = np.stack([np.bincount(found.problem_N, column) for column in found.correct_NT.T], axis=1).astype(int)
    out = {}
    k = 1
    while present.size and k <= counts_P[present].min():
        values = [[metrics.pass_at_k(int(counts_P[p]), int(c), k) for c in right_PT[p]] for p in present]
        out[str(k)] = [float(share) for share in np.mean(values, axis=0)]
        k *= 2
    return out


def _wall_times(run_dir: Path) -> dict[str, float]:
    """Seconds of every stage that is done."""
    times = {}
    for file in sorted(run_dir.glob("*/done.json")):
        record = json.loads(file.read_text())
        times[str(record["stage"])] = float(record["wall_time_s"])
    return times


def learning_curve(run_dir: Path) -> list[dict[str, float]]:
    """The metrics of every RL step, counted from 1: ``{"step", "reward", "kl", ...}``."""
    points: dict[int, dict[str, float]] = {}
    for line in journal.lines(journal.place(run_dir, "rl")):
        named = {key.removeprefix("rl/"): value for key, value in journal.numbers(line).items()}
        points[line["step"] + 1] = {"step": line["step"] + 1, **named}
    return [points[step] for step in sorted(points)]
