"""Sweeps over configuration keys: the files are wandb's; without a server a grid or random search runs here.

A trial is a run of its own, in ``RUN_DIR/../sweeps/SWEEP/TRIAL``; its objective is ``eval/pass_at_1`` of its report.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ctrl_hpc import config as configuration
from ctrl_hpc import jsonl
from ctrl_hpc.config.load import find
from ctrl_hpc.experiments import suite

OBJECTIVE = "eval/pass_at_1"
_GOALS = ("maximize", "minimize")
METHODS = ("grid", "random")
"""Methods that need no server."""
console = Console()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A sweep file."""

    name: str
    method: str
    goal: str
    parameters: Mapping[str, Mapping[str, Any]]
    config: str
    """The configuration that the trials change."""
    overrides: tuple[str, ...]
    """What its command sets for every trial."""


def read(file: str | Path) -> Sweep:
    """A wandb sweep file whose command is ``ctrl-hpc run|trial CONFIG ... ${args_no_hyphens}``.

    Raises ValueError naming the key that is missing or wrong.
    """
    path = find(file, "sweep")
    data = suite.read_yaml(path, "sweep")
    for key in ("method", "metric", "parameters", "command"):
        if not isinstance(data, dict) or key not in data:
            raise ValueError(f"{path}: {key}: missing; a sweep names method, metric, parameters and command")
    metric = data["metric"] if isinstance(data["metric"], dict) else {"name": data["metric"]}
    if metric.get("name") != OBJECTIVE:
        raise ValueError(f"{path}: metric.name: {metric.get('name')!r} is not allowed; it is {OBJECTIVE}")
    if metric.get("goal", _GOALS[0]) not in _GOALS:
        raise ValueError(f"{path}: metric.goal: {metric['goal']!r} is not allowed; allowed: {', '.join(_GOALS)}")
    command = [str(word) for word in data["command"]] if isinstance(data["command"], list) else []
    known = command[:1] == ["ctrl-hpc"] and command[1:2] in (["run"], ["trial"]) and len(command) >= 4
    if not known or command[-1] != "${args_no_hyphens}":
        raise ValueError(f"{path}: command: expected [ctrl-hpc, trial, CONFIG.yaml, a.b=c ..., '${{args_no_hyphens}}']")
    if not isinstance(data["parameters"], dict) or not data["parameters"]:
        raise ValueError(f"{path}: parameters: expected KEY: {{values: [...]}} for at least one key")
    for name, given in data["parameters"].items():
        if not isinstance(given, dict):
            raise ValueError(f"{path}: parameters.{name}: {given!r}: write {{value: {given}}} or {{values: [...]}}")
    return Sweep(
        name=str(data.get("name", path.stem)),
        method=str(data["method"]),
        goal=str(metric.get("goal", _GOALS[0])),
        parameters=data["parameters"],
        config=command[2],
        overrides=tuple(command[3:-1]),
    )


def trials(sweep: Sweep, count: int | None, seed: int) -> Iterator[dict[str, Any]]:
    """The settings of each trial: all of a grid (or its first ``count``), or ``count`` random ones.

    Raises ValueError for a method or distribution that needs the server.
    """
    if sweep.method not in METHODS:
        raise ValueError(f"method: {sweep.method!r} is not allowed with --local; allowed: {', '.join(METHODS)}")
    if count is not None and count < 1:
        raise ValueError(f"--count: {count} is not allowed; it must be greater than 0")
    if sweep.method == "grid":
        columns = [[(name, value) for value in _values(name, given)] for name, given in sweep.parameters.items()]
        yield from (dict(point) for point in itertools.islice(itertools.product(*columns), count))
        return
    if count is None:
        raise ValueError("--count: missing; a random search needs the number of trials")
    for number in range(count):
        chance = random.Random(f"sweep, seed {seed}, trial {number}")
        yield {name: _draw(name, given, chance) for name, given in sweep.parameters.items()}


def _values(name: str, given: Mapping[str, Any]) -> list[Any]:
    if "value" in given:
        return [given["value"]]
    if "values" in given:
        if not isinstance(given["values"], list) or not given["values"]:
            raise ValueError(f"parameters.{name}.values: {given['values']!r} is not allowed; a list of at least one")
        return list(given["values"])
    raise ValueError(f"parameters.{name}: a grid needs value or values")


def _draw(name: str, given: Mapping[str, Any], chance: random.Random) -> Any:
    if "value" in given or "values" in given:
        return chance.choice(_values(name, given))
    low, high = given.get("min"), given.get("max")
    if low is None or high is None:
        raise ValueError(f"parameters.{name}: needs value, values, or min and max")
    for bound in (low, high):
        if isinstance(bound, bool) or not isinstance(bound, int | float):  # YAML reads 1e-4 as text, 1.0e-4 as a number
            raise ValueError(f"parameters.{name}: {bound!r} is not a number; write 0.0001 or 1.0e-4")
    if low > high:
        raise ValueError(f"parameters.{name}: min {low} is greater than max {high}")
    whole = isinstance(low, int) and isinstance(high, int)
    kind = given.get("distribution", "int_uniform" if whole else "uniform")
    draw = _DISTRIBUTIONS.get(str(kind))
    if draw is None:
        raise ValueError(f"parameters.{name}.distribution: {kind!r}: with --local: {', '.join(_DISTRIBUTIONS)}")
    if kind == "log_uniform_values" and low <= 0:
        raise ValueError(f"parameters.{name}.min: {low} is not allowed with {kind}; it must be greater than 0")
    return draw(chance, low, high)


_DISTRIBUTIONS: dict[str, Callable[[random.Random, Any, Any], Any]] = {
    "uniform": lambda chance, low, high: chance.uniform(low, high),
    "int_uniform": lambda chance, low, high: chance.randint(low, high),
    "log_uniform_values": lambda chance, low, high: math.exp(chance.uniform(math.log(low), math.log(high))),
}
"""wandb's distributions that a local random search draws from."""


def run_here(file: str | Path, overrides: Sequence[str], *, count: int | None, seed: int) -> Path:
    """Run a sweep's trials as the members of a suite: one after another, those that are done skipped, one that was cut
    short continued, stages that do not depend on what the sweep changes made once.

    Prints a table, best first, also to ``sweep.json`` beside the trials; returns their folder. A trial that fails is
    shown as failed, and the next one begins; RuntimeError says so at the end.
    """
    sweep = read(file)
    settings = list(trials(sweep, count, seed))
    fixed = [*(item for item in sweep.overrides if not item.startswith("wandb.mode=")), *overrides]
    first = configuration.load(sweep.config, [*fixed, *_arguments(settings[0])])
    folder = Path(first.run_dir or "").parent / "sweeps" / Path(file).stem
    members = [_member(sweep, fixed, trial, folder / f"trial-{i:03d}") for i, trial in enumerate(settings)]
    suite.check(members)
    rows: list[dict[str, Any]] = []
    for number, (member, failure) in enumerate(suite.run_members(sweep.name, members, members, share=True)):
        objective = _objective(member.folder) if failure is None else None
        rows.append({"trial": number, **settings[number], OBJECTIVE: objective})
        jsonl.write_text(folder / "sweep.json", json.dumps(rows, indent=1) + "\n")
    _show(sweep, rows)
    failed = [str(row["trial"]) for row in rows if row[OBJECTIVE] is None]
    if failed:
        which = f"trial{'s' * (len(failed) > 1)} {', '.join(failed)}"
        raise RuntimeError(f"{which} of {len(rows)} failed (see above, and {folder}); the same command tries again")
    return folder


def _member(sweep: Sweep, fixed: Sequence[str], trial: Mapping[str, Any], run_dir: Path) -> suite.Member:
    """A trial as a run of a suite."""
    overrides = (*fixed, *_arguments(trial), f"run_dir={run_dir}")
    config = configuration.load(sweep.config, overrides)
    variant = suite.Variant(name=run_dir.name, config=sweep.config, overrides=overrides)
    return suite.Member(variant=variant, seed=config.seed, config=config)


def _arguments(trial: Mapping[str, Any]) -> list[str]:
    return [f"{name}={value}" for name, value in trial.items()]


def _objective(run_dir: Path) -> float | None:
    from ctrl_hpc.report.page import metrics

    results = json.loads((run_dir / "report" / "results.json").read_text(encoding="utf-8"))
    return metrics(results).get(OBJECTIVE)


def _show(sweep: Sweep, rows: Sequence[Mapping[str, Any]]) -> None:
    sign = 1.0 if sweep.goal == "minimize" else -1.0
    ordered = sorted(rows, key=lambda row: math.inf if row[OBJECTIVE] is None else sign * row[OBJECTIVE])
    table = Table(title=sweep.name, title_justify="left")
    for name in ordered[0]:
        table.add_column(name, justify="right")
    for row in ordered:
        table.add_row(*(f"{item:.4g}" if isinstance(item, float) else str(item) for item in row.values()))
    console.print(table)
