"""The conditions under which a reward that only looks at the revision keeps a critic honest, measured on the models.

If a wrong judgement costs nothing, training lets it drift: a generator that is always right when asked again, or that
leaves right programs alone whatever it is told, rewards a critic that calls everything wrong. So before RL starts,
right solutions are shown to the generator with critiques that are wrong about them, and the loss of passing solutions
is measured; and the generator's mistakes must be ones that resampling does not fix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.flow.reward import agrees
from ctrl_hpc.flow.steps import critique, draft, execute, revise
from ctrl_hpc.flow.text import parse_judgement
from ctrl_hpc.records import Critique, Executor, Generator, Problem, Rules, Sampling, Solution
from ctrl_hpc.tiny import grammar, text, world

_DRAFTED = 320
"""Problems on which pass rates and the base critic's judgement are measured."""
_REVISED = 96
"""Problems on which each reaction to a critique is measured."""
_CRITIQUES = 4
"""Critiques a draft from the base critic."""
_MAX_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """A measured fraction and where it must lie."""

    name: str
    value: float
    allowed_low: float
    allowed_high: float
    ok: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """A critique that is put to the generator: which draft it is about, what it says, and what must come of it."""

    name: str
    mistaken_step: bool
    """Whether one step of the draft is confused with its partner; else the draft is right."""
    suggestion: Callable[[Problem, int], str]
    """The suggestion for a problem and one of its steps."""
    correct: bool
    """The critique's overall judgement."""
    allowed: tuple[float, float]
    """Share of revisions that pass."""


def _nothing(problem: Problem, slot: int) -> str:
    return text.NO_SUGGESTION


def _vague(problem: Problem, slot: int) -> str:
    return text.VAGUE_SUGGESTIONS[slot % len(text.VAGUE_SUGGESTIONS)]


def _step(problem: Problem, slot: int) -> str:
    return text.suggestion(slot, world.composition_of(problem)[slot])


TOLD = (
    Told(
        name="right draft, no advice, Correct: still passes",
        mistaken_step=False,
        suggestion=_nothing,
        correct=True,
        allowed=(0.98, 1.0),
    ),
    Told(
        name="right draft, no advice, Incorrect: still passes",
        mistaken_step=False,
        suggestion=_nothing,
        correct=False,
        allowed=(0.0, 0.30),
    ),
    Told(
        name="right draft, vague advice, Incorrect: still passes",
        mistaken_step=False,
        suggestion=_vague,
        correct=False,
        allowed=(0.0, 0.30),
    ),
    Told(
        name="right draft, a step restated, Incorrect: still passes",
        mistaken_step=False,
        suggestion=_step,
        correct=False,
        allowed=(0.0, 0.45),
    ),
    Told(
        name="one mistake, named, Incorrect: then passes",
        mistaken_step=True,
        suggestion=_step,
        correct=False,
        allowed=(0.80, 1.0),
    ),
)
"""The critiques put to the generator."""


def probe(
    problems: Sequence[Problem],
    generator: Generator,
    critic: Generator,
    executor: Executor,
    prompts: Prompts,
    rules: Rules | None = None,
) -> list[Condition]:
    """Measure every condition with the real generator, base critic and executor.

    ``problems`` are problems of the tiny world; the first ones are used.
    """
    rules = rules or Rules()
    conditions = _drafting(problems[:_DRAFTED], generator, critic, executor, prompts, rules)
    return conditions + _revising(problems[:_REVISED], generator, executor, prompts, rules)


def _condition(name: str, value: float, low: float, high: float) -> Condition:
    return Condition(name=name, value=value, allowed_low=low, allowed_high=high, ok=low <= value <= high)


def _drafting(
    problems: Sequence[Problem],
    generator: Generator,
    critic: Generator,
    executor: Executor,
    prompts: Prompts,
    rules: Rules,
) -> list[Condition]:
    sampled = draft(problems, generator, prompts, Sampling(temperature=1.0, max_tokens=_MAX_TOKENS, seed=1))
    greedy = draft(problems, generator, prompts, Sampling(temperature=0.0, max_tokens=_MAX_TOKENS))
    twice = [*problems, *problems]
    solutions = execute(list(zip(twice, [*sampled, *greedy], strict=True)), executor, rules)
    passed = [solution.verdict is not None and solution.verdict.accepted for solution in solutions]
    sampled_rate, greedy_rate = (
        sum(part) / len(problems) for part in (passed[: len(problems)], passed[len(problems) :])
    )
    sampling = Sampling(temperature=1.0, max_tokens=_MAX_TOKENS, n=_CRITIQUES, seed=2)
    critiques = critique(list(zip(problems, sampled, strict=True)), critic, prompts, sampling)
    agreed = [agrees(one.judgement, passed[index // _CRITIQUES]) for index, one in enumerate(critiques)]
    return [
        _condition("zero-shot pass@1, sampled", sampled_rate, 0.38, 0.58),
        _condition("zero-shot pass@1, greedy less sampled", greedy_rate - sampled_rate, -0.10, 0.10),
        _condition("base critic's judgement, no hint: right", sum(agreed) / len(agreed), 0.43, 0.57),
    ]


def _revising(
    problems: Sequence[Problem], generator: Generator, executor: Executor, prompts: Prompts, rules: Rules
) -> list[Condition]:
    triples = [_put(told, number, problem) for told in TOLD for number, problem in enumerate(problems)]
    sampling = Sampling(temperature=0.0, max_tokens=_MAX_TOKENS)
    revisions = revise(triples, generator, prompts, sampling, gate=False)
    executed = execute([(triple[0], one) for triple, one in zip(triples, revisions, strict=True)], executor, rules)
    passed = [one.verdict is not None and one.verdict.accepted for one in executed]
    conditions = []
    for index, told in enumerate(TOLD):
        part = passed[index * len(problems) : (index + 1) * len(problems)]
        conditions.append(_condition(told.name, sum(part) / len(part), *told.allowed))
    return conditions


def _put(told: Told, number: int, problem: Problem) -> tuple[Problem, Solution, Critique]:
    """A draft of a problem, and the critique of it; the step in question goes round with ``number``."""
    wanted = world.composition_of(problem)
    slot = number % len(wanted)
    mistaken = text.replaced(wanted, slot, grammar.partner(wanted[slot]))
    written = mistaken if told.mistaken_step else wanted
    ok = [asked == done for asked, done in zip(wanted, written, strict=True)]
    said = text.critique(text.analysis(wanted, ok), told.suggestion(problem, slot), told.correct)
    solution = Solution(
        id=f"{problem.id}/probe",
        problem_id=problem.id,
        text=text.answer(written),
        program=grammar.program(written),
    )
    identity = f"{solution.id}#{told.name}"
    return problem, solution, Critique(id=identity, solution_id=solution.id, text=said, judgement=parse_judgement(said))
