"""The sampler against transformers' logits processors, a full sort, and values worked by hand."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ctrl_hpc.rollout.decoding import Decoding, check_decoding
from ctrl_hpc.rollout.sampler import TOP_K_WIDTHS, Adjustments, Sampler, _invert

CPU = torch.device("cpu")


def drawn(logits_V: torch.Tensor, count: int = 400, **values: Any) -> set[int]:
    """The tokens that so many draws find."""
    decodings = [Decoding(seed=row, **values) for row in range(count)]
    return set(Sampler(decodings, 1, CPU).draw(logits_V.repeat(count, 1), 0)[0].tolist())


def test_the_cuts_by_hand() -> None:
    logits_V = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    assert drawn(logits_V) == {0, 1, 2, 3}
    assert drawn(logits_V, top_k=2) == {1, 3}
    assert drawn(logits_V, top_p=0.39) == {1}
    assert drawn(logits_V, top_p=0.41) == {1, 3}
    assert drawn(logits_V, min_p=0.5) == {1, 2, 3}  # 0.2 = 0.5 * 0.4
    assert drawn(logits_V, top_k=3, top_p=0.7) == {1, 3}  # 0.4 + 0.3 of 0.9 are above 0.7 of it, 0.4 is not
    assert drawn(logits_V, top_k=1, temperature=5.0) == {1}
    assert drawn(torch.zeros(4), top_k=2) == {0, 1}  # equally likely ones in the order of their ids


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    top_p=st.floats(0.05, 1.0),
    top_k=st.integers(0, 40),
    min_p=st.sampled_from([0.0, 0.02, 0.3]),
    scale=st.sampled_from([0.01, 1.0, 6.0]),
)
def test_what_may_be_drawn_is_what_transformers_keeps(
    seed: int, top_p: float, top_k: int, min_p: float, scale: float
) -> None:
    """The same set, whatever the width at which the top k are found: 600 tokens are wider than the first."""
    assert TOP_K_WIDTHS[0] < 600
    logits_1V = torch.randn(1, 600, generator=torch.Generator().manual_seed(seed)) * scale
    warpers = LogitsProcessorList()
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    kept_V = warpers(None, logits_1V)[0] > -math.inf
    probs_V = torch.where(kept_V, torch.softmax(logits_1V[0].double(), -1), 0.0)
    decodings = [Decoding(seed=row, top_p=top_p, top_k=top_k, min_p=min_p) for row in range(64)]
    sampler = Sampler(decodings, 1, CPU)
    tokens_B = sampler.draw(logits_1V.repeat(64, 1), 0)[0]
    if top_k:
        cumulative_V = probs_V.cumsum(0)
        expected_B = torch.searchsorted(cumulative_V, sampler._uniforms_BT[:, 0] * cumulative_V[-1], right=True)
        differs = {int(token) for token, other in zip(tokens_B, expected_B, strict=True) if int(token) != int(other)}
    else:
        differs = {token for token in tokens_B.tolist() if not kept_V[token]}
    # a token at the very edge of the nucleus may fall on either side of it by rounding: at most one such token
    sizes = probs_V.sort(descending=True).values
    edge = float(sizes[int(kept_V.sum()) - 1])
    assert len(differs) <= (1 if top_p < 1.0 and edge < 0.05 else 0)


def test_penalties_and_biases() -> None:
    logits_1V = torch.randn(1, 50, generator=torch.Generator().manual_seed(1)) * 3
    prompt, completion = [3, 7, 7], [9, 9, 11]
    item = Decoding(
        repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.25, logit_bias=((4, 2.0), (9, -1.0))
    )
    adjustments = Adjustments([item], [prompt], [frozenset({2})], 50, CPU)
    for token in completion:
        adjustments.note(torch.tensor([token]))
    processor = RepetitionPenaltyLogitsProcessor(1.3)
    expected_V = processor(torch.tensor([prompt + completion]), logits_1V.clone())[0]
    expected_V[9] += -2 * 0.5 - 0.25 - 1.0
    expected_V[11] += -0.5 - 0.25
    expected_V[4] += 2.0
    assert torch.allclose(adjustments.apply(logits_1V, 3)[0], expected_V)


def test_stop_tokens_wait_for_the_least_length() -> None:
    adjustments = Adjustments([Decoding(min_tokens=2)], [[1]], [frozenset({0, 3})], 4, CPU)
    inf = math.inf
    assert adjustments.apply(torch.zeros(1, 4), 1).tolist() == [[-inf, 0.0, 0.0, -inf]]
    assert adjustments.apply(torch.zeros(1, 4), 2).tolist() == [[0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": math.nan}, "temperature=nan: must be >= 0"),
        ({"temperature": 1e300}, "temperature"),
        ({"top_p": 0.0}, r"top_p=0.0: must be in \(0, 1\]"),
        ({"top_p": math.nan}, "top_p"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty=0.0: must be in \[1e-06, 1e\+06\]"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty=1e-40"),  # no logit may become infinite
        ({"presence_penalty": 3.0}, r"presence_penalty=3.0: must be in \[-2, 2\]"),
        ({"n": 10**6}, r"n=1000000: must be in \[1, 4096\]"),
        ({"seed": -1}, r"seed=-1: must be"),
        ({"stop_token_ids": (99,)}, "stop: token 99 is outside the vocabulary of 50"),
        ({"top_logprobs": 51}, r"top_logprobs=51: must be in \[0, 50\]"),
    ],
)
def test_values_outside_their_range_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_decoding(Decoding(**values), 50)


@pytest.mark.parametrize("scale", [0.0, 0.5, 8.0])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.95, 0.9999])
def test_draws_of_a_large_vocabulary_are_within_a_full_sorts_nucleus(scale: float, top_p: float) -> None:
    """Also where all tokens are as likely as each other: those of the lowest ids are kept."""
    logits_V = torch.randn(20_000, generator=torch.Generator().manual_seed(7)) * scale
    probs_V = torch.softmax(logits_V, dim=-1)
    values_V, ids_V = probs_V.sort(descending=True, stable=True)
    likelier_V = values_V.double().cumsum(0) - values_V.double()
    kept_V = torch.zeros(20_000, dtype=torch.bool)
    kept_V[ids_V[likelier_V < top_p]] = True
    tokens = drawn(logits_V, 200, top_p=top_p)
    assert sum(not kept_V[token] for token in tokens) <= 1  # one at the very edge
    assert len(tokens) > 1 or int(kept_V.sum()) < 20
    most = {int(token) for token in torch.nonzero(probs_V == values_V[0])[:, 0]}
    assert drawn(logits_V, 20, top_p=top_p, min_p=1.0) <= most


def test_within_the_nucleus_tokens_are_as_likely_as_they_are_beside_each_other() -> None:
    """0.4, 0.3 and 0.2 of 0.75 are kept, as 0.7 come before the last; 20,000 draws, four standard deviations."""
    logits_V, count = torch.tensor([0.1, 0.4, 0.2, 0.3]).log(), 20_000
    decodings = [Decoding(seed=row, top_p=0.75) for row in range(count)]
    counts_V = torch.bincount(Sampler(decodings, 1, CPU).draw(logits_V.repeat(count, 1), 0)[0], minlength=4)
    for found, share in zip(counts_V.tolist(), (0.0, 4 / 9, 2 / 9, 3 / 9), strict=True):
        assert abs(found - count * share) <= 4 * math.sqrt(count * share * (1 - share))


def test_within_a_nucleus_of_a_large_vocabulary_blocks_are_as_likely_as_they_are() -> None:
    """3000 tokens of five probabilities, most of them at the end; the less likely half of the mass is cut."""
    weights_V = torch.tensor([1.0, 3.0, 2.0, 5.0, 4.0]).repeat(600)
    weights_V[:600] *= 0.25
    probs_V = weights_V / weights_V.sum()
    values_V, ids_V = probs_V.sort(descending=True, stable=True)
    kept_V = torch.zeros(3000, dtype=torch.bool)
    kept_V[ids_V[values_V.double().cumsum(0) - values_V.double() < 0.5]] = True
    share_C = torch.where(kept_V, probs_V, 0.0).view(30, 100).sum(dim=1) / probs_V[kept_V].sum()
    count = 6_000
    decodings = [Decoding(seed=row, top_p=0.5) for row in range(count)]
    found_B = Sampler(decodings, 1, CPU).draw(probs_V.log().expand(count, -1), 0)[0]
    assert int((~kept_V[found_B]).sum()) == 0
    for found, share in zip(torch.bincount(found_B // 100, minlength=30).tolist(), share_C.tolist(), strict=True):
        assert abs(found - count * share) <= 4 * math.sqrt(count * share * (1 - share)) + 1e-9


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
@pytest.mark.parametrize("vocabulary", [5, 2000])
@pytest.mark.parametrize("values", [{}, {"top_p": 0.5}, {"min_p": 0.1}, {"top_k": 2}, {"temperature": 0.0}])
def test_logits_that_are_no_numbers_draw_a_token_whose_logprob_tells(
    wrong: float, vocabulary: int, values: dict[str, Any]
) -> None:
    logits_BV = torch.zeros(2, vocabulary)
    logits_BV[1, 3] = wrong
    tokens_B, logprobs_B, _ = Sampler([Decoding(seed=1, **values)] * 2, 1, CPU).draw(logits_BV, 0)
    assert all(0 <= token < vocabulary for token in tokens_B.tolist())
    assert math.isfinite(logprobs_B[0]) and not math.isfinite(logprobs_B[1])


@pytest.mark.parametrize("values", [{"top_p": 0.0}, {"min_p": 2.0}, {"top_p": -1.0, "min_p": 9.0}])
def test_limits_that_nothing_passes_leave_the_likeliest(values: dict[str, Any]) -> None:
    """Servers refuse them; who asks an engine directly has an answer."""
    assert drawn(torch.tensor([0.1, 0.4, 0.2, 0.3]).log(), 20, **values) == {1}


def test_a_row_draws_what_it_draws_alone() -> None:
    """Of every kind, also what is drawn again, and after other rows have left."""
    kinds: list[dict[str, Any]] = [{}, {"top_p": 0.3}, {"min_p": 0.2}, {"top_k": 3}, {"temperature": 0.0}]
    decodings = [Decoding(seed=row, **kinds[row % 5]) for row in range(40)]
    logits_BV = torch.randn(40, 30, generator=torch.Generator().manual_seed(3))
    together = Sampler(decodings, 2, CPU)
    first_B = together.draw(logits_BV, 0)[0]
    left_K = torch.arange(1, 40, 2)
    together.keep(left_K)
    second_K = together.draw(logits_BV[left_K], 1)[0]
    for row in range(40):
        alone = Sampler([decodings[row]], 2, CPU)
        assert alone.draw(logits_BV[row, None], 0)[0].tolist() == [first_B[row]]
        if row % 2:
            assert alone.draw(logits_BV[row, None], 1)[0].tolist() == [second_K[row // 2]]


@pytest.mark.parametrize("vocabulary", [5, 1024, 1025, 3000])
def test_the_column_at_which_the_cumulative_sum_passes_a_number(vocabulary: int) -> None:
    """Against numpy's search in sums that are exact: counts of 2^20ths, of every number between two of them."""
    generator = np.random.default_rng(vocabulary)
    counts_V = generator.multinomial(2**20, generator.dirichlet(np.full(vocabulary, 0.05)))
    edges_V = np.cumsum(counts_V)
    numbers_N = np.unique(np.concatenate([edges_V[:-1], edges_V - 1, [0, 2**20 - 1]]).clip(0, 2**20 - 1))
    probs_NV = torch.from_numpy(counts_V).float().div(2**20).expand(len(numbers_N), -1)
    columns_N = _invert(probs_NV, torch.from_numpy(numbers_N)[:, None].double() / 2**20)
    assert columns_N.tolist() == np.searchsorted(edges_V, numbers_N, side="right").tolist()


@pytest.mark.parametrize("vocabulary", [3, 1500])
def test_a_token_of_probability_0_is_never_drawn(vocabulary: int) -> None:
    for only in (0, vocabulary // 2):
        probs_NV = torch.zeros(3, vocabulary)
        probs_NV[:, only] = 0.1
        uniform_N1 = torch.tensor([[0.0], [0.5], [1.0]], dtype=torch.float64)
        assert _invert(probs_NV, uniform_N1).tolist() == [only] * 3
