"""The data sets by name, and how a run takes problems from them."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ctrl_hpc import jsonl
from ctrl_hpc.config.method import DataConfig, FilterConfig
from ctrl_hpc.data import codecontests, codecontestsplus, filters, humaneval, livecodebench, mbpp, table, taco
from ctrl_hpc.data.decontamination import decontaminate, report
from ctrl_hpc.data.table import LeftOut, Loaded
from ctrl_hpc.records import Problem

Loader = Callable[..., Loaded[Problem]]
"""``(path, split)`` -> problems and the rows left out; a data set that has only some splits says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """How a data set is read."""

    load: Loader
    splits: tuple[str, ...]
    """Splits by name; the first is taken where none is asked for."""
    rules: tuple[str, ...] = ()
    """Keys of ``data.filters`` that the loader itself takes."""
    streams: bool = False
    """Whether the loader hands each problem to ``keep`` when it is read: for what does not fit in memory."""


def _tiny(path: str | None, split: str) -> Loaded[Problem]:
    from ctrl_hpc.tiny import world

    splits = world.load()
    for name, problems in splits.items():
        if name == split:
            return Loaded(items=problems)
    raise ValueError(f"data: tiny has no split {split!r}; allowed: {', '.join(splits)}")


def _jsonl(path: str | None, split: str, *, keep: table.Keep = table.as_it_is) -> Loaded[Problem]:
    """Problems of our own schema; a problem of another split is not taken, a line that does not fit is left out."""
    if path is None:
        raise ValueError("data.path: missing; the data set jsonl is a file of problems")
    if not Path(path).is_file():
        raise ValueError(f"data.path: {path}: no such file")
    rows = table.rows(path, hub="", split=split)
    seen: set[str] = set()

    def made(row: table.Row) -> Problem:
        problem = table.usable(jsonl.decode(Problem, row.values))
        if problem.split == split:
            if problem.id in seen:
                raise ValueError(f"id: an earlier problem has the id {problem.id!r} too")
            seen.add(problem.id)
        return keep(problem)

    loaded = table.collect(rows, made)
    problems = [problem for problem in loaded.items if problem.split == split]
    if not problems:
        raise ValueError(f"data.path: {path}: no problem of the split {split!r}")
    return Loaded(items=problems, left_out=loaded.left_out)


DATASETS: dict[str, Dataset] = {
    "tiny": Dataset(load=_tiny, splits=("train", "dev", "test")),
    "jsonl": Dataset(load=_jsonl, splits=("train", "dev", "test"), streams=True),
    "taco": Dataset(load=taco.load, splits=("train", "test", "all"), rules=("list_streams",), streams=True),
    "codecontests": Dataset(load=codecontests.load, splits=("test", "dev", "train"), streams=True),
    "codecontestsplus": Dataset(load=codecontestsplus.load, splits=("train",), streams=True),
    "livecodebench": Dataset(load=livecodebench.load, splits=("test", "all"), streams=True),
    "mbpp": Dataset(load=mbpp.load, splits=("test", "validation", "train", "all")),
    "mbppplus": Dataset(load=mbpp.load_plus, splits=("test",)),
    "humaneval": Dataset(load=humaneval.load, splits=("test",)),
    "humanevalplus": Dataset(load=humaneval.load_plus, splits=("test",)),
}
"""Every data set, by the name that configurations use."""


def _tiny_oracle(problem: Problem, program: str) -> str:
    from ctrl_hpc.tiny import world

    return world.oracle_critique(problem, program)


ORACLES: dict[str, Callable[[Problem, str], str]] = {"tiny": _tiny_oracle}
"""``(problem, program) -> critique`` of the data sets that know what is wrong with a program."""


def read(
    name: str,
    path: str | None,
    split: str,
    rules: FilterConfig | None = None,
    *,
    keep: table.Keep = table.as_it_is,
) -> Loaded[Problem]:
    """All problems of a split, each as ``keep`` returns it, and the rows left out.

    Raises ValueError for an unknown name or split.
    """
    data_set = _named(name)
    options: dict[str, Any] = {key: getattr(rules, key) for key in data_set.rules} if rules is not None else {}
    loaded = data_set.load(path, split, **options, **({"keep": keep} if data_set.streams else {}))
    return replace(loaded, items=[keep(problem) for problem in loaded.items])


def _named(name: str) -> Dataset:
    if name not in DATASETS:
        raise ValueError(f"data: {name!r} is not a data set; allowed: {', '.join(DATASETS)}")
    return DATASETS[name]


def default_split(name: str) -> str:
    """The split that is taken where none is asked for."""
    return _named(name).splits[0]


def whole(name: str, path: str | None, split: str, *, keep: table.Keep = table.as_it_is) -> list[Problem]:
    """All problems of a split, the rows left out named on stderr. Raises ValueError for an unknown name or split."""
    loaded = read(name, path, split, keep=keep)
    tell(name, loaded.left_out)
    return loaded.items


def tell(name: str, left_out: list[LeftOut]) -> None:
    """Name the rows left out on stderr."""
    for line in table.lines(left_out):
        print(f"{name}: {line}", file=sys.stderr)


def load(name: str, *, path: str | None, split: str, n: int, seed: int) -> list[Problem]:
    """At most ``n`` problems of a split: training problems drawn by ``seed``, others the first in the data set's order.

    Evaluation problems do not depend on the seed, so that runs compare. Raises ValueError for an unknown name or split.
    """
    problems = whole(name, path, split)
    return drawn(problems, n, seed) if split == "train" else problems[:n]


def drawn(problems: list[Problem], n: int, seed: int) -> list[Problem]:
    """At most ``n`` of them, drawn by ``seed``."""
    return random.Random(f"problems {seed}").sample(problems, n) if len(problems) > n else problems


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """A run's training problems, and what was left out on the way to them."""

    problems: list[Problem]
    left_out: list[LeftOut] = field(default_factory=list)
    """Bad rows."""
    filtered: dict[str, int] = field(default_factory=dict)
    """Problems that each rule of ``data.filters`` took."""
    decontamination: dict[str, Any] | None = None
    """What was like a benchmark's problem (None: not asked)."""


def prepared(data: DataConfig, seed: int, *, critic: str | None = None, keep: table.Keep = table.as_it_is) -> Training:
    """A run's training problems: those that the filters keep and that are unlike the benchmarks', then drawn.

    So ``data.n_train`` problems are left where there are as many. ``critic``: the folder whose tokenizer counts where
    ``data.filters.tokenizer`` names none; ``keep``: see :func:`read`. Raises ValueError where nothing is left.
    """
    loaded = read(data.name, data.path, data.split, data.filters, keep=keep)
    tell(data.name, loaded.left_out)
    problems, taken = filters.apply(loaded.items, data.filters, _counter(data.filters, critic))
    if not problems:
        raise ValueError(f"data.filters: no problem of {data.name} is left ({taken})")
    told = None
    against = benchmarks(data, keep)
    if against:
        problems, told = without_benchmarks(problems, against, data)
        if not problems:
            raise ValueError(f"data.decontaminate: every problem of {data.name} is like one of {', '.join(against)}")
    problems = drawn(problems, data.n_train, seed)
    return Training(problems=problems, left_out=loaded.left_out, filtered=taken, decontamination=told)


def facts(found: Training) -> dict[str, Any]:
    """What was left out, as JSON: ``left_out``, ``filtered``, ``decontamination``."""
    return {
        "left_out": list(map(jsonl.encode, found.left_out)),
        "filtered": found.filtered,
        "decontamination": found.decontamination,
    }


def _counter(rules: FilterConfig, critic: str | None) -> Callable[[str], int] | None:
    if rules.min_tokens is None and rules.max_tokens is None:
        return None
    folder = rules.tokenizer or critic
    if folder is None:
        raise ValueError("data.filters.tokenizer: missing; data.filters.min_tokens and max_tokens need one")
    return filters.tokens_by(folder)


def benchmarks(data: DataConfig, keep: table.Keep = table.as_it_is) -> dict[str, list[Problem]]:
    """The problems that training problems are compared with, by data set."""
    places: dict[str, str | None] = {name: eval_path(data, name) for name in data.eval_names}
    places |= {name: place or None for name, place in data.benchmarks.items()}
    return {name: whole(name, places[name], data.eval_split, keep=keep) for name in data.compared_names}


def eval_path(data: DataConfig, name: str) -> str | None:
    """Where the evaluation problems of a data set lie; None: its default."""
    return data.eval_paths.get(name, data.eval_path)


def without_benchmarks(
    problems: list[Problem], against: Mapping[str, list[Problem]], data: DataConfig | None = None
) -> tuple[list[Problem], dict[str, Any]]:
    """The problems that are like none of the benchmarks', and a report of those that went: ``{"text", "left_out"}``."""
    data = data or DataConfig()
    threshold = None if data.exact else data.overlap
    kept, left_out = decontaminate(problems, against, n=data.ngram, threshold=threshold)
    text = report(left_out, against, len(problems))
    return kept, {
        "text": text,
        "n_before": len(problems),
        "n_after": len(kept),
        "left_out": list(map(jsonl.encode, left_out)),
    }
