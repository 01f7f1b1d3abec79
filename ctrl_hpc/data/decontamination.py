"""Decontamination: training problems that are near-duplicates of benchmark problems are found and left out.

Two tests over normalised words (lower case, letters and digits only): the same text, or one that contains the other;
and a large share of common n-grams.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ctrl_hpc.records import Problem

_NGRAM = 10
"""Words of an n-gram."""
_THRESHOLD = 0.5
"""Share of the shorter text's n-grams that the other text must contain for a duplicate."""
_SHORTEST = 8
"""Words that a text must have to be found inside another one: shorter ones are formulas, not statements."""
_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Duplicate:
    """A training problem that went, and the benchmark problem it is too like."""

    train_id: str
    benchmark: str
    benchmark_id: str
    reason: str
    """``same text``, ``contained text`` or ``common n-grams``."""
    overlap: float
    """Share of common n-grams; 1 for the same text."""


def words(text: str) -> list[str]:
    """The normalised words of a text."""
    return _WORD.findall(text.lower())


def decontaminate(
    training: Sequence[Problem],
    benchmarks: Mapping[str, Sequence[Problem]],
    *,
    n: int = _NGRAM,
    threshold: float | None = _THRESHOLD,
) -> tuple[list[Problem], list[Duplicate]]:
    """The training problems that are like no benchmark problem, in order, and what was left out and why.

    With a ``threshold`` of None only the same text is a duplicate. Time grows with the words of all texts together.
    """
    index = _Index(benchmarks, n)
    kept, left_out = [], []
    for problem in training:
        duplicate = index.duplicate(problem, threshold)
        if duplicate is None:
            kept.append(problem)
        else:
            left_out.append(duplicate)
    return kept, left_out


def report(left_out: Sequence[Duplicate], benchmarks: Mapping[str, Sequence[Problem]], total: int) -> str:
    """What went, for people: a line a benchmark and reason."""
    lines = [f"{len(left_out)} of {total} training problems left out as near-duplicates"]
    counts = Counter((item.benchmark, item.reason) for item in left_out)
    for name in benchmarks:
        reasons = [f"{count} {reason}" for (benchmark, reason), count in sorted(counts.items()) if benchmark == name]
        lines.append(f"  {name} ({len(benchmarks[name])} problems): {', '.join(reasons) or 'none'}")
    return "\n".join(lines)


class _Index:
    """The n-grams and the texts of all benchmark problems."""

    def __init__(self, benchmarks: Mapping[str, Sequence[Problem]], n: int) -> None:
        self._n = n
        self._problems = [(name, problem) for name, problems in benchmarks.items() for problem in problems]
        self._words = [_statement(problem) for _, problem in self._problems]
        self._texts = [" ".join(tokens) for tokens in self._words]
        self._by_text = {text: number for number, text in reversed(list(enumerate(self._texts))) if text}
        self._sizes: list[int] = []
        self._by_gram: dict[tuple[str, ...], list[int]] = defaultdict(list)
        self._short: dict[int, dict[tuple[str, ...], int]] = defaultdict(dict)
        """Texts too short for an n-gram, by their number of words."""
        self._parts: dict[int, dict[tuple[str, ...], int]] = {}
        """Shorter grams of all texts, by their number of words, made when a training text is as short."""
        for number, tokens in enumerate(self._words):
            grams = _grams(tokens, n)
            self._sizes.append(len(grams))
            for gram in grams:
                self._by_gram[gram].append(number)
            if _SHORTEST <= len(tokens) < n:
                self._short[len(tokens)].setdefault(tuple(tokens), number)

    def duplicate(self, problem: Problem, threshold: float | None) -> Duplicate | None:
        """The benchmark problem that a training problem is most like, when it is too like one."""
        own = _statement(problem)
        text = " ".join(own)
        if text in self._by_text:
            return self._found(problem, self._by_text[text], "same text", 1.0)
        if threshold is None:
            return None
        grams = _grams(own, self._n)
        common = Counter(number for gram in grams for number in self._by_gram.get(gram, ()))
        best, overlap = None, 0.0
        for number, count in common.items():
            share = count / min(len(grams), self._sizes[number])
            if share > overlap:
                best, overlap = number, share
        if best is not None and overlap >= threshold:
            contained = _contains(text, self._texts[best]) or _contains(self._texts[best], text)
            return self._found(problem, best, "contained text" if contained else "common n-grams", overlap)
        inside = self._inside(own)
        return None if inside is None else self._found(problem, inside, "contained text", 1.0)

    def _inside(self, own: Sequence[str]) -> int | None:
        """The benchmark problem whose text is in a text, or has it in itself, where one is too short for an n-gram."""
        for length, texts in self._short.items():
            for start in range(len(own) - length + 1):
                if (gram := tuple(own[start : start + length])) in texts:
                    return texts[gram]
        if not _SHORTEST <= len(own) < self._n:
            return None
        if len(own) not in self._parts:
            parts: dict[tuple[str, ...], int] = {}
            for number, tokens in enumerate(self._words):
                for gram in _grams(tokens, len(own)):
                    parts.setdefault(gram, number)
            self._parts[len(own)] = parts
        return self._parts[len(own)].get(tuple(own))

    def _found(self, problem: Problem, number: int, reason: str, overlap: float) -> Duplicate:
        name, other = self._problems[number]
        return Duplicate(train_id=problem.id, benchmark=name, benchmark_id=other.id, reason=reason, overlap=overlap)


def _statement(problem: Problem) -> list[str]:
    """The words of the statement and, for function problems, of the code it begins from."""
    return words(problem.prompt + "\n" + (problem.starter_code or ""))


def _grams(tokens: Sequence[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)}


def _contains(text: str, part: str) -> bool:
    return f" {part} " in f" {text} "
