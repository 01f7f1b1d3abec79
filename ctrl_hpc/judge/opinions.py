"""What a critic thinks of an answer: its critiques, and the probability of each one's judgement."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from jinja2 import Template

from ctrl_hpc.flow.comparison import Side, comparison_chat, parse_choice
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.flow.steps import critique, majority
from ctrl_hpc.flow.text import extract_program
from ctrl_hpc.records import Chat, Critique, Generation, Generator, Judgement, Problem, Sampling, Solution
from ctrl_hpc.rollout.chat import chat_ids, room_after
from ctrl_hpc.rollout.choices import Choices
from ctrl_hpc.rollout.confidence import judgement_probability, right_probability
from ctrl_hpc.rollout.decoding import Completion, Decoding, TopLogprobs
from ctrl_hpc.rollout.thinking import opens_thought, without_thought
from ctrl_hpc.rollout.worker import Worker
from ctrl_hpc.seeds import derive_seed

TOP = 20
"""Likeliest tokens looked at where a judgement stands; the other verdict is among them unless it is far from likely."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """An answer to be judged."""

    problem: str
    """The problem's statement."""
    answer: str
    """What somebody wrote for it: prose with a fenced program, or a program alone."""
    starter_code: str | None = None
    language: str | None = None
    """A name of ``ctrl_hpc.sandbox.languages.LANGUAGES``; None: Python."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opinion:
    """One critique."""

    text: str
    judgement: Judgement | None
    """None where it has none, or several that disagree."""
    probability: float | None
    """That the answer is right, by the judgement's token: its verdict's share of both verdicts' probabilities at the
    sampling temperature. 1 or 0 where the critic's server gives no other tokens' probabilities; None without a
    judgement."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a critic's opinions of one answer come to."""

    raw: float | None
    """Mean of the opinions' probabilities; None where none has a judgement: the critic abstains."""
    probability: float | None
    """``raw``, calibrated where a calibration is given."""
    judgement: Judgement | None
    """The majority's; None for a tie."""
    agreement: float | None
    """Share of the judgements that are the commoner one."""
    votes: dict[str, int]
    """How many opinions say correct, incorrect, and nothing."""


def score(opinions: Sequence[Opinion], calibrate: Callable[[float], float] | None = None) -> Score:
    """The score of an answer by all opinions of it; ``calibrate``: a map of probabilities."""
    said = [item.judgement for item in opinions if item.judgement is not None]
    given = [item.probability for item in opinions if item.probability is not None]
    raw = sum(given) / len(given) if given else None
    votes = {word: sum(item == word for item in said) for word in ("correct", "incorrect")}
    return Score(
        raw=raw,
        probability=raw if raw is None or calibrate is None else calibrate(raw),
        judgement=majority(said),
        agreement=max(votes.values()) / len(said) if said else None,
        votes=votes | {"none": len(opinions) - len(said)},
    )


class LocalCritic:
    """A worker's model as a ``Generator`` for many threads: what they ask at a time is decoded together."""

    def __init__(self, worker: Worker, tokenizer: Any, *, top_logprobs: int = TOP) -> None:
        """``top_logprobs``: 0 where the engine gives none."""
        self.worker, self.tokenizer, self._top = worker, tokenizer, top_logprobs

    def complete(self, chats: Sequence[Chat], sampling: Sampling) -> list[list[Generation]]:
        """``sampling.n`` completions for each chat, in order; a thought is no part of their texts."""
        prompts: list[list[int]] = []
        how: list[Decoding] = []
        for i, chat in enumerate(chats):
            ids = chat_ids(self.tokenizer, chat, continue_final_message=chat[-1].role == "assistant")
            for j in range(sampling.n):
                prompts.append(ids)
                seed = None if sampling.seed is None else derive_seed(sampling.seed, sampling.number(i), j)
                how.append(self._decoding(sampling, sampling.max_tokens, seed))
        named: list[Generation] = [
            without_thought(item, opened=opens_thought(self.tokenizer, ids), tokenizer=self.tokenizer)
            for ids, item in zip(prompts, self._answers(prompts, how), strict=True)
        ]
        return [named[k : k + sampling.n] for k in range(0, len(named), sampling.n)]

    def extend(
        self,
        chats: Sequence[Chat],
        begun: Sequence[Generation],
        text: str,
        sampling: Sequence[Sampling],
        choices: Sequence[str] = (),
    ) -> list[Generation]:
        """Each completion, ``text``, and what follows, as one: the tokens so far are kept, but for an end of turn.

        Of ``choices`` one is drawn. Raises ValueError for a text that leaves no token.
        """
        follow = Choices.of(self.tokenizer, text, choices)
        forced = follow.forced
        room = room_after(text, follow.n_tokens, [how.max_tokens for how in sampling])
        special = frozenset(self.tokenizer.all_special_ids)
        kept = [_without_end(item, special) for item in begun]
        rests = self._answers(
            [[*item.prompt_ids, *item.token_ids, *forced] for item in kept],
            [
                replace(self._decoding(how, 1 if choices else left, how.seed), logit_bias=follow.biases)
                for how, left in zip(sampling, room, strict=True)
            ],
        )
        rests = [follow.whole(rest) for rest in rests]
        return [
            replace(
                rest,
                text=item.text + text + rest.text,
                prompt_ids=item.prompt_ids,
                token_ids=(*item.token_ids, *forced, *rest.token_ids),
                logprobs=(*item.logprobs, *(0.0 for _ in forced), *rest.logprobs),
                top_logprobs=self._tops(item, len(forced), rest),
                forced=(len(item.token_ids), len(item.token_ids) + len(forced)),
                thought=item.thought,
                thought_tokens=item.thought_tokens,
            )
            for item, rest in zip(kept, rests, strict=True)
        ]

    def _tops(self, item: Completion, n_forced: int, rest: Completion) -> tuple[TopLogprobs, ...]:
        """The likeliest tokens at each of a longer completion's; none where there was no choice."""
        if not self._top:
            return ()
        without = len(rest.token_ids) - len(rest.top_logprobs)
        return (*item.top_logprobs, *(() for _ in range(n_forced)), *rest.top_logprobs, *(() for _ in range(without)))

    def _decoding(self, sampling: Sampling, max_tokens: int, seed: int | None) -> Decoding:
        return Decoding(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=max_tokens,
            seed=seed,
            top_logprobs=self._top,
        )

    def _answers(self, prompts: Sequence[Sequence[int]], how: Sequence[Decoding]) -> list[Completion]:
        flat = self.worker.submit(prompts, how).result()
        if any(item.finish_reason == "abort" for item in flat):
            raise RuntimeError("the critic was ended before its answer was whole")
        return [replace(item, text=self._decoded(item.token_ids)) for item in flat]

    def probability(self, found: Critique, prefix: str) -> float | None:
        """As :class:`ctrl_hpc.records.Confident` says; None where the engine gives no other tokens' probabilities."""
        item = found.generation
        if not isinstance(item, Completion) or not item.top_logprobs:
            return None
        return judgement_probability(found, prefix, self.tokenizer)

    def _decoded(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True)


def _without_end(begun: Generation, special: frozenset[int]) -> Completion:
    """A completion without the control tokens that end it."""
    assert isinstance(begun, Completion), "what another critic began cannot be continued"
    ids = begun.token_ids
    while ids and ids[-1] in special:
        ids = ids[:-1]
    count = len(ids)
    return replace(begun, token_ids=ids, logprobs=begun.logprobs[:count], top_logprobs=begun.top_logprobs[:count])


@dataclass(frozen=True, slots=True, kw_only=True)
class How:
    """How a critic is asked."""

    votes: int = 1
    """Opinions of an answer."""
    temperature: float = 0.0
    """Their sampling temperature; 0: greedy, so that all are the same."""
    max_tokens: int = 1024
    """Longest critique in tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Critic:
    """A critic with its prompts: the same question gets the same answer, whoever else asks at the time."""

    generator: Generator
    prompts: Prompts
    comparison: Template

    def opinions(self, item: Item, how: How) -> list[Opinion]:
        """``how.votes`` opinions of an answer."""
        program = extract_program(item.answer, language=item.language)
        problem = Problem(
            id="asked",
            source="judge",
            split="test",
            prompt=item.problem,
            tests=(),
            starter_code=item.starter_code,
            language=item.language,
        )
        answer = Solution(id="asked", problem_id="asked", text=item.answer, program=program)
        sampling = _sampling(how, "critique", asdict(item))
        prefix = self.prompts.critique_prefix
        return [
            Opinion(
                text=found.text, judgement=found.judgement, probability=right_probability(self.generator, found, prefix)
            )
            for found in critique([(problem, answer)], self.generator, self.prompts, sampling)
        ]

    def choices(self, question: str, answers: tuple[str, str], how: How) -> list[Side | None]:
        """The better of two answers by each vote; every second vote, from the second on, saw them swapped."""
        out: list[Side | None] = [None] * how.votes
        for swapped in (False, True):
            rows = range(int(swapped), how.votes, 2)
            shown = answers[::-1] if swapped else answers
            if not rows:
                continue
            sampling = _sampling(replace(how, votes=len(rows)), "choice", question, *shown)
            chat = comparison_chat(self.comparison, self.prompts.system, question, *shown)
            for row, found in zip(rows, self.generator.complete([chat], sampling)[0], strict=True):
                side = parse_choice(found.text)
                flipped: dict[Side, Side] = {"A": "B", "B": "A"}
                out[row] = flipped[side] if side and swapped else side
        return out


def _sampling(how: How, *parts: Any) -> Sampling:
    seed = int(content_hash(how, parts)[:8], 16) >> 1
    return Sampling(temperature=how.temperature, max_tokens=how.max_tokens, n=how.votes, seed=seed)


def content_hash(*parts: Any) -> str:
    """A hash of plain data and records, in hexadecimal."""
    text = json.dumps(parts, sort_keys=True, default=asdict)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def right_one(probability_a: float | None, probability_b: float | None) -> float | None:
    """The probability that A is the right one of two answers of which exactly one is, each judged by itself.

    ``p (1 - q) / (p (1 - q) + q (1 - p))``; None where either is not judged, 1/2 where both are certain of the same.
    """
    if probability_a is None or probability_b is None:
        return None
    first, second = probability_a * (1 - probability_b), probability_b * (1 - probability_a)
    return first / (first + second) if first + second > 0 else 0.5


Mode = Literal["pointwise", "pairwise"]
