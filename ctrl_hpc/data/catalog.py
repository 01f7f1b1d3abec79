"""The data sets by name, and how a run takes problems from them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ctrl_hpc import jsonl
from ctrl_hpc.config import DataConfig
from ctrl_hpc.data import codecontests, humaneval, livecodebench, mbppplus, taco
from ctrl_hpc.data.decontamination import decontaminate, report
from ctrl_hpc.records import Problem

Loader = Callable[[str | None, str], list[Problem]]
"""``(path, split)`` -> problems; a data set that has only some splits says which."""


def _tiny(path: str | None, split: str) -> list[Problem]:
    from ctrl_hpc.tiny import world

    splits = world.load()
    for name, problems in splits.items():
        if name == split:
            return problems
    raise ValueError(f"data: tiny has no split {split!r}; allowed: {', '.join(splits)}")


def _jsonl(path: str | None, split: str) -> list[Problem]:
    """Problems of our own schema; a problem without a matching split is left out."""
    if path is None:
        raise ValueError("data.path: missing; the data set jsonl is a file of problems")
    if not Path(path).is_file():
        raise ValueError(f"data.path: {path}: no such file")
    problems = [problem for problem in jsonl.read(Problem, path) if problem.split == split]
    if not problems:
        raise ValueError(f"data.path: {path}: no problem of the split {split!r}")
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise ValueError(f"data.path: {path}: two problems have the id {problem.id!r}")
        seen.add(problem.id)
    return problems


DATASETS: dict[str, Loader] = {
    "tiny": _tiny,
    "jsonl": _jsonl,
    "taco": taco.load,
    "codecontests": codecontests.load,
    "livecodebench": livecodebench.load,
    "mbppplus": mbppplus.load,
    "humaneval": humaneval.load,
    "humanevalplus": humaneval.load_plus,
}
"""Every data set, by the name that configurations use."""


def _tiny_oracle(problem: Problem, program: str) -> str:
    from ctrl_hpc.tiny import world

    return world.oracle_critique(problem, program)


ORACLES: dict[str, Callable[[Problem, str], str]] = {"tiny": _tiny_oracle}
"""``(problem, program) -> critique`` of the data sets that know what is wrong with a program."""


def load(name: str, *, path: str | None, split: str, n: int, seed: int) -> list[Problem]:
    """At most ``n`` problems of a split: training problems drawn by ``seed``, others the first in the data set's order.

    Evaluation problems do not depend on the seed, so that runs compare. Raises ValueError for an unknown name or split.
    """
    problems = whole(name, path, split)
    return drawn(problems, n, seed) if split == "train" else problems[:n]


def whole(name: str, path: str | None, split: str) -> list[Problem]:
    """All problems of a split. Raises ValueError for an unknown name or split."""
    if name not in DATASETS:
        raise ValueError(f"data: {name!r} is not a data set; allowed: {', '.join(DATASETS)}")
    return DATASETS[name](path, split)


def drawn(problems: list[Problem], n: int, seed: int) -> list[Problem]:
    """At most ``n`` of them, drawn by ``seed``."""
    return random.Random(f"problems {seed}").sample(problems, n) if len(problems) > n else problems


def training(data: DataConfig, seed: int) -> tuple[list[Problem], dict[str, Any] | None]:
    """A run's training problems without those that are like a benchmark's, and what was left out (None: not asked).

    Decontamination comes before the drawing, so that ``data.n_train`` problems are left where there are as many.
    """
    problems = whole(data.name, data.path, data.split)
    told = None
    against = benchmarks(data)
    if against:
        problems, told = without_benchmarks(problems, against)
        if not problems:
            raise ValueError(f"data.decontaminate: every problem of {data.name} is like one of {', '.join(against)}")
    return drawn(problems, data.n_train, seed), told


def benchmarks(data: DataConfig) -> dict[str, list[Problem]]:
    """The problems that training problems are compared with, by data set."""
    places: dict[str, str | None] = {name: eval_path(data, name) for name in data.eval_names}
    places |= {name: place or None for name, place in data.benchmarks.items()}
    return {name: whole(name, places[name], data.eval_split) for name in data.compared_names}


def eval_path(data: DataConfig, name: str) -> str | None:
    """Where the evaluation problems of a data set lie; None: its default."""
    return data.eval_paths.get(name, data.eval_path)


def without_benchmarks(
    problems: list[Problem], against: Mapping[str, list[Problem]]
) -> tuple[list[Problem], dict[str, Any]]:
    """The problems that are like none of the benchmarks', and a report of those that went: ``{"text", "left_out"}``."""
    kept, left_out = decontaminate(problems, against)
    text = report(left_out, against, len(problems))
    return kept, {
        "text": text,
        "n_before": len(problems),
        "n_after": len(kept),
        "left_out": list(map(jsonl.encode, left_out)),
    }
