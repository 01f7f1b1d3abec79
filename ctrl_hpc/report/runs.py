"""Finished runs, read back; and what several of them say together, by variant."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ctrl_hpc.config import Config, RLConfig, load
from ctrl_hpc.evaluate.metrics import check_identity

FOCUS = ("rl", "sft", "base")
"""The critics that a comparison of runs is about: the first that was evaluated."""
_SEED = re.compile(r"[-_]?(?:seed[-_]?|s)(\d+)$")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedRun:
    """A run with its ``report/results.json``."""

    folder: Path
    variant: str
    """What its seeds have in common: the folder's name without ``-seedN`` or ``-sN`` at its end."""
    config: Config
    results: dict[str, Any]

    @property
    def name(self) -> str:
        """The variant with the seed."""
        return f"{self.variant}, seed {self.config.seed}"

    def turns(self, dataset: str, critic: str) -> int:
        """Turns that a critic was given."""
        return len(self.results["datasets"][dataset]["critics"][critic]["pass_at_1"]) - 1


def read(folder: str | Path) -> FinishedRun:
    """The run in a folder; raises ValueError when it is no run directory or has no report."""
    folder = Path(folder)
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder}: is not a run directory (it holds no config.yaml)")
    file = folder / "report" / "results.json"
    if not file.is_file():
        raise ValueError(f"{folder}: has no report/results.json; run `ctrl-hpc report {folder}` first")
    try:
        results = json.loads(file.read_text())
        for entry in results["datasets"].values():
            for row in entry["critics"].values():
                check_identity(row)
    except (ValueError, KeyError, AssertionError) as error:
        raise ValueError(f"{file}: cannot be used ({error}); make it anew with `ctrl-hpc report {folder}`") from None
    config = load(folder / "config.yaml")
    return FinishedRun(folder=folder, variant=_SEED.sub("", folder.resolve().name), config=config, results=results)


def read_all(folders: Sequence[str | Path]) -> list[FinishedRun]:
    """The runs in several folders; variants that would clash are told apart by the folder above."""
    runs = [read(folder) for folder in folders]
    keys = [(run.variant, run.config.seed) for run in runs]
    if len(set(keys)) == len(keys):
        return runs
    runs = [replace(run, variant=f"{run.folder.resolve().parent.name}/{run.variant}") for run in runs]
    keys = [(run.variant, run.config.seed) for run in runs]
    twice = next((key for key in keys if keys.count(key) > 1), None)
    if twice is not None:
        raise ValueError(f"report: two runs are {twice[0]} with seed {twice[1]}; give each once")
    return runs


def focus(critics: Iterable[str]) -> str:
    """The critic that a comparison is about."""
    names = list(dict.fromkeys(critics))
    others = [name for name in names if name != "none" and not name.endswith("_greedy")]
    return next((name for name in (*FOCUS, *others, *names) if name in names), "none")


def summary(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """By variant: the seeds, and for each data set and critic the mean and standard deviation over its runs.

    ``{VARIANT: {"seeds", "datasets": {NAME: {"critics": {CRITIC: {"pass_at_1": [...], "pass_at_1_sd": [...]}}}}}}``
    """
    out: dict[str, Any] = {}
    for run in runs:
        entry = out.setdefault(run.variant, {"seeds": [], "folders": [], "datasets": {}})
        entry["seeds"].append(run.config.seed)
        entry["folders"].append(str(run.folder))
        for dataset, found in run.results["datasets"].items():
            place = entry["datasets"].setdefault(dataset, {"n_problems": found["n_problems"], "critics": {}})
            for critic, row in found["critics"].items():
                place["critics"].setdefault(critic, []).append(row)
    for entry in out.values():
        for place in entry["datasets"].values():
            place["critics"] = {critic: _mean(rows) for critic, rows in place["critics"].items()}
    return out


def _mean(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    turns = min(len(row["pass_at_1"]) for row in rows)
    by_turn = [[row["pass_at_1"][turn] for row in rows] for turn in range(turns)]
    out: dict[str, Any] = {
        "n_runs": len(rows),
        "pass_at_1": [statistics.fmean(values) for values in by_turn],
        "pass_at_1_sd": [_deviation(values) for values in by_turn],
        "turn_1_of_runs": by_turn[1],
        "turn_1_band": _band(rows, by_turn[1]),
    }
    for name in ("delta_up", "delta_down", "gain"):
        values = [row[name] for row in rows]
        out[name], out[f"{name}_sd"] = statistics.fmean(values), _deviation(values)
    for name in ("accuracy", "f1_pass", "f1_fail", "f1_macro"):
        judged = [row["judgement"][name] for row in rows if row["judgement"][name] is not None]
        out[name] = statistics.fmean(judged) if judged else None
    return out


def _band(rows: Sequence[dict[str, Any]], values: Sequence[float]) -> list[float]:
    """pass@1 after one turn: one run's own 95 % interval; of several, a standard deviation about their mean."""
    if len(rows) == 1:
        return list(rows[0]["ci95"]["pass_at_1"])
    mean, deviation = statistics.fmean(values), _deviation(values)
    return [mean - deviation, mean + deviation]


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


_REACHED = 0.9
"""Share of the first variant's rise in reward that counts as reaching it."""
_SMOOTH = 5
"""Steps whose mean reward counts as a step's."""


def to_reward(runs: Sequence[FinishedRun]) -> dict[str, Any]:
    """How many critiques each variant took to nine tenths of the rise in reward of the first variant, seed by seed.

    The rise is from the mean of its first five steps to that of its last five; reached is the mean of five steps.
    Variants whose reward is another, and seeds that the first has not, take no part; None: not reached.
    ``{"baseline", "variants": {VARIANT: {SEED: critiques}}}``, empty where there is nothing to compare.
    """
    first = {run.config.seed: run for run in runs if run.variant == runs[0].variant}
    out: dict[str, dict[str, int | None]] = {}
    for run in runs:
        base = first.get(run.config.seed)
        if base is None or _rewarding(run.config.rl) != _rewarding(base.config.rl):
            continue
        rewards, wanted = _rewards(run), _rewards(base)
        if min(len(rewards), len(wanted)) >= 2 * _SMOOTH:
            steps = steps_to(rewards, wanted)
            each = run.config.rl.prompts_per_step * run.config.rl.group_size * run.config.rl.turns
            out.setdefault(run.variant, {})[str(run.config.seed)] = None if steps is None else steps * each
    return {"baseline": runs[0].variant, "variants": out} if len(out) > 1 else {}


def steps_to(rewards: Sequence[float], wanted: Sequence[float]) -> int | None:
    """Steps until ``rewards`` have risen to nine tenths of the rise of ``wanted``; None: they have not, or it has not
    risen.
    """
    low, high = statistics.fmean(wanted[:_SMOOTH]), statistics.fmean(wanted[-_SMOOTH:])
    if high <= low:
        return None
    level = low + _REACHED * (high - low)
    ends = range(_SMOOTH, len(rewards) + 1)
    return next((end for end in ends if statistics.fmean(rewards[end - _SMOOTH : end]) >= level), None)


def _rewards(run: FinishedRun) -> list[float]:
    return [point["reward"] for point in run.results["learning_curve"] if "reward" in point]


def _rewarding(options: RLConfig) -> tuple[Any, ...]:
    """What decides how much a critique earns."""
    shaped = (options.reward, options.verdict_coef, options.transition_reward, options.verdict_only_share)
    penalties = (options.leak_penalty, options.overlong_buffer, options.overlong_penalty)
    return (options.turns, options.turn_reward, options.turn_discount, *shaped, *penalties)
