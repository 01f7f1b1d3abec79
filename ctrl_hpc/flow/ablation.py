"""Which sentence taught? The fixed generator revises again with each sentence of a critique left out."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ctrl_hpc.flow.feedback import case, last_line
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.flow.steps import execute, revise
from ctrl_hpc.flow.text import parse_judgement
from ctrl_hpc.records import Critique, Executor, Generator, Problem, Revision, Rules, Sampling, Solution

Span = tuple[int, int]
"""Characters [start, end) of a text."""
Oracle = Callable[[Problem, str], str]
"""``(problem, program) -> critique`` of a data set that knows what is wrong with a program."""
_HEADING = re.compile(r"\s*(?:#{1,6}\s*)?[*_]{0,3}[A-Z][\w-]*(?:[ \t]+[\w-]+){0,3}[*_]{0,3}:[*_]{0,3}(?:[ \t]+|$)")
_END = re.compile(r"(?<=[.!?])(?<!\be\.g\.)(?<!\bi\.e\.)(?<!^\d\.)(?<!^\d\d\.)[)\"'”*_]*[ \t]+")
_FENCE = re.compile(r"\s*(?:```|~~~)")


def sentences(text: str) -> list[Span]:
    """The sentences of a critique, each with the blanks behind it: what stands between them are headings.

    A sentence ends at a full stop, an exclamation or question mark, or with its line; a block of code is one. The
    sentences that carry the judgement are none: a text without any of these has the same judgement.
    """
    said = parse_judgement(text)
    return [span for span in _units(text) if parse_judgement(without(text, span)) == said]


def _units(text: str) -> list[Span]:
    spans: list[Span] = []
    at, opened = 0, None
    for line in text.splitlines(keepends=True):
        start, at = at, at + len(line)
        if _FENCE.match(line):
            if opened is None:
                opened = start
            else:
                spans.append((opened, at))
                opened = None
        elif opened is None:
            spans += _in_line(text, start, start + len(line.rstrip("\r\n")))
    if opened is not None:
        spans.append((opened, len(text)))
    return spans


def _in_line(text: str, start: int, end: int) -> list[Span]:
    line = text[start:end]
    heading = _HEADING.match(line)
    first = heading.end() if heading else 0
    ends = [match.end() for match in _END.finditer(line, first)] + [len(line)]
    starts = [first, *ends]
    return [(start + a, start + b) for a, b in zip(starts, ends, strict=False) if line[a:b].strip(" \t-*+•_#>.")]


def without(text: str, span: Span) -> str:
    """The text without some of its characters."""
    return text[: span[0]] + text[span[1] :]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ablation:
    """A critique whose revision was executed, and what came of it without each of its sentences."""

    critique_id: str
    spans: tuple[Span, ...]
    """Its sentences, as characters of its text."""
    revisions: tuple[Revision, ...]
    """The revision without each of them, executed."""


def ablate(
    triples: Sequence[tuple[Problem, Solution, Critique]],
    generator: Generator,
    executor: Executor,
    prompts: Prompts,
    rules: Rules,
    sampling: Sampling,
    *,
    stop_at_first_failure: bool = True,
) -> list[Ablation]:
    """What becomes of each critique's revision without each of its sentences, all asked for together.

    ``sampling`` is greedy, so that what differs is the sentence; equal texts are asked for and executed once.
    """
    assert sampling.temperature == 0.0, "a sampled revision differs without any change of the critique"
    spans = [sentences(critique.text) for _, _, critique in triples]
    shorter = [
        (problem, draft, replace(critique, text=without(critique.text, span), generation=None))
        for (problem, draft, critique), found in zip(triples, spans, strict=True)
        for span in found
    ]
    revisions = revise(shorter, generator, prompts, sampling, gate=False)
    todo = [(problem, revision) for (problem, _, _), revision in zip(shorter, revisions, strict=True)]
    rest = iter(execute(todo, executor, rules, stop_at_first_failure=stop_at_first_failure))
    return [
        Ablation(critique_id=critique.id, spans=tuple(found), revisions=tuple(next(rest) for _ in found))
        for (_, _, critique), found in zip(triples, spans, strict=True)
    ]


_SAYS_SLOW = re.compile(
    r"\b(?:slow|time[sd]?|time-?outs?|TLE|inefficient|efficiency|complexity|quadratic|infinite)\b", re.I
)
_SAYS_MEMORY = re.compile(r"\bmemory\b|\bMLE\b", re.I)
_SHOWN = re.compile(r"[`\"'“‘]")


def names_failure(sentence: str, problem: Problem, draft: Solution, oracle: Oracle | None = None) -> bool:
    """Whether a sentence names what is wrong with an executed draft.

    Where the data set knows: it is a sentence of its critique of the draft that is none of its critique of the
    canonical solution. Else by the draft's verdict: it names the exception, the time or the memory, or of the failing
    test that is shown the input, the expected or the actual output (of a single character only in quotes).
    """
    if oracle is not None and problem.canonical_solution is not None and draft.program is not None:
        wrong, right = (
            {_bare(text[a:b]) for a, b in _units(text)}
            for text in (oracle(problem, draft.program), oracle(problem, problem.canonical_solution))
        )
        return _bare(sentence) in wrong - right
    verdict = draft.verdict
    if verdict is None or verdict.accepted:
        return False
    if verdict.status == "time_limit":
        return _SAYS_SLOW.search(sentence) is not None
    if verdict.status == "memory_limit":
        return _SAYS_MEMORY.search(sentence) is not None
    failed = next((n for n, status in enumerate(verdict.statuses) if status not in ("accepted", "not_run")), None)
    result = None if failed is None else verdict.result(failed)
    if failed is None or result is None or failed >= len(problem.tests):
        return False
    error = last_line(result.stderr).partition(":")[0].strip()
    texts = [error] if error else []
    texts += [text.strip() for text in case(problem.tests[failed], result)]
    return any(_holds(sentence, text) for text in texts if text)


def _holds(sentence: str, text: str) -> bool:
    """Whether a sentence holds a text as a word of its own; of one character in quotes."""
    for match in re.finditer(rf"(?<!\w){re.escape(text)}(?!\w)", sentence):
        quoted = _SHOWN.match(sentence, match.start() - 1) and _SHOWN.match(sentence, match.end())
        if len(text) > 1 or quoted:
            return True
    return False


def _bare(text: str) -> str:
    return " ".join(text.split())
