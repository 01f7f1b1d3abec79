"""The problems of a run: ``problems/NAME.jsonl`` names their tests by hash, and these lie once in the run's store.

So whoever needs no test (trainer, prompts, report) reads no test.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from ctrl_hpc import jsonl
from ctrl_hpc.flow.text import asked_for
from ctrl_hpc.records import Problem
from ctrl_hpc.store.tests import TestStore, folder_of


def store(run_dir: str | Path) -> TestStore:
    """The tests of a run."""
    return TestStore(folder_of(run_dir))


def kept(problem: Problem, tests: TestStore) -> Problem:
    """The problem with its tests in a store."""
    return tests.keep(problem, sorted(asked_for(problem)))


def write(file: Path, problems: Iterable[Problem], tests: TestStore) -> None:
    """Write problems, one after another, their tests into the store first."""

    def named() -> Iterator[Problem]:
        for problem in problems:
            yield kept(problem, tests)
        tests.sync()

    jsonl.write(file, named())


def read(file: Path, tests: TestStore | None = None) -> Iterator[Problem]:
    """The problems of a file of a run, one after another; their tests are read from the run's store when looked at."""
    tests = tests or store(file.parent.parent)
    return map(tests.bind, jsonl.iterate(Problem, file))
