"""Metrics against hand-worked values, direct resampling, and enumeration."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrl_hpc.evaluate import metrics
from ctrl_hpc.evaluate.metrics import Outcomes


def outcomes(before, after, judged, problem=None):
    size = len(before)
    return Outcomes(
        problem_N=np.arange(size) if problem is None else np.array(problem),
        correct_NT=np.array([before, after], dtype=bool).T.reshape(size, 2),
        judged_N=np.array(judged),
        timeout_NT=np.zeros((size, 2), dtype=bool),
    )


# right drafts: 0-3; judged: right, wrong, missing, right | wrong drafts 4-9: five judged wrong, one right
EXAMPLE = outcomes(
    before=[1, 1, 1, 1, 0, 0, 0, 0, 0, 0],
    after=[1, 0, 1, 1, 1, 1, 1, 0, 0, 0],
    judged=[1, -1, 0, 1, -1, -1, -1, -1, -1, 1],
)
WEIGHTS = metrics.bootstrap_weights(10, 400, seed=0)


def test_a_row_worked_by_hand():
    row = metrics.summary(EXAMPLE, WEIGHTS)
    assert row["pass_at_1"] == [0.4, 0.6]
    assert row["delta_up"] == pytest.approx(0.3)
    assert row["delta_down"] == pytest.approx(0.1)
    assert row["gain"] == pytest.approx(0.2)
    assert row["judgement"] == {
        "accuracy": pytest.approx(7 / 10),
        "f1_pass": pytest.approx(2 * 2 / (3 + 4)),  # 2 right of 3 said, 4 there
        "f1_fail": pytest.approx(2 * 5 / (6 + 6)),  # 5 right of 6 said, 6 there
        "f1_macro": pytest.approx((4 / 7 + 10 / 12) / 2),
    }
    assert row["judgements"] == {"correct": 3, "incorrect": 6, "none": 1}
    assert row["timeout_rate"] == [0.0, 0.0]


def test_drafts_alone_have_no_judgement():
    row = metrics.summary(outcomes([1, 0], [1, 0], [0, 0]), metrics.bootstrap_weights(2, 10, 0), judges=False)
    assert set(row["judgement"].values()) == {None}
    assert (row["delta_up"], row["delta_down"]) == (0.0, 0.0)
    assert not any(name.startswith("f1") for name in row["ci95"])


def test_intervals_are_the_percentiles_of_resampled_problems():
    """Against a plain loop that draws the same problems and computes the metric from scratch."""
    problem = [0, 0, 0, 1, 1, 2, 3, 3, 3, 3]  # unequal numbers of samples a problem
    example = outcomes(EXAMPLE.correct_NT[:, 0], EXAMPLE.correct_NT[:, 1], EXAMPLE.judged_N, problem)
    weights_BP = metrics.bootstrap_weights(4, 200, seed=3)
    row = metrics.summary(example, weights_BP)
    drawn = {"delta_up": [], "f1_pass": [], "pass_at_1": []}
    for weights_P in weights_BP.astype(int):
        chosen = np.concatenate([np.flatnonzero(example.problem_N == p) for p in range(4) for _ in range(weights_P[p])])
        before, after, judged = example.correct_NT[chosen, 0], example.correct_NT[chosen, 1], example.judged_N[chosen]
        drawn["delta_up"].append(np.mean(~before & after))
        drawn["pass_at_1"].append(np.mean(after))
        hits, said, true = np.sum((judged == 1) & before), np.sum(judged == 1), np.sum(before)
        drawn["f1_pass"].append(2 * hits / (said + true) if said + true else 0.0)
    for name, values in drawn.items():
        assert row["ci95"][name] == pytest.approx(list(np.percentile(values, [2.5, 97.5])))


def test_resampled_problems_keep_their_number():
    weights_BP = metrics.bootstrap_weights(50, 300, seed=1)
    assert weights_BP.shape == (300, 50)
    assert (weights_BP.sum(axis=1) == 50).all()
    assert weights_BP.mean() == pytest.approx(1.0)
    assert (metrics.bootstrap_weights(50, 300, seed=1) == weights_BP).all()


def test_a_paired_difference_is_tighter_than_the_critics_own_intervals():
    rng = np.random.default_rng(0)
    before = rng.random(400) < 0.5
    better = before | (rng.random(400) < 0.05)
    weights_BP = metrics.bootstrap_weights(400, 500, seed=0)
    none, one = outcomes(before, before, np.zeros(400)), outcomes(before, better, np.zeros(400))
    found = metrics.difference(one, none, weights_BP)
    assert found["pass_at_1"] == pytest.approx(better.mean() - before.mean())
    low, high = found["ci95"]
    assert 0.0 < low < found["pass_at_1"] < high
    own = metrics.summary(one, weights_BP)["ci95"]["pass_at_1"]
    assert high - low < 0.5 * (own[1] - own[0])


@settings(derandomize=True, max_examples=100)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.sampled_from([-1, 0, 1])), min_size=1, max_size=30))
def test_the_identity_holds_for_any_outcome(samples):
    before, after, judged = zip(*samples, strict=True)
    row = metrics.summary(outcomes(before, after, judged), metrics.bootstrap_weights(len(samples), 20, 0))
    assert row["pass_at_1"][1] == pytest.approx(row["pass_at_1"][0] + row["delta_up"] - row["delta_down"], abs=1e-12)
    numbers = [*row["pass_at_1"], row["delta_up"], row["delta_down"], *row["judgement"].values()]
    assert all(0.0 <= number <= 1.0 for number in numbers)


BROKEN = {"pass_at_1": [0.4, 0.6], "delta_up": 0.3, "delta_down": 0.0}
BROKEN |= {"delta_up_by_turn": [0.3], "delta_down_by_turn": [0.1]}
LATER = {"pass_at_1": [0.4, 0.6, 0.7], "delta_up": 0.3, "delta_down": 0.1}
LATER |= {"delta_up_by_turn": [0.3, 0.3], "delta_down_by_turn": [0.1, 0.1]}


def test_an_identity_broken_in_a_later_turn_is_an_error():
    with pytest.raises(AssertionError, match=r"pass@1 0.7 is not 0.4 \+ 0.3 - 0.1"):
        metrics.check_identity(LATER)


def test_a_broken_identity_is_an_error():
    with pytest.raises(AssertionError, match=r"pass@1 0.6 is not 0.4 \+ 0.3 - 0.0"):
        metrics.check_identity(BROKEN)


@pytest.mark.parametrize(("n", "c"), [(5, 0), (5, 1), (5, 3), (5, 5), (6, 2), (1, 1)])
def test_pass_at_k_counts_subsets_with_a_right_sample(n, c):
    for k in range(1, n + 1):
        subsets = list(combinations([True] * c + [False] * (n - c), k))
        assert metrics.pass_at_k(n, c, k) == pytest.approx(np.mean([any(subset) for subset in subsets]))


def test_pass_at_k_refuses_more_than_there_are():
    with pytest.raises(ValueError, match=r"pass@3 of 1 right in 2 samples"):
        metrics.pass_at_k(2, 1, 3)
