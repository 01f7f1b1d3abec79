"""The critics that an evaluation compares: models, and feedback that is computed from the execution or the problem."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ctrl_hpc.config import Config
from ctrl_hpc.config.facts import is_url
from ctrl_hpc.config.stages import STAGES
from ctrl_hpc.flow.feedback import execution_feedback
from ctrl_hpc.flow.text import parse_judgement
from ctrl_hpc.records import Critique, Judgement, Problem, Solution

Feedback = Callable[[Problem, Solution], tuple[str, Judgement | None]]
"""The text of a critique and its overall judgement."""
Oracles = Mapping[str, Callable[[Problem, str], str]]
"""``(problem, program) -> critique``, by the source of problems whose data set knows what is wrong with a program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Critic:
    """A critic: a model (``model``), computed feedback (``feedback``), or neither, for the drafts alone."""

    model: Callable[[Config, Path], str] | None = None
    """Its Hugging Face folder, or ``URL#MODEL`` of an OpenAI-compatible endpoint, in a run."""
    feedback: Feedback | None = None
    oracle: bool = False
    """Feedback is the best critique that the problem's data set can compute."""
    hinted: bool = False
    """The model is shown what the execution of the draft found, as in stage I."""


def exec_feedback(problem: Problem, solution: Solution) -> tuple[str, Judgement | None]:
    """What the execution showed, raw: judged correct only when every test passed."""
    right = solution.verdict is not None and solution.verdict.accepted
    return execution_feedback(problem, solution), "correct" if right else "incorrect"


CRITICS: dict[str, Critic] = {
    "none": Critic(),
    "base": Critic(model=lambda config, run_dir: config.critic.model),
    "sft": Critic(model=lambda config, run_dir: str(run_dir / "sft" / "hf")),
    "rl": Critic(model=lambda config, run_dir: str(run_dir / "rl" / "hf")),
    "exec_feedback": Critic(feedback=exec_feedback),
    "self_exec_feedback": Critic(model=lambda config, run_dir: config.critic.model, hinted=True),
    "oracle": Critic(oracle=True),
}
"""The critics by name; ``eval.models`` adds more."""


def critics(config: Config) -> dict[str, Critic]:
    """The critics that ``eval.critics`` names, in its order.

    Raises ValueError for an unknown name.
    """
    known = dict(CRITICS)
    for name, place in config.eval.models.items():
        if name in CRITICS or not name or "/" in name or name.endswith("_greedy"):
            raise ValueError(f"eval.models: {name!r} is not allowed as a name; not one of {', '.join(CRITICS)}")
        known[name] = Critic(model=_at(place))
    for name in config.eval.critics:
        if name not in known:
            raise ValueError(f"eval.critics: {name!r} is not a critic; allowed: {', '.join(known)}")
    return {name: known[name] for name in config.eval.critics}


def unaided(config: Config) -> list[str]:
    """The critics of ``eval.critics`` that are models and see no hint: those that benchmarks of critics score."""
    return [name for name, critic in critics(config).items() if critic.model is not None and not critic.hinted]


def check_oracles(config: Config, oracles: Oracles) -> None:
    """Raises ValueError where ``oracle`` is among the critics and a data set has none."""
    without = [name for name in config.data.eval_names if name not in oracles]
    if "oracle" in config.eval.critics and without:
        raise ValueError(f"eval.critics: oracle: {without[0]} has none; data sets that have: {', '.join(oracles)}")


def feedback_of(critic: Critic, oracles: Oracles) -> Feedback | None:
    """How a critic's feedback is computed; None for a model."""
    if not critic.oracle:
        return critic.feedback

    def best(problem: Problem, solution: Solution) -> tuple[str, Judgement | None]:
        text = oracles[problem.source](problem, solution.program or "")
        return text, parse_judgement(text)

    return best


def served(config: Config) -> bool:
    """Whether a critic of ``eval.critics`` is a folder, which the critic's array serves."""
    models = {name: item.model for name, item in critics(config).items() if item.model is not None}
    return any(not is_url(config.eval.models.get(name, "")) for name in models)


def roles(config: Config, names: Iterable[str]) -> set[str]:
    """The roles of the services that these stages call under this configuration."""
    needed = {role for name in names for role in STAGES[name].services}
    if not {"synthesize", "rl"} & set(names) and not ("eval" in names and served(config)):
        needed.discard("critic")
    if not config.generator_is_served:
        needed.discard("generator")
    return needed


def _at(place: str) -> Callable[[Config, Path], str]:
    return lambda config, run_dir: place


def feedback_critiques(pairs: Sequence[tuple[Problem, Solution]], feedback: Feedback) -> list[Critique]:
    """One computed critique of each solution, in order."""
    out = []
    for problem, solution in pairs:
        text, judgement = feedback(problem, solution)
        out.append(Critique(id=f"{solution.id}#0", solution_id=solution.id, text=text, judgement=judgement))
    return out
