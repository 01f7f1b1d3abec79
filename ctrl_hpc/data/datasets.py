"""The data sets by name, and how a run takes problems from them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from ctrl_hpc import jsonl
from ctrl_hpc.data import codecontests, humaneval, livecodebench, mbppplus, taco
from ctrl_hpc.records import Problem

Loader = Callable[[str | None, str], list[Problem]]
"""``(path, split)`` -> problems; a data set that has only some splits says which."""


def _tiny(path: str | None, split: str) -> list[Problem]:
    from ctrl_hpc.data import tiny

    splits = tiny.load()
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


def load(name: str, *, path: str | None, split: str, n: int, seed: int) -> list[Problem]:
    """At most ``n`` problems of a split: training problems drawn by ``seed``, others the first in the data set's order.

    Evaluation problems do not depend on the seed, so that runs compare. Raises ValueError for an unknown name or split.
    """
    if name not in DATASETS:
        raise ValueError(f"data: {name!r} is not a data set; allowed: {', '.join(DATASETS)}")
    problems = DATASETS[name](path, split)
    if split == "train" and len(problems) > n:
        problems = random.Random(f"problems {seed}").sample(problems, n)
    return problems[:n]
