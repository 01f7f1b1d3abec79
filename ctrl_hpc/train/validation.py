"""Quick evaluations while RL runs: pass@1 after one turn on some evaluation problems, as ``eval/pass_at_1``.

The definition is the report's; fewer problems, and the same drafts and seeds at every step, so that values of one run,
and of the trials of a sweep with the same seed, are compared on the same problems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ctrl_hpc import jsonl
from ctrl_hpc.cluster.connect import Connections
from ctrl_hpc.config import Config
from ctrl_hpc.data.problems import read as read_problems
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.flow.steps import critique, draft, execute, revise
from ctrl_hpc.records import Problem, Revision, Sampling, Solution
from ctrl_hpc.seeds import sampling_seed

METRIC = "eval/pass_at_1"
"""The objective of sweeps."""


def problems_of(config: Config, run_dir: Path) -> dict[str, list[Problem]]:
    """The problems of quick evaluations by data set; none where ``rl.eval_every`` is 0."""
    if not config.rl.eval_every:
        return {}
    files = {name: run_dir / "problems" / f"eval-{name}.jsonl" for name in config.data.eval_names}
    return {name: list(islice(read_problems(file), config.rl.eval_problems)) for name, file in files.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """The problems of quick evaluations by data set, and who drafts, critiques, revises and runs them."""

    config: Config
    folder: Path
    """Where the fixed generator's executed drafts are kept, made once in a run."""
    connections: Connections
    prompts: Prompts
    problems: Mapping[str, Sequence[Problem]]

    def due(self, step: int) -> bool:
        """Whether a quick evaluation comes before the rollouts of step ``step``: after so many updates."""
        return step > 0 and step % self.config.rl.eval_every == 0

    def metrics(self) -> dict[str, float]:
        """pass@1 after one turn by the weights that the critic's servers hold; the mean over the data sets.

        What the environment failed to run is left out; empty when that is everything.
        """
        rates = [rate for name in self.problems if (rate := self._pass_rate(name)) is not None]
        return {METRIC: sum(rates) / len(rates)} if rates else {}

    def _drafts(self, name: str) -> list[tuple[Problem, Solution]]:
        file, problems, services = self.folder / f"{name}.jsonl", self.problems[name], self.connections
        if not file.exists():
            made = draft(problems, services.generator, self.prompts, self._sampling(f"drafts, {name}"))
            executed = execute(list(zip(problems, made, strict=True)), services.executor, self.config.executor.rules)
            jsonl.write(file, executed)
        return list(zip(problems, jsonl.read(Solution, file), strict=True))

    def _sampling(self, use: str) -> Sampling:
        seed = sampling_seed(self.config.seed, 0, f"validation: {use}")
        return Sampling(temperature=self.config.eval.temperature, max_tokens=self.config.eval.max_tokens, seed=seed)

    def _pass_rate(self, name: str) -> float | None:
        config, services, pairs = self.config, self.connections, self._drafts(name)
        critiques = critique(pairs, services.critic, self.prompts, self._sampling(f"critiques, {name}"))
        triples = [(problem, solution, item) for (problem, solution), item in zip(pairs, critiques, strict=True)]
        greedy = Sampling(temperature=0.0, max_tokens=config.eval.max_tokens)
        revisions = revise(triples, services.generator, self.prompts, greedy, gate=config.eval.stop_when_correct)
        todo = [(problem, item) for (problem, _), item in zip(pairs, revisions, strict=True)]
        stop = config.rl.stop_at_first_failure
        return pass_rate(execute(todo, services.executor, config.executor.rules, stop_at_first_failure=stop))


def pass_rate(revisions: Sequence[Revision]) -> float | None:
    """The share of the executed revisions that pass; None when the environment left none."""
    verdicts = [item.verdict for item in revisions if item.verdict and item.verdict.status != "sandbox_error"]
    return sum(verdict.accepted for verdict in verdicts) / len(verdicts) if verdicts else None
