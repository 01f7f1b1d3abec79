"""Adversarial tests from the executor's failures: inputs near those on which drafts failed (Code-A1, arXiv 2603.15611).

The inputs that broke a draft are changed a little; the canonical solution says what is right for them; a test is kept
when it breaks a draft, first of all one that had passed. An input on which more than half of the passing drafts
disagree with the canonical solution is likely one that the statement forbids, and is not used.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ctrl_hpc.flow.steps import execution
from ctrl_hpc.records import Executor, Problem, Rules, Solution, StdinTest

_CANDIDATES = 4
"""Changed inputs tried for each test wanted."""
_LONGEST_INPUT = 4096
"""Characters of an input that is changed; longer ones measure speed."""
_NUMBER = re.compile(r"(?<![\w.])-?\d+(?![\w.])")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Proposal:
    """A problem with new tests that its canonical solution has answered."""

    problem: Problem
    tests: tuple[StdinTest, ...]


def mutations(stdin: str, count: int, rng: random.Random) -> list[str]:
    """Up to ``count`` changed copies of an input: one of its numbers moved by one, negated, doubled, or made 0 or 1.

    The first number of a line with only that number is left alone: it says how much follows.
    """
    places = [match for match in _NUMBER.finditer(stdin) if not _is_count(stdin, match)]
    found: dict[str, None] = {}
    for _ in range(4 * count if places else 0):
        match = rng.choice(places)
        number = int(match[0])
        changed = rng.choice((number + 1, number - 1, -number, 2 * number, 0, 1))
        text = f"{stdin[: match.start()]}{changed}{stdin[match.end() :]}"
        if text != stdin and len(found) < count:
            found[text] = None
    return list(found)


def _is_count(stdin: str, match: re.Match[str]) -> bool:
    start = stdin.rfind("\n", 0, match.start()) + 1
    end = stdin.find("\n", match.end())
    line = stdin[start : end if end >= 0 else len(stdin)]
    return line.strip() == match[0] and end >= 0 and stdin[end:].strip() != ""


def strengthen(
    problems: Sequence[Problem],
    drafts: Sequence[Solution],
    executor: Executor,
    rules: Rules,
    *,
    n: int,
    seed: int,
) -> list[Problem]:
    """The problems, in order, with up to ``n`` tests more each; ``drafts`` are executed solutions of them."""
    by_problem: dict[str, list[Solution]] = {}
    for draft in drafts:
        by_problem.setdefault(draft.problem_id, []).append(draft)
    proposed = _answered(
        [(problem, _inputs(problem, by_problem.get(problem.id, []), n, seed)) for problem in problems], executor, rules
    )
    chosen = _breaking(proposed, by_problem, executor, rules, n)
    return [
        replace(problem, tests=(*problem.tests, *chosen[problem.id])) if chosen.get(problem.id) else problem
        for problem in problems
    ]


def _inputs(problem: Problem, drafts: Sequence[Solution], n: int, seed: int) -> list[str]:
    """Changed copies of the inputs on which drafts failed."""
    if problem.canonical_solution is None:
        return []
    known = {test.stdin for test in problem.tests if isinstance(test, StdinTest)}
    failed: dict[str, None] = {}
    for draft in drafts:
        statuses = draft.verdict.statuses if draft.verdict is not None else ()
        for test, status in zip(problem.tests, statuses, strict=False):
            failing = status not in ("accepted", "not_run", "sandbox_error", "unsupported")
            if failing and isinstance(test, StdinTest) and len(test.stdin) <= _LONGEST_INPUT:
                failed[test.stdin] = None
    rng = random.Random(f"adversarial {seed} {problem.id}")
    each = max(-(-_CANDIDATES * n // max(len(failed), 1)), 1)
    changed = [text for stdin in failed for text in mutations(stdin, each, rng) if text not in known]
    rng.shuffle(changed)
    return list(dict.fromkeys(changed))[: _CANDIDATES * n]


def _answered(wanted: Sequence[tuple[Problem, list[str]]], executor: Executor, rules: Rules) -> list[_Proposal]:
    """The canonical solutions' outputs; those kept that a second run repeats."""
    asked = [(problem, inputs) for problem, inputs in wanted if inputs]
    blank = [
        replace(problem, tests=tuple(StdinTest(stdin=stdin, expected_stdout="") for stdin in inputs))
        for problem, inputs in asked
    ]
    printed = [replace(execution(problem, problem.canonical_solution or "", rules), outputs=None) for problem in blank]
    first = executor.run_many(printed)
    filled = []
    for problem, verdict in zip(blank, first, strict=True):
        tests = [
            StdinTest(stdin=test.stdin, expected_stdout=result.stdout.decode())
            for test, result in zip(problem.tests, verdict.tests, strict=False)
            if isinstance(test, StdinTest) and result.status == "wrong_answer" and _is_text(result.stdout)
        ]
        if tests:
            filled.append(replace(problem, tests=tuple(tests)))
    again = executor.run_many([execution(problem, problem.canonical_solution or "", rules) for problem in filled])
    return [
        _Proposal(
            problem=problem,
            tests=tuple(
                test
                for test, status in zip(problem.tests, verdict.statuses, strict=False)
                if isinstance(test, StdinTest) and status == "accepted"
            ),
        )
        for problem, verdict in zip(filled, again, strict=True)
    ]


def _is_text(output: bytes) -> bool:
    try:
        return output.decode().strip() != ""
    except UnicodeDecodeError:
        return False


def _breaking(
    proposed: Sequence[_Proposal],
    drafts: Mapping[str, list[Solution]],
    executor: Executor,
    rules: Rules,
    n: int,
) -> dict[str, list[StdinTest]]:
    """Up to ``n`` tests of each problem that break a draft, those first that break one which had passed."""
    todo = [
        (proposal, draft)
        for proposal in proposed
        for draft in drafts[proposal.problem.id]
        if draft.program is not None and proposal.tests
    ]
    executions = [
        execution(replace(proposal.problem, tests=proposal.tests), draft.program or "", rules)
        for proposal, draft in todo
    ]
    broken: dict[str, list[tuple[bool, list[bool]]]] = {}
    for (proposal, draft), verdict in zip(todo, executor.run_many(executions), strict=True):
        passed = draft.verdict is not None and draft.verdict.accepted
        failures = [status not in ("accepted", "sandbox_error", "not_run") for status in verdict.statuses]
        broken.setdefault(proposal.problem.id, []).append((passed, failures))
    out: dict[str, list[StdinTest]] = {}
    for proposal in proposed:
        ranked = []
        rows = broken.get(proposal.problem.id, [])
        for index, test in enumerate(proposal.tests):
            of_right = [failures[index] for passed, failures in rows if passed and index < len(failures)]
            of_all = [failures[index] for _, failures in rows if index < len(failures)]
            if any(of_all) and 2 * sum(of_right) <= len(of_right):
                ranked.append((-sum(of_right), -sum(of_all), index, test))
        out[proposal.problem.id] = [test for *_, test in sorted(ranked, key=lambda item: item[:3])[:n]]
    return out
