"""Metrics of critique-revision turns, with bootstrap confidence intervals over problems.

Letters of the arrays' shapes: N samples (drafts), T turns and the draft before them, P problems, B bootstrap resamples.
All metrics are ratios of sums over samples, so that a resample is a weight for each problem.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_Floats = npt.NDArray[np.float64]
_Bools = npt.NDArray[np.bool_]
_Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """What became of every sample of one critic. Samples with an environment fault in any turn are left out."""

    problem_N: _Ints
    """Index of the sample's problem, in [0, P)."""
    correct_NT: _Bools
    """Whether the program passes all tests after the draft (column 0) and after each turn."""
    judged_N: _Ints
    """First critique's overall judgement: 1 correct, -1 incorrect, 0 none."""
    timeout_NT: _Bools
    """Whether the program exceeds the time limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """A metric of the form ``scale * sum(numerator) / sum(denominator)`` over samples."""

    numerator_N: _Floats
    denominator_N: _Floats

    def value(self) -> float:
        """The metric over all samples; 0 where the denominator is."""
        below = float(self.denominator_N.sum())
        return float(self.numerator_N.sum()) / below if below else 0.0

    def resampled(self, problem_N: _Ints, weights_BP: _Floats) -> _Floats:
        """The metric in every resample of the problems."""
        size = weights_BP.shape[1]
        above_B = weights_BP @ np.bincount(problem_N, self.numerator_N, size)
        below_B = weights_BP @ np.bincount(problem_N, self.denominator_N, size)
        return np.divide(above_B, below_B, out=np.zeros_like(above_B), where=below_B > 0)


def bootstrap_weights(problems: int, resamples: int, seed: int) -> _Floats:
    """``weights_BP``: how often each problem is drawn in each resample. One draw serves all critics, pairing them."""
    rng = np.random.default_rng([seed, 0xB007])
    return rng.multinomial(problems, np.full(problems, 1.0 / problems), size=resamples).astype(np.float64)


def interval(values_B: _Floats) -> list[float]:
    """The percentile interval that holds 95 % of the resamples."""
    low, high = np.percentile(values_B, [2.5, 97.5])
    return [float(low), float(high)]


def ratios(outcomes: Outcomes) -> dict[str, Ratio]:
    """All metrics of a critic with at least one turn, by name; ``pass_at_1@k`` is that after turn k."""
    correct_NT = outcomes.correct_NT
    ones_N = np.ones(len(correct_NT))
    before_N, after_N, last_N = correct_NT[:, 0], correct_NT[:, 1], correct_NT[:, -1]
    out = {f"pass_at_1@{turn}": _share(correct_NT[:, turn]) for turn in range(correct_NT.shape[1])}
    out["delta_up"] = _share(~before_N & after_N)
    out["delta_down"] = _share(before_N & ~after_N)
    out["gain"] = Ratio(numerator_N=after_N.astype(float) - before_N, denominator_N=ones_N)
    out["delta_up_last"] = _share(~before_N & last_N)
    out["delta_down_last"] = _share(before_N & ~last_N)
    for turn in range(1, correct_NT.shape[1]):
        out[f"delta_up@{turn}"] = _share(~before_N & correct_NT[:, turn])
        out[f"delta_down@{turn}"] = _share(before_N & ~correct_NT[:, turn])
    truth_N = np.where(before_N, 1, -1)
    out["accuracy"] = _share(outcomes.judged_N == truth_N)
    for name, side in (("f1_pass", 1), ("f1_fail", -1)):
        out[name] = _f1(outcomes.judged_N == side, truth_N == side)
    return out


def _share(hits_N: _Bools) -> Ratio:
    return Ratio(numerator_N=hits_N.astype(np.float64), denominator_N=np.ones(len(hits_N)))


def _f1(said_N: _Bools, true_N: _Bools) -> Ratio:
    """``2 TP / (2 TP + FP + FN)``; a missing judgement is a false negative of its draft's class."""
    hits_N = (said_N & true_N).astype(np.float64)
    return Ratio(numerator_N=2.0 * hits_N, denominator_N=said_N.astype(np.float64) + true_N)


def summary(outcomes: Outcomes, weights_BP: _Floats, *, judges: bool = True) -> dict[str, Any]:
    """A critic's row of ``report/results.json``: every metric, and its 95 % interval in ``ci95``.

    Δ compare the first turn with the draft, as fractions of all samples. ``judges=False`` (drafts alone) leaves the
    judgement's metrics None. Checks that pass@1 after the turn is that before it plus Δ↑ minus Δ↓.
    """
    all_ratios = ratios(outcomes)
    drawn = {name: ratio.resampled(outcomes.problem_N, weights_BP) for name, ratio in all_ratios.items()}
    drawn["f1_macro"] = (drawn["f1_pass"] + drawn["f1_fail"]) / 2.0
    values = {name: ratio.value() for name, ratio in all_ratios.items()}
    values["f1_macro"] = (values["f1_pass"] + values["f1_fail"]) / 2.0
    turns = outcomes.correct_NT.shape[1]
    judgement = ("accuracy", "f1_pass", "f1_fail", "f1_macro")
    kept = [name for name in drawn if judges or name not in judgement]
    ci95 = {name: interval(drawn[name]) for name in kept}
    row = {
        "pass_at_1": [values[f"pass_at_1@{turn}"] for turn in range(turns)],
        "delta_up": values["delta_up"],
        "delta_down": values["delta_down"],
        "judgement": {name: values[name] if judges else None for name in judgement},
        "ci95": {"pass_at_1": ci95["pass_at_1@1"], **ci95},
        "delta_up_by_turn": [values[f"delta_up@{turn}"] for turn in range(1, turns)],
        "delta_down_by_turn": [values[f"delta_down@{turn}"] for turn in range(1, turns)],
        "gain": values["gain"],
        "delta_up_last": values["delta_up_last"],
        "delta_down_last": values["delta_down_last"],
        "timeout_rate": [float(rate) for rate in outcomes.timeout_NT.mean(axis=0)] if len(outcomes.problem_N) else [],
        "judgements": {
            name: int((outcomes.judged_N == side).sum())
            for name, side in (("correct", 1), ("incorrect", -1), ("none", 0))
        },
    }
    check_identity(row)
    return row


def check_identity(row: dict[str, Any]) -> None:
    """Raise AssertionError unless pass@1 after every turn is that of the drafts, plus Δ↑, minus Δ↓."""
    before, *after = row["pass_at_1"]
    deltas = [(row["delta_up"], row["delta_down"])]
    deltas += list(zip(row["delta_up_by_turn"], row["delta_down_by_turn"], strict=True))
    for share, (up, down) in zip([after[0], *after], deltas, strict=True):
        if abs(share - (before + up - down)) > 1e-9:
            raise AssertionError(f"pass@1 {share} is not {before} + {up} - {down}")


def difference(one: Outcomes, other: Outcomes, weights_BP: _Floats) -> dict[str, Any]:
    """How much higher pass@1 after one turn is for ``one`` than for ``other``, paired by problem, with its interval."""
    first, second = ratios(one)["pass_at_1@1"], ratios(other)["pass_at_1@1"]
    drawn_B = first.resampled(one.problem_N, weights_BP) - second.resampled(other.problem_N, weights_BP)
    return {"pass_at_1": first.value() - second.value(), "ci95": interval(drawn_B)}


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, c of them right, hold a right one: ``1 - C(n - c, k) / C(n, k)``.

    The unbiased estimator of Chen et al., "Evaluating Large Language Models Trained on Code" (2021), section 2.1.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {c} right in {n} samples: needs 0 <= c <= n and 1 <= k <= n")
    if n - c < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))
