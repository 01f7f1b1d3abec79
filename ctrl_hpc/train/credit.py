"""Sentence-level credit (``rl.credit=sentence``): what each sentence of a critique added to its reward.

The fixed generator revises again with one sentence left out; the credit of that sentence is the reward of the critique
less the reward without it, so that in a critique with one decisive sentence that one has all of it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate

from ctrl_hpc.flow.ablation import ablate, without
from ctrl_hpc.flow.prompts import Prompts
from ctrl_hpc.records import Critique, Executor, Generator, Problem, Revision, Reward, Rules, Sampling, Solution
from ctrl_hpc.train.rewards import Rewards

Credit = tuple[int, int, float]
"""Tokens [start, end) of a completion, and what they added to the reward."""
Spell = Callable[[Sequence[int]], str]
"""The text of token ids, control tokens left out."""


def by_sentence(
    samples: Sequence[tuple[Problem, Solution, Critique, Revision]],
    rewarded: Sequence[Reward],
    rewards: Rewards,
    generator: Generator,
    executor: Executor,
    prompts: Prompts,
    rules: Rules,
    sampling: Sampling,
    spell: Spell,
    *,
    stop_at_first_failure: bool = True,
) -> list[tuple[Credit, ...]]:
    """The credit of each sentence of rewarded samples, in order, as tokens of their critiques.

    None where nothing was revised, where the environment failed, or where a sentence takes no token.
    """
    rows = [n for n, (*_, revision) in enumerate(samples) if not revision.kept and not rewarded[n].masked]
    asked = [samples[row][:3] for row in rows]
    found = ablate(asked, generator, executor, prompts, rules, sampling, stop_at_first_failure=stop_at_first_failure)
    out: list[tuple[Credit, ...]] = [()] * len(samples)
    for row, ablation in zip(rows, found, strict=True):
        problem, draft, critique, _ = samples[row]
        shorter = [
            (problem, draft, replace(critique, text=without(critique.text, span)), revision)
            for span, revision in zip(ablation.spans, ablation.revisions, strict=True)
        ]
        places = tokens_of(critique, ablation.spans, prompts.critique_prefix, spell)
        out[row] = tuple(
            (*place, rewarded[row].value - less.value)
            for place, less in zip(places, rewards.score(shorter), strict=True)
            if place[0] < place[1] and not less.masked
        )
    return out


def tokens_of(critique: Critique, spans: Sequence[tuple[int, int]], prefix: str, spell: Spell) -> list[tuple[int, int]]:
    """The tokens that begin, blanks aside, within characters [start, end) of a critique's text; of none an empty range.

    The text may be a part of what was generated (a thought comes before it), after the prompt's ``prefix``.
    """
    generation = critique.generation
    if generation is None:
        return [(0, 0)] * len(spans)
    first = generation.thought_tokens
    ids = generation.token_ids[first:]
    text = spell(ids) if first else generation.text  # an answer's text has lost the blanks after the thought
    at = (prefix + text).rfind(critique.text)
    if at < 0:
        return [(0, 0)] * len(spans)
    shift = at - len(prefix)
    begins = _begins(ids, text, spell)
    return [
        (first + bisect_left(begins, start + shift), first + bisect_left(begins, end + shift)) for start, end in spans
    ]


def _begins(ids: Sequence[int], text: str, spell: Spell) -> list[int]:
    """Where in a text each of its tokens has its first character that is not blank."""
    ends = list(accumulate(len(spell([token])) for token in ids))
    if ends and ends[-1] != len(text):  # a character of several tokens
        ends = [len(spell(ids[: count + 1])) for count in range(len(ids))]
    pieces = [text[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    return [end - len(piece.lstrip()) for piece, end in zip(pieces, ends, strict=True)]
