"""Proof before training: every canonical solution must pass its problem's tests, every known-wrong one should fail."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctrl_hpc import jsonl
from ctrl_hpc.config.machine import ExecutorConfig
from ctrl_hpc.flow.steps import execution
from ctrl_hpc.progress import Steps
from ctrl_hpc.records import Execution, Executor, Problem, Status, Verdict

_CHUNK = 32
"""Executions between two writes of what was found."""
_NO_SOLUTION = "no canonical solution"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A problem that could not be verified."""

    id: str
    reason: str
    """``STATUS: what went wrong``, or :data:`_NO_SOLUTION`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """What verification found of a set of problems."""

    problems: int
    verified: int
    """Problems whose canonical solution passes."""
    failed: tuple[Failure, ...]
    wrong_run: int
    """Known-wrong programs that were run."""
    wrong_passed: tuple[str, ...]
    """The problem of each of them that passed: the tests are too weak, or the data set errs."""

    def encode(self) -> dict[str, Any]:
        """As JSON: ``problems``, ``verified``, ``failed``, ``wrong_solutions`` and ``wrong_passed``."""
        return {
            "problems": self.problems,
            "verified": self.verified,
            "failed": [{"id": item.id, "reason": item.reason} for item in self.failed],
            "wrong_solutions": {"run": self.wrong_run, "passed": len(self.wrong_passed)},
            "wrong_passed": list(self.wrong_passed),
        }

    def lines(self, most: int = 20) -> list[str]:
        """For people: the counts, and the first failures by name."""
        wrong = f"; {len(self.wrong_passed)} of {self.wrong_run} known-wrong programs pass" if self.wrong_run else ""
        named = [f"  {item.id}: {item.reason}" for item in self.failed[:most]]
        more = [f"  and {len(self.failed) - most} more"] if len(self.failed) > most else []
        return [f"{self.verified} of {self.problems} canonical solutions pass{wrong}", *named, *more]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """What is written down of one execution."""

    key: str
    status: Status
    detail: str


def verify(problems: Sequence[Problem], executor: Executor, settings: ExecutorConfig, journal: Path) -> Ledger:
    """Run every canonical solution, and every known-wrong one, through the executors.

    What was found is kept in ``journal``, so that a verification that was stopped goes on where it was; a fault of the
    environment is not kept, and is a failure with its reason until it is run again.
    """
    found = _read(journal)
    programs: list[tuple[bool, str, str]] = []
    with Steps("verify", sum(1 for _ in _all(problems))) as steps:
        todo: dict[str, Execution] = {}
        for right, program, problem in _all(problems):
            run = execution(problem, program, settings.rules, stop_at_first_failure=True)
            key = _key(run, settings)
            programs.append((right, key, problem.id))
            if key not in found:
                todo[key] = run
            if len(todo) >= _CHUNK:
                found |= _run(todo, executor, journal)
                todo = {}
            steps.advance()
        found |= _run(todo, executor, journal)
    return _ledger(problems, programs, found)


def _all(problems: Sequence[Problem]) -> Iterator[tuple[bool, str, Problem]]:
    """``(right, program, problem)`` of every program that is known to be right or wrong."""
    for problem in problems:
        if problem.canonical_solution is not None:
            yield True, problem.canonical_solution, problem
        for program in problem.wrong_solutions or ():
            yield False, program, problem


def _key(run: Execution, settings: ExecutorConfig) -> str:
    """Of all that a verdict depends on."""
    return hashlib.sha256(f"{settings.python, settings.packages}{jsonl.line(run)}".encode()).hexdigest()[:32]


def _read(journal: Path) -> dict[str, _Found]:
    """What an earlier verification found; a line that a kill cut short is cut off."""
    if not journal.is_file():
        return {}
    content = journal.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        journal.write_bytes(whole)
    return {item.key: item for item in jsonl.iterate(_Found, journal)}


def _run(todo: dict[str, Execution], executor: Executor, journal: Path) -> dict[str, _Found]:
    """Execute, write down, return."""
    if not todo:
        return {}
    verdicts = executor.run_many(list(todo.values()))
    found = {key: _Found(key=key, status=v.status, detail=_detail(v)) for key, v in zip(todo, verdicts, strict=True)}
    kept = "".join(jsonl.line(item) for item in found.values() if item.status != "sandbox_error")
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("a", encoding="utf-8") as out:
        out.write(kept)
    return found


def _detail(verdict: Verdict) -> str:
    text = " ".join(verdict.detail.split())
    return text if len(text) <= 300 else text[:297] + "..."


def _ledger(problems: Sequence[Problem], programs: Sequence[tuple[bool, str, str]], found: dict[str, _Found]) -> Ledger:
    failed: list[Failure] = []
    passed: list[str] = []
    wrong_run = 0
    for right, key, identity in programs:
        result = found[key]
        accepted = result.status == "accepted"
        if right and not accepted:
            failed.append(Failure(id=identity, reason=f"{result.status}: {result.detail}"))
        elif not right and result.status != "sandbox_error":
            wrong_run += 1
            if accepted:
                passed.append(identity)
    missing = [problem.id for problem in problems if problem.canonical_solution is None]
    failed += [Failure(id=identity, reason=_NO_SOLUTION) for identity in missing]
    return Ledger(
        problems=len(problems),
        verified=len(problems) - len(failed),
        failed=tuple(failed),
        wrong_run=wrong_run,
        wrong_passed=tuple(passed),
    )


def proven(problems: Sequence[Problem], ledger: Ledger, *, strictly: bool) -> list[Problem]:
    """The problems that a ledger does not fail; without ``strictly`` those without a canonical solution stay."""
    out = {item.id for item in ledger.failed if strictly or item.reason != _NO_SOLUTION}
    return [problem for problem in problems if problem.id not in out]
