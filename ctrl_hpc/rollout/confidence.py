"""How sure a critic is of its judgement, by the probabilities of the tokens where the judgement stands."""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from typing import Any

from ctrl_hpc.records import Confident, Critique, Generator, Judgement
from ctrl_hpc.rollout.decoding import Completion

UNLIKELY = 1e-4
"""What is told for a verdict that is not among the likeliest tokens."""
_LABEL = re.compile(r"judge?ment|verdict|assessment|boxed", re.IGNORECASE)
_WORD = re.compile(r"(?<![^\W_])(?:in)?correct(?![^\W_])", re.IGNORECASE)


def verdict_place(text: str, judgement: Judgement) -> int | None:
    """Where in a critique its verdict's word begins: the first after the last label, else the last one."""
    places = [match.start() for match in _WORD.finditer(text) if match[0].lower() == judgement]
    labels = [match.end() for match in _LABEL.finditer(text)]
    after = [place for place in places if labels and place >= labels[-1]]
    return after[0] if after else places[-1] if places else None


def verdict_probability(
    before: str, token: str, others: Sequence[tuple[str, float]], judgement: Judgement, place: int
) -> float:
    """The share of "correct" among the probabilities of both verdicts, where a token begins one.

    ``before``: the text up to the token; ``token``: its text; ``others``: texts and natural log-probabilities of the
    likeliest tokens there, itself among them; ``place``: where in the text the verdict's word begins. A token counts
    for a verdict when it goes on from ``place`` with its beginning, blanks aside.
    """
    lead = token[: place - len(before)]
    sums = {"correct": 0.0, "incorrect": 0.0}
    for text, logprob in others:
        rest = text.removeprefix(lead).strip().lower()
        if not text.startswith(lead) or not rest:
            continue
        for word in sums:
            if word.startswith(rest) or rest.startswith(word):
                sums[word] += math.exp(logprob)
    other = "incorrect" if judgement == "correct" else "correct"
    if not sums[judgement]:
        return 1.0 if judgement == "correct" else 0.0
    sums[other] = max(sums[other], sums[judgement] * UNLIKELY)
    return sums["correct"] / (sums["correct"] + sums["incorrect"])


def judgement_probability(found: Critique, prefix: str, tokenizer: Any) -> float | None:
    """The probability that the answer is right, by the tokens at the judgement of a critique that begins with
    ``prefix``; None where they are not known.

    The verdict's share of both verdicts' probabilities where the other likeliest tokens are known; else the probability
    of the verdict's own token, with all others counted for the other verdict.
    """
    item = found.generation
    if found.judgement is None or item is None or not item.token_ids or len(item.logprobs) != len(item.token_ids):
        return None
    place = verdict_place(found.text, found.judgement)
    if place is None or place < len(prefix):
        return None
    ids = item.token_ids
    whole = _decoded(tokenizer, ids) if item.thought is not None else item.text
    place += len(whole) - len(item.text) - len(prefix)  # the answer is what the whole ends with
    ends = partial(_end, tokenizer, ids)
    k = bisect_right(range(len(ids)), place, key=ends)  # the first token that ends after its begin
    if k == len(ids):
        return None
    before, token = whole[: ends(k - 1)], whole[ends(k - 1) : ends(k)]
    if isinstance(item, Completion) and item.top_logprobs:
        others = [(tokenizer.decode([other]), logprob) for other, logprob in item.top_logprobs[k]]
        return verdict_probability(before, token, others, found.judgement, place)
    word = token[place - len(before) :].strip().lower()
    if not word or not (found.judgement.startswith(word) or word.startswith(found.judgement)):
        return None
    said = math.exp(item.logprobs[k])
    return said if found.judgement == "correct" else 1.0 - said


def _end(tokenizer: Any, ids: Sequence[int], k: int) -> int:
    """Where token ``k`` of a completion ends in its whole text."""
    return len(_decoded(tokenizer, ids[: k + 1]))


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def right_probability(critic: Generator, found: Critique, prefix: str) -> float | None:
    """That the answer is right, by a critique that begins with ``prefix``: 1 or 0 by its judgement where the critic's
    server does not tell; None where it has no judgement.
    """
    if found.judgement is None:
        return None
    sure = critic.probability(found, prefix) if isinstance(critic, Confident) else None
    return sure if sure is not None else float(found.judgement == "correct")
