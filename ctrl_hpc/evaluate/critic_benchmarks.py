"""How good a critic is at telling right answers from wrong ones: what benchmarks of critics measure.

A critic's opinion of an answer is a probability that it is right, or None where it abstains, and a judgement. Letters
of the arrays' shapes: N answers, Q questions, B bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ctrl_hpc.evaluate.calibration import describe
from ctrl_hpc.evaluate.metrics import Ratio, bootstrap_weights, interval
from ctrl_hpc.records import Judgement, LabelledAnswers

SILENT = -1.0
"""The score of an answer on which the critic abstains: below all others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What a critic says of the answers to a question: each by itself, and, of a pair, side by side."""

    id: str
    probabilities: tuple[float | None, ...]
    judgements: tuple[Judgement | None, ...]
    agreements: tuple[float | None, ...]
    """Share of the votes on each answer that the commoner judgement has."""
    votes: tuple[str | None, ...] = ()
    """Of a pair that was compared: "A" or "B" by each vote; every second saw the answers swapped."""
    errors: int = 0
    """Answers that could not be judged."""

    @property
    def scores(self) -> list[float]:
        """The probabilities, for ranking."""
        return [SILENT if value is None else value for value in self.probabilities]


def best_of(scores: Sequence[float], worth: Sequence[float]) -> float:
    """What the answer with the highest score is worth, the mean of those that share it: the critic as a re-ranker.

    Where one answer of several is right that is RewardBench 2's score: 1/k where it is among k highest, else 0.
    """
    chosen = [value for score, value in zip(scores, worth, strict=True) if score == max(scores)]
    return sum(chosen) / len(chosen)


def stopped(judged: Judged, worth: Sequence[float]) -> tuple[float, int]:
    """The critic as a stopping rule: what the first answer that it judges correct is worth, and how many it looked at.

    Where it judges none correct, the last.
    """
    for count, judgement in enumerate(judged.judgements, 1):
        if judgement == "correct":
            return worth[count - 1], count
    return worth[-1], len(worth)


def ties(items: Sequence[tuple[LabelledAnswers, Judged]]) -> float:
    """RewardBench 2's score of its subset Ties, ids ``ref:N`` and ``tied:N`` (Malik et al. 2025, appendix; its code).

    ``0.3 accuracy of tied + 0.3 of ref + 0.2 [gap > spread] + 0.2 [least gap > spread] + 0.01 tanh(least gap / spread -
    1)``: accurate where every right answer is above every wrong one; gap: from the worst right to the best wrong
    answer, spread: among the right ones, the least gap is that of tied and ref.
    """
    stats: dict[str, dict[str, tuple[float, float]]] = {"ref": {}, "tied": {}}
    for item, judged in items:
        kind, _, number = item.id.partition(":")
        scores = list(zip(judged.scores, item.worth, strict=True))
        right, wrong = [[score for score, worth in scores if worth == side] for side in (1.0, 0.0)]
        if kind not in stats or not right or not wrong:
            raise ValueError(f"{item.provenance}: {item.id}: Ties have ids ref:N and tied:N, right answers and wrong")
        stats[kind][number] = (min(right) - max(wrong), max(right) - min(right))
    accuracy = {kind: float(np.mean([gap > 0 for gap, _ in found.values()])) for kind, found in stats.items() if found}
    both = [(stats["tied"][n], stats["ref"][n][0]) for n in stats["tied"] if n in stats["ref"]]
    gap_Q = np.array([tied[0] for tied, _ in both])
    spread_Q = np.array([tied[1] for tied, _ in both])
    least_Q = np.minimum(gap_Q, [ref for _, ref in both])
    with np.errstate(divide="ignore", invalid="ignore"):
        margin_Q = np.nan_to_num(np.tanh(least_Q / spread_Q - 1.0), nan=0.0)
    parts = [(gap_Q > spread_Q), (least_Q > spread_Q), margin_Q]
    preferred, hard, margin = (float(part.mean()) if len(both) else 0.0 for part in parts)
    reached = 0.3 * accuracy.get("tied", 0.0) + 0.3 * accuracy.get("ref", 0.0)
    return reached + 0.2 * preferred + 0.2 * hard + 0.01 * margin


def position_bias(items: Sequence[Judged]) -> dict[str, Any]:
    """How much the places of two answers matter: shares of decided votes for the first place, and of pairs of votes, in
    both orders, that are for the same answer; votes that name none agree with nothing."""
    first = decided = same = pairs = 0
    for judged in items:
        for index, vote in enumerate(judged.votes):
            decided += vote is not None
            first += vote == ("B" if index % 2 else "A")
        for given, swapped in zip(judged.votes[::2], judged.votes[1::2], strict=False):
            pairs += 1
            same += given is not None and given == swapped
    return {
        "first_place": first / decided if decided else None,
        "consistent": same / pairs if pairs else None,
    }


def _by_answer(items: Sequence[tuple[LabelledAnswers, Judged]]) -> dict[str, Any]:
    """Accuracy, F1, abstention, agreement and calibration over the answers of questions whose answers are right or not.

    No judgement is wrong, and a false negative of its answer's class.
    """
    rows = [
        (worth == 1.0, judgement, probability, agreement)
        for item, judged in items
        if item.is_binary
        for worth, judgement, probability, agreement in zip(
            item.worth, judged.judgements, judged.probabilities, judged.agreements, strict=True
        )
    ]
    if not rows:
        return {"n_answers": 0}
    right_N = np.array([right for right, *_ in rows])
    said = [judgement for _, judgement, *_ in rows]
    f1 = {}
    for name, word, side in (("pass", "correct", True), ("fail", "incorrect", False)):
        says_N, true_N = np.array([judgement == word for judgement in said]), right_N == side
        below = says_N.sum() + true_N.sum()
        f1[name] = float(2 * (says_N & true_N).sum() / below) if below else 0.0
    known = [(right, probability) for right, _, probability, _ in rows if probability is not None]
    agreements = [agreement for *_, agreement in rows if agreement is not None]
    return {
        "n_answers": len(rows),
        "accuracy": _mean([word is not None and (word == "correct") == right for right, word, *_ in rows]),
        "f1_pass": f1["pass"],
        "f1_fail": f1["fail"],
        "f1_macro": (f1["pass"] + f1["fail"]) / 2,
        "abstention": said.count(None) / len(said),
        "agreement": sum(agreements) / len(agreements) if agreements else None,
        "calibration": describe([value for _, value in known], [right for right, _ in known]),
    }


def _by_question(items: Sequence[tuple[LabelledAnswers, Judged]]) -> dict[str, Any]:
    """The critic as a re-ranker and as a stopping rule, over questions with several answers."""
    several = [(item, judged) for item, judged in items if len(item.answers) > 1]
    if not several:
        return {"n_questions": 0}
    rules = [stopped(judged, item.worth) for item, judged in several]
    return {
        "n_questions": len(several),
        "best_of_n": _mean([best_of(judged.scores, item.worth) for item, judged in several]),
        "random": _mean([sum(item.worth) / len(item.worth) for item, _ in several]),
        "oracle": _mean([max(item.worth) for item, _ in several]),
        "stopping": {"worth": _mean([worth for worth, _ in rules]), "answers": _mean([count for _, count in rules])},
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def correct_or_not(item: LabelledAnswers, judged: Judged) -> float:
    """CodeCriticBench: whether a single answer is put into its class; silence says "wrong", as in its own scorer."""
    return float((judged.judgements[0] == "correct") == (item.worth[0] == 1.0))


def both_orders(item: LabelledAnswers, judged: Judged) -> float:
    """CodeJudgeBench: the share of votes, in both orders, for the right answer; without votes, by the scores."""
    if not judged.votes:
        return best_of(judged.scores, item.worth)
    return sum(vote == ("A" if item.worth[0] == 1.0 else "B") for vote in judged.votes) / len(judged.votes)


def one_decision(item: LabelledAnswers, judged: Judged) -> float:
    """JudgeBench: whether the votes of both orders together are for the right answer; a tie is not."""
    if not judged.votes:
        first, second = judged.scores
        winner = "A" if first > second else "B" if second > first else None
    else:
        surplus = judged.votes.count("A") - judged.votes.count("B")
        winner = "A" if surplus > 0 else "B" if surplus < 0 else None
    return float(winner == ("A" if item.worth[0] == 1.0 else "B"))


def ranked(item: LabelledAnswers, judged: Judged) -> float:
    """RewardBench 2, JETTS and one's own: what the best-scored answer is worth; of one answer, as CodeCriticBench."""
    return best_of(judged.scores, item.worth) if len(item.answers) > 1 else correct_or_not(item, judged)


def normalised_helpfulness(items: Sequence[tuple[LabelledAnswers, Judged]]) -> float | None:
    """JETTS' measure of a re-ranker (Zhou et al. 2025, arXiv 2504.15253): ``(judge - greedy) / (oracle - greedy)``.

    Means over the questions: of what the best-scored answer is worth, of the generator's greedy answer (the first of
    each, in the published files), and of the best answer. 0: as the greedy answers, 1: as the best ones, below 0: a
    judge that does harm. None where the greedy answers are the best ones.
    """
    judge = _mean([best_of(judged.scores, item.worth) for item, judged in items])
    greedy = _mean([item.worth[0] for item, _ in items])
    oracle = _mean([max(item.worth) for item, _ in items])
    return (judge - greedy) / (oracle - greedy) if oracle > greedy else None


OFFICIAL: dict[str, Callable[[LabelledAnswers, Judged], float]] = {
    "codejudgebench": both_orders,
    "codecriticbench": correct_or_not,
    "rewardbench2": ranked,
    "jetts": ranked,
    "judgebench": one_decision,
    "own": ranked,
}
"""Each benchmark's own score of a question; its score is the mean."""
TIES = "Ties"
"""RewardBench 2's subset with a score of its own."""


def numbers(
    name: str, questions: Sequence[LabelledAnswers], judged: Sequence[Judged], *, bootstrap: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """All numbers of a critic on a benchmark, with 95 % intervals over questions; fractions. JETTS has one more."""
    items = list(zip(questions, judged, strict=True))
    score_of = OFFICIAL[name]
    tied = [pair for pair in items if name == "rewardbench2" and pair[0].category == TIES]
    plain = [pair for pair in items if not (name == "rewardbench2" and pair[0].category == TIES)]
    categories: dict[str, dict[str, Any]] = {}
    for category in dict.fromkeys(item.category for item, _ in plain):
        chosen = [pair for pair in plain if pair[0].category == category]
        categories[category] = {"n": len(chosen)} | _interval([score_of(*pair) for pair in chosen], bootstrap, seed)
    overall = _interval([score_of(*pair) for pair in plain], bootstrap, seed)
    if tied:
        categories[TIES] = {"n": len(tied), "score": ties(tied), "ci95": None}
    if name == "rewardbench2":  # the mean over its subsets, as on its leaderboard
        overall = {"score": _mean([found["score"] for found in categories.values()]), "ci95": None}
    return {
        "benchmark": name,
        "n": len(items),
        **overall,
        "categories": categories,
        **({"normalised_helpfulness": normalised_helpfulness(items)} if name == "jetts" and items else {}),
        "answers": _by_answer(items),
        "questions": _by_question(items),
        "position": position_bias(judged),
        "errors": sum(item.errors for item in judged),
    }


def _interval(scores: Sequence[float], bootstrap: int, seed: int) -> dict[str, Any]:
    values_Q = np.array(scores)
    if not len(values_Q):
        return {"score": None, "ci95": None}
    ratio = Ratio(numerator_N=values_Q, denominator_N=np.ones(len(values_Q)))
    weights_BQ = bootstrap_weights(len(values_Q), bootstrap, seed)
    return {"score": ratio.value(), "ci95": interval(ratio.resampled(np.arange(len(values_Q)), weights_BQ))}
