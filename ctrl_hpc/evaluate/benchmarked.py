"""The critics of a run on benchmarks of critics (``eval.critic_benchmarks``): asked, on disk, counted.

``problems/critic-benchmark-NAME.jsonl`` has a benchmark's questions, ``eval/critic_benchmarks/NAME/CRITIC.jsonl`` what
a critic says of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Template

from ctrl_hpc import jsonl
from ctrl_hpc.config import Config
from ctrl_hpc.evaluate.critic_benchmarks import Judged, numbers
from ctrl_hpc.evaluate.write_ahead import WriteAheadLog, in_parts
from ctrl_hpc.flow.comparison import comparison_chat, comparison_template, parse_choice
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.flow.steps import critique, majority
from ctrl_hpc.flow.text import extract_program
from ctrl_hpc.records import (
    Chat,
    Critique,
    Generation,
    Generator,
    LabelledAnswers,
    Problem,
    Sampling,
    Solution,
)
from ctrl_hpc.rollout.confidence import right_probability
from ctrl_hpc.seeds import evaluation_seed


def questions_file(run_dir: Path, source: str) -> Path:
    """Where the questions of a source lie, beside the run's problems."""
    return run_dir / "problems" / f"critic-benchmark-{_name(source)}.jsonl"


def judged_file(run_dir: Path, source: str, critic: str) -> Path:
    """Where what a critic says of a source's answers lies."""
    return run_dir / "eval" / "critic_benchmarks" / _name(source) / f"{critic}.jsonl"


def _name(source: str) -> str:
    return source.replace("/", "-")


def judge(
    config: Config,
    run_dir: Path,
    source: str,
    name: str,
    serve: Callable[[], Generator],
    prompts: Prompts,
) -> None:
    """Ask a critic about every answer of a source, unless it has been asked; ``serve`` gets it served.

    An answer that the critic refuses, as one that is too long, is counted. Raises ValueError where it refuses all.
    """
    file = judged_file(run_dir, source, name)
    if file.exists():
        return
    questions = jsonl.read(LabelledAnswers, questions_file(run_dir, source))
    asked = config.eval.critic_benchmarks
    ask = _Ask(
        critic=serve(),
        prompts=prompts,
        comparison=comparison_template(config.judge.template),
        sampling=Sampling(
            temperature=config.eval.temperature if asked.votes > 1 else 0.0,
            max_tokens=config.eval.max_tokens,
            n=asked.votes,
        ),
    )

    def work(part: Sequence[LabelledAnswers], number: int, log: WriteAheadLog) -> list[Judged]:
        seeds = [evaluation_seed(config.seed, "critic benchmark", source, name, number, kind) for kind in range(3)]
        found = log.once("opinions", number, Judged, lambda: ask.opinions(part, seeds[0]))
        if not asked.pairwise:
            return found
        choices = log.once("choices", number, _Choices, lambda: ask.choices(part, seeds[1:]))
        return [
            replace(judged, votes=choice.votes, errors=judged.errors + choice.errors)
            for judged, choice in zip(found, choices, strict=True)
        ]

    size = max(config.eval.chunk // (asked.votes * max(len(item.answers) for item in questions)), 1)
    found = in_parts(file, Judged, questions, work, size=size, at_once=config.eval.chunks_in_flight)
    if all(judged.errors >= len(item.answers) for item, judged in zip(questions, found, strict=True)):
        file.unlink()
        raise ValueError(f"eval.critic_benchmarks: {source}: {name} refuses every answer: {'; '.join(ask.refused[:1])}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choices:
    """The votes on a pair, as the log keeps them."""

    votes: tuple[str | None, ...] = ()
    errors: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ask:
    """How a critic is asked."""

    critic: Generator
    prompts: Prompts
    comparison: Template
    sampling: Sampling
    refused: list[str] = field(default_factory=list)
    """Why it refused what it did."""

    def opinions(self, questions: Sequence[LabelledAnswers], seed: int) -> list[Judged]:
        """What it says of each answer by itself."""
        how = replace(self.sampling, seed=seed)

        def asked(part: Sequence[tuple[Problem, Solution]], first: int) -> list[list[Critique]]:
            flat = critique(part, self.critic, self.prompts, replace(how, first=first))
            return [flat[start : start + how.n] for start in range(0, len(flat), how.n)]

        samples = [_sample(item, answer) for item in questions for answer in item.answers]
        found = self._each(samples, asked)
        rows = iter(found)
        return [self._judged(item, [next(rows) for _ in item.answers]) for item in questions]

    def choices(self, questions: Sequence[LabelledAnswers], seeds: Sequence[int]) -> list[_Choices]:
        """The better answer of each pair by as many votes in either order, in turn; none of what is no pair."""
        pairs = [item for item in questions if item.is_pair]
        sides: list[list[list[str | None] | None]] = []
        for swapped, seed in enumerate(seeds):
            how = replace(self.sampling, n=(self.sampling.n + 1) // 2, seed=seed)
            chats = [
                comparison_chat(
                    self.comparison,
                    self.prompts.system,
                    item.question,
                    item.answers[swapped],
                    item.answers[1 - swapped],
                )
                for item in pairs
            ]
            made = self._each(chats, partial(self._completed, how))
            sides.append([None if found is None else _sides(found, swapped=bool(swapped)) for found in made])
        of_pair = iter(zip(*sides, strict=True))
        return [_alternating(*next(of_pair)) if item.is_pair else _Choices() for item in questions]

    def _completed(self, how: Sampling, chats: Sequence[Chat], first: int) -> list[list[Generation]]:
        return self.critic.complete(chats, replace(how, first=first))

    def _each[T, R](self, items: Sequence[T], asked: Callable[[Sequence[T], int], list[R]]) -> list[R | None]:
        """The answers to items that are asked together, each by its number; where that is refused, one by one."""
        try:
            return list(asked(items, 0)) if items else []
        except ValueError:
            out: list[R | None] = []
            for index, item in enumerate(items):
                try:
                    out += asked([item], index)
                except ValueError as error:
                    self.refused.append(str(error))
                    out.append(None)
            return out

    def _judged(self, item: LabelledAnswers, critiques: Sequence[Sequence[Critique] | None]) -> Judged:
        said = [[found.judgement for found in votes or () if found.judgement is not None] for votes in critiques]
        prefix = self.prompts.critique_prefix
        sure = [[right_probability(self.critic, found, prefix) for found in votes or ()] for votes in critiques]
        known = [[value for value in values if value is not None] for values in sure]
        return Judged(
            id=item.id,
            probabilities=tuple(sum(values) / len(values) if values else None for values in known),
            judgements=tuple(majority(words) for words in said),
            agreements=tuple(
                max(words.count("correct"), words.count("incorrect")) / len(words) if words else None for words in said
            ),
            errors=sum(votes is None for votes in critiques),
        )


def _sample(item: LabelledAnswers, answer: str) -> tuple[Problem, Solution]:
    problem = Problem(id=item.id, source="critic_benchmark", split="test", prompt=item.question, tests=())
    return problem, Solution(id=item.id, problem_id=item.id, text=answer, program=extract_program(answer))


def _sides(made: Sequence[Generation], *, swapped: bool) -> list[str | None]:
    """The answers that comparisons call better, by their own places."""
    flipped: dict[str, str] = {"A": "B", "B": "A"}
    said = [parse_choice(found.text) for found in made]
    return [flipped[side] if side and swapped else side for side in said]


def _alternating(given: Sequence[str | None] | None, swapped: Sequence[str | None] | None) -> _Choices:
    if given is None or swapped is None:
        return _Choices(errors=1)
    return _Choices(votes=tuple(vote for both in zip(given, swapped, strict=True) for vote in both))


def results(config: Config, run_dir: Path, critics: Iterable[str]) -> dict[str, dict[str, Any]]:
    """``results.json``'s part: all numbers of every critic, by source; fractions."""
    names = list(critics)
    out: dict[str, dict[str, Any]] = {}
    for source in config.eval.critic_benchmarks.sources:
        questions = jsonl.read(LabelledAnswers, questions_file(run_dir, source))
        out[source] = {
            name: numbers(
                config.eval.critic_benchmarks.parts(source)[0],
                questions,
                jsonl.read(Judged, judged_file(run_dir, source, name)),
                bootstrap=config.eval.bootstrap,
                seed=config.seed,
            )
            for name in names
        }
    return out
