"""The drafts that RL critiques: executed solutions of the training problems, in a reproducible endless order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ctrl_hpc import jsonl
from ctrl_hpc.records import Problem, Solution
from ctrl_hpc.train.data_order import take


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftPool:
    """Problems with drafts whose verdict is known."""

    pairs: tuple[tuple[Problem, Solution], ...]
    seed: int

    @classmethod
    def load(cls, run_dir: Path, seed: int) -> Self:
        """The drafts of stage ``sample``; those that an environment's fault left without a verdict are not used.

        Raises ValueError when none is left.
        """
        problems = {problem.id: problem for problem in jsonl.iterate(Problem, run_dir / "problems" / "train.jsonl")}
        file = run_dir / "sample" / "solutions.jsonl"
        solutions = [item for item in jsonl.iterate(Solution, file) if item.verdict is not None]
        known = [item for item in solutions if item.verdict is not None and item.verdict.status != "sandbox_error"]
        if not known:
            raise ValueError(f"rl: {file} holds no executed draft")
        return cls(pairs=tuple((problems[item.problem_id], item) for item in known), seed=seed)

    def draw(self, position: int, count: int) -> list[tuple[Problem, Solution]]:
        """The ``count`` drafts from ``position`` on; no draft twice, so fewer where the pool is smaller."""
        rows = take(len(self.pairs), seed=self.seed, start=position, count=count)
        return [self.pairs[row] for row in dict.fromkeys(rows)]
