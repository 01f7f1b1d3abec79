"""Probabilities that a program is right: how well they are calibrated, and maps fitted so that they are.

Letters of the arrays' shapes: N judged answers, K bins that hold any.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ctrl_hpc import jsonl

_Floats = npt.NDArray[np.float64]
EDGE = 1e-4
"""Probabilities are kept as far from 0 and 1 before their log-odds are taken."""
METHODS = ("platt", "isotonic")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """One bar of a reliability diagram."""

    low: float
    high: float
    n: int
    """Answers whose probability is in [low, high); the last bin holds 1 too."""
    confidence: float
    """Their mean probability."""
    accuracy: float
    """Share of them that are right."""


def reliability(probabilities: Sequence[float], right: Sequence[bool], bins: int = 10) -> list[Bin]:
    """The bins of equal width that hold any answer, from the lowest on (Guo et al. 2017, section 2)."""
    probability_N, right_N = np.asarray(probabilities, dtype=float), np.asarray(right, dtype=float)
    number_N = np.minimum((probability_N * bins).astype(int), bins - 1)
    return [
        Bin(
            low=number / bins,
            high=(number + 1) / bins,
            n=int(chosen_N.sum()),
            confidence=float(probability_N[chosen_N].mean()),
            accuracy=float(right_N[chosen_N].mean()),
        )
        for number in range(bins)
        if (chosen_N := number_N == number).any()
    ]


def expected_calibration_error(probabilities: Sequence[float], right: Sequence[bool], bins: int = 10) -> float:
    """``sum_k n_k / N * |accuracy_k - confidence_k|`` over bins of equal width, in [0, 1] (Guo et al. 2017, eq. 3)."""
    found = reliability(probabilities, right, bins)
    return sum(item.n * abs(item.accuracy - item.confidence) for item in found) / len(probabilities)


def brier(probabilities: Sequence[float], right: Sequence[bool]) -> float:
    """Mean squared distance of the probability to 1 where the answer is right, to 0 where it is wrong."""
    return float(np.mean((np.asarray(probabilities, dtype=float) - np.asarray(right, dtype=float)) ** 2))


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """A map from a critic's own probability to the share of a development set that was right there."""

    method: Literal["platt", "isotonic"]
    n: int
    """Labelled answers that it was fitted to."""
    slope: float = 1.0
    """platt: of the log-odds."""
    offset: float = 0.0
    """platt: added to them."""
    knots: tuple[float, ...] = ()
    """isotonic: probabilities of the critic, rising."""
    values: tuple[float, ...] = ()
    """isotonic: what each stands for, never falling; straight lines between them."""

    def __call__(self, probability: float) -> float:
        """The calibrated probability."""
        if self.method == "platt":
            return float(_sigmoid(self.slope * _log_odds(np.array([probability])) + self.offset)[0])
        return float(np.interp(probability, self.knots, self.values))

    def save(self, file: Path) -> None:
        """Write it as JSON."""
        jsonl.write_text(file, json.dumps(jsonl.encode(self), indent=1) + "\n")

    @classmethod
    def load(cls, file: Path) -> Calibration:
        """Read it; raises ValueError, in a line, for what is none."""
        try:
            found = jsonl.decode(cls, json.loads(file.read_text(encoding="utf-8")))
        except OSError as error:
            raise ValueError(f"{file}: cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"{file}: is no calibration: {' '.join(str(error).split())[:200]}") from None
        if len(found.knots) != len(found.values) or (found.method == "isotonic") != bool(found.knots):
            raise ValueError(f"{file}: is no calibration: {found.method} with {len(found.knots)} knots")
        return found


def fit(method: str, probabilities: Sequence[float], right: Sequence[bool]) -> Calibration:
    """The map of a kind that makes labelled answers likeliest.

    Raises ValueError for an unknown kind, or where all answers are right, or all wrong.
    """
    if method not in METHODS:
        raise ValueError(f"{method!r} is no way to calibrate; allowed: {', '.join(METHODS)}")
    if not 0 < sum(right) < len(right):
        raise ValueError(f"{len(right)} answers of which {sum(right)} are right; both kinds are needed")
    probability_N, right_N = np.asarray(probabilities, dtype=float), np.asarray(right, dtype=float)
    return _platt(probability_N, right_N) if method == "platt" else _isotonic(probability_N, right_N)


def _log_odds(probability_N: _Floats) -> _Floats:
    inside_N = np.clip(probability_N, EDGE, 1.0 - EDGE)
    return np.log(inside_N) - np.log1p(-inside_N)


def _sigmoid(x_N: _Floats) -> _Floats:
    return 0.5 * (1.0 + np.tanh(0.5 * x_N))


def _platt(probability_N: _Floats, right_N: _Floats) -> Calibration:
    """Logistic regression on the log-odds with Platt's targets (1999), by damped Newton (Lin, Lin and Weng 2007)."""
    above, below = right_N.sum(), len(right_N) - right_N.sum()
    target_N = np.where(right_N > 0, (above + 1) / (above + 2), 1 / (below + 2))
    design_N2 = np.stack([_log_odds(probability_N), np.ones(len(right_N))], axis=1)

    def loss(weights_2: _Floats) -> float:
        x_N = design_N2 @ weights_2
        return float(np.sum(np.logaddexp(0.0, x_N) - target_N * x_N))

    weights_2 = np.array([0.0, np.log((above + 1) / (below + 1))])
    for _ in range(100):
        said_N = _sigmoid(design_N2 @ weights_2)
        gradient_2 = design_N2.T @ (said_N - target_N)
        if np.abs(gradient_2).max() < 1e-10:
            break
        hessian_22 = (design_N2 * (said_N * (1 - said_N))[:, None]).T @ design_N2 + 1e-12 * np.eye(2)
        step_2 = np.linalg.solve(hessian_22, gradient_2)
        size = 1.0
        while size > 1e-10 and loss(weights_2 - size * step_2) > loss(weights_2):
            size /= 2
        weights_2 = weights_2 - size * step_2
    return Calibration(method="platt", n=len(right_N), slope=float(weights_2[0]), offset=float(weights_2[1]))


def _isotonic(probability_N: _Floats, right_N: _Floats) -> Calibration:
    """Pool adjacent violators: the rising steps nearest to the labels by least squares (Ayer et al. 1955)."""
    blocks: list[list[float]] = []  # sum of labels, answers, lowest and highest probability
    for probability in np.unique(probability_N):
        labels = right_N[probability_N == probability]
        blocks.append([labels.sum(), len(labels), probability, probability])
        while len(blocks) > 1 and blocks[-2][0] * blocks[-1][1] >= blocks[-1][0] * blocks[-2][1]:
            total, count, _, high = blocks.pop()
            blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + count, blocks[-1][2], high]
    knots, values = [], []
    for total, count, low, high in blocks:
        for knot in dict.fromkeys((low, high)):
            knots.append(float(knot))
            values.append(float(total / count))
    return Calibration(method="isotonic", n=len(right_N), knots=tuple(knots), values=tuple(values))


def held_out(method: str, probabilities: Sequence[float], right: Sequence[bool], folds: int = 5) -> list[float] | None:
    """Calibrated probabilities, each by a map that was fitted to the other folds.

    Right answers are dealt to the folds in turn, and wrong ones so, whatever their order. None where there are fewer
    than two of either: the map for the only one would have seen none of its kind.
    """
    classes = [[row for row in range(len(right)) if bool(right[row]) == kind] for kind in (True, False)]
    if min(map(len, classes)) < 2:
        return None
    out = [0.0] * len(right)
    for fold in range(folds):
        own = {row for rows in classes for row in rows[fold::folds]}
        others = [row for row in range(len(right)) if row not in own]
        found = fit(method, [probabilities[row] for row in others], [right[row] for row in others])
        for row in own:
            out[row] = found(probabilities[row])
    return out


def describe(probabilities: Sequence[float], right: Sequence[bool]) -> dict[str, Any]:
    """ECE, Brier score and the reliability diagram of some answers, as JSON."""
    if not len(probabilities):
        return {"n": 0, "ece": None, "brier": None, "bins": []}
    return {
        "n": len(probabilities),
        "ece": expected_calibration_error(probabilities, right),
        "brier": brier(probabilities, right),
        "bins": [jsonl.encode(item) for item in reliability(probabilities, right)],
    }
