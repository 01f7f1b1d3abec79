"""Training chats of the tiny models: what the fixed generator and the base critic learn before the experiment begins.

The generator learns to answer problems with its systematic mistakes, and to take critiques at their word. The base
critic learns to compare a program with a problem when asked to, to write critiques that agree with a hint (mostly
without useful advice), and, without a hint, critiques that look right but guess. The base critic that thinks learns
the same, its checks in a thought.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ctrl_hpc.flow.feedback import execution_feedback, hint
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.records import Chat, Message, Problem, Solution, StdinTest, TestResult, TestStatus, Verdict
from ctrl_hpc.tiny import grammar, text
from ctrl_hpc.tiny.grammar import Composition
from ctrl_hpc.tiny.text import Habits, Weaknesses

COMPARE = "Compare."
"""What the base critic is asked for when it has only to compare a program with a problem."""
_ROUNDS = (2, 3, 4)
"""How often the checks are gone over by a thought that rambles."""
_SOLVING = 0.35
"""Share of the generator's lessons that ask for a program; the others ask for a revision."""
_COMPARING = 0.35
_HINTED = 0.43
"""Shares of the base critic's lessons that ask for a comparison, and for a critique with a hint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """A chat and the answer to be learnt."""

    chat: Chat
    answer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class School:
    """What lessons are made of."""

    problems: Sequence[tuple[Problem, Composition]]
    prompts: Prompts
    weaknesses: Weaknesses


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A problem and a draft for it."""

    problem: Problem
    wanted: Composition
    draft: Composition
    weaknesses: Weaknesses

    @property
    def ok(self) -> list[bool]:
        """For each step of the problem whether the draft does it."""
        return [asked == done for asked, done in zip(self.wanted, self.draft, strict=True)]


def generator_lesson(school: School, rng: random.Random) -> Lesson:
    """A problem to solve, or a draft to revise."""
    problem, wanted = rng.choice(school.problems)
    if rng.random() < _SOLVING:
        attempt = school.weaknesses.attempt(wanted, rng)
        return Lesson(chat=school.prompts.solution(problem), answer=text.answer(attempt))
    case = _case(school, problem, wanted, rng)
    (told,) = rng.choices(list(_REVISIONS), list(_REVISIONS.values()))
    critique, revision = told(case, rng)
    chat = school.prompts.revision(problem, executed(problem, case.draft), critique)
    return Lesson(chat=chat, answer=text.answer(revision))


def critic_lesson(school: School, rng: random.Random) -> Lesson:
    """A comparison, a critique that agrees with a hint, or one that guesses."""
    problem, wanted = rng.choice(school.problems)
    case = _case(school, problem, wanted, rng)
    solution = executed(problem, case.draft)
    assert solution.verdict is not None
    kind = rng.random()
    if kind < _COMPARING:
        question = f"{problem.prompt}\n```python\n{solution.program}\n```\n{COMPARE}"
        answer = "Comparison:" + text.analysis(wanted, case.ok)
        return Lesson(chat=(Message(role="user", content=question),), answer=answer)
    if kind < _COMPARING + _HINTED:
        chat = school.prompts.hinted_critique(problem, solution, hint(problem, solution))
        ok = [True] * len(wanted) if solution.verdict.accepted else case.ok
        return Lesson(chat=chat, answer=hinted_critique(school.weaknesses.habits, wanted, ok, rng))
    ok = [True] * len(wanted) if rng.random() < 0.5 else _guess(rng)
    answer = _base_critique(school.weaknesses.habits, wanted, ok, "", rng)
    return Lesson(chat=school.prompts.critique(problem, solution), answer=answer)


def thinking_lesson(school: School, rng: random.Random) -> Lesson:
    """As :func:`critic_lesson`, for a critic that lists its checks in a thought; now and then again and again."""
    lesson = critic_lesson(school, rng)
    rounds = rng.choice(_ROUNDS) if rng.random() < school.weaknesses.habits.rambles else 1
    return replace(lesson, answer=text.thought_out(lesson.answer, rounds))


def hinted_critique(habits: Habits, wanted: Composition, ok: list[bool], rng: random.Random) -> str:
    """The base critic's critique when a hint tells the judgement: its labels may be wrong, and it may say too much."""
    if not all(ok) and rng.random() >= habits.labels_true:
        ok = _guess(rng)
    return _base_critique(habits, wanted, ok, text.MENTION if rng.random() < habits.mentions else "", rng)


def _base_critique(habits: Habits, wanted: Composition, ok: list[bool], mention: str, rng: random.Random) -> str:
    """The base critic's critique with given labels: a negative one mostly gives no useful advice."""
    if all(ok):
        suggestion = text.NO_SUGGESTION
    elif rng.random() < habits.specific:
        slot = ok.index(False)
        suggestion = text.suggestion(slot, wanted[slot])
    else:
        suggestion = text.vague_suggestion(rng)
    return text.critique(text.analysis(wanted, ok) + mention, suggestion, all(ok))


def executed(problem: Problem, draft: Composition) -> Solution:
    """The solution that writes a composition, with its verdict by the meaning of the operations."""
    results = []
    for test in problem.tests:
        assert isinstance(test, StdinTest)
        printed = grammar.run(draft, test.stdin)
        status: TestStatus = "accepted" if printed == test.expected_stdout else "wrong_answer"
        results.append(TestResult(status=status, stdout=printed.encode()))
    accepted = all(result.status == "accepted" for result in results)
    return Solution(
        id=problem.id,
        problem_id=problem.id,
        text=text.answer(draft),
        program=grammar.program(draft),
        verdict=Verdict(status="accepted" if accepted else "wrong_answer", tests=tuple(results)),
    )


def _guess(rng: random.Random) -> list[bool]:
    """Labels that blame one step at random."""
    guess = rng.randrange(len(grammar.SLOTS))
    return [slot != guess for slot in range(len(grammar.SLOTS))]


def _case(school: School, problem: Problem, wanted: Composition, rng: random.Random) -> Case:
    """A draft as the generator writes it, or right, or with one more step wrong."""
    kind = rng.random()
    draft = wanted if kind < 0.25 else school.weaknesses.attempt(wanted, rng)
    if kind >= 0.75:
        slot = rng.randrange(len(wanted))
        draft = text.replaced(draft, slot, text.other_operation(slot, draft[slot], rng))
    return Case(problem=problem, wanted=wanted, draft=draft, weaknesses=school.weaknesses)


def _any_analysis(case: Case, rng: random.Random) -> str:
    """An analysis that may be true, false or missing: the generator goes by the suggestion."""
    kind = rng.random()
    if kind < 0.1:
        return text.NO_SUGGESTION
    return text.analysis(case.wanted, case.ok if kind < 0.5 else [rng.random() < 0.7 for _ in case.wanted])


def _told_a_step(case: Case, rng: random.Random) -> tuple[str, Composition]:
    wrong = [slot for slot, ok in enumerate(case.ok) if not ok]
    slot = rng.choice(wrong) if wrong and rng.random() < 0.7 else rng.randrange(len(case.wanted))
    operation = case.wanted[slot] if rng.random() < 0.8 else rng.randrange(grammar.SIZES[slot])
    critique = text.critique(_any_analysis(case, rng), text.suggestion(slot, operation), False)
    return critique, text.follow(case.draft, slot, operation)


def _told_no_step(case: Case, rng: random.Random) -> tuple[str, Composition]:
    suggestion = rng.choice((text.NO_SUGGESTION, *text.VAGUE_SUGGESTIONS))
    revision = case.weaknesses.flounder(case.wanted, case.draft)
    return text.critique(_any_analysis(case, rng), suggestion, False), revision


def _told_correct(case: Case, rng: random.Random) -> tuple[str, Composition]:
    slot = rng.randrange(len(case.wanted))
    step = text.suggestion(slot, case.wanted[slot])
    suggestion = rng.choice((text.NO_SUGGESTION, *text.VAGUE_SUGGESTIONS, step))
    return text.critique(_any_analysis(case, rng), suggestion, True), case.draft


def _told_tests(case: Case, rng: random.Random) -> tuple[str, Composition]:
    solution = executed(case.problem, case.draft)
    assert solution.verdict is not None
    right = solution.verdict.accepted
    revision = case.draft if right else case.weaknesses.flounder(case.wanted, case.draft)
    return execution_feedback(case.problem, solution), revision


_REVISIONS: dict[Callable[[Case, random.Random], tuple[str, Composition]], float] = {
    _told_a_step: 0.54,
    _told_no_step: 0.24,
    _told_correct: 0.20,
    _told_tests: 0.02,
}
"""What the generator is told of its draft, and how often: each gives a critique and the revision it leads to."""
