"""Rules by which training problems are left out: CTRL's for TACO, each by a key of ``data.filters``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from ctrl_hpc.config.method import FilterConfig
from ctrl_hpc.records import Problem, StdinTest


def apply(
    problems: Sequence[Problem], rules: FilterConfig, count_tokens: Callable[[str], int] | None = None
) -> tuple[list[Problem], dict[str, int]]:
    """The problems that every rule keeps, in order, and how many each rule took; tests that a rule takes are gone.

    ``count_tokens`` is needed where ``min_tokens`` or ``max_tokens`` is set.
    """
    seen: set[tuple[str, str]] = set()
    checks: dict[str, Callable[[Problem], bool]] = {
        "without": partial(_holds, rules.without),
        "stdin_without": lambda problem: not problem.tests,
        "tokens": partial(_is_too_short_or_long, rules, count_tokens),
        "unique": partial(_is_repeated, seen) if rules.unique else lambda problem: False,
    }
    kept: list[Problem] = []
    taken = Counter(dict.fromkeys(checks, 0))
    for problem in problems:
        left = _with_tests(problem, rules.stdin_without)
        rule = next((name for name, fails in checks.items() if fails(left)), None)
        if rule is None:
            kept.append(left)
        else:
            taken[rule] += 1
    return kept, {name: count for name, count in taken.items() if count}


def _holds(texts: Sequence[str], problem: Problem) -> bool:
    return any(text in problem.prompt for text in texts)


def _with_tests(problem: Problem, texts: Sequence[str]) -> Problem:
    if not texts:
        return problem
    tests = tuple(
        test
        for test in problem.tests
        if not (isinstance(test, StdinTest) and any(text in test.stdin for text in texts))
    )
    return problem if len(tests) == len(problem.tests) else replace(problem, tests=tests)


def _is_too_short_or_long(rules: FilterConfig, count_tokens: Callable[[str], int] | None, problem: Problem) -> bool:
    if (rules.min_tokens is None and rules.max_tokens is None) or problem.split != "train":
        return False
    assert count_tokens is not None, "nothing counts tokens"
    tokens = count_tokens(problem.prompt.strip())
    too_short = rules.min_tokens is not None and tokens <= rules.min_tokens
    return too_short or (rules.max_tokens is not None and tokens >= rules.max_tokens)


def _is_repeated(seen: set[tuple[str, str]], problem: Problem) -> bool:
    key = (problem.split, problem.prompt.strip())
    if key in seen:
        return True
    seen.add(key)
    return False


def tokens_by(folder: str) -> Callable[[str], int]:
    """A counter of a text's tokens by the tokenizer of a folder. Raises ValueError where it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"data.filters.tokenizer: {folder}: cannot be loaded: {reason}") from None
    return lambda text: len(tokenizer.tokenize(text))
