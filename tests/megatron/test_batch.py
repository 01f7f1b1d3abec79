"""Batches, micro-batches and their division over data-parallel ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrl_hpc.config import RLConfig
from ctrl_hpc.train.advantages import advantages_and_returns
from ctrl_hpc.train.batch import collate, micro_batches, pack, share

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)
IDS = st.lists(st.integers(1, 99), min_size=1, max_size=9)
PAIRS = st.lists(st.tuples(IDS, IDS), min_size=1, max_size=12)


def test_a_micro_batch_predicts_each_response_token_from_the_position_before_it() -> None:
    batch = collate([([5, 6, 7], [8, 9]), ([1], [2, 3, 4])])
    (micro,) = micro_batches(batch, data_rank=0, data_size=1, budget=100, multiple=1, device=CPU)
    # Longest first: row 0 of the micro-batch is sequence 0 (5 tokens), row 1 is sequence 1.
    assert micro.rows_B.tolist() == [0, 1]
    assert micro.tokens_BT.tolist() == [[5, 6, 7, 8], [1, 2, 3, 4]]
    assert micro.targets_N.tolist() == [8, 9, 2, 3, 4]
    hidden_TB = torch.arange(8).reshape(4, 2)  # position t of sequence b is 2 t + b
    assert hidden_TB.flatten()[micro.positions_N].tolist() == [4, 6, 1, 3, 5]
    assert micro.grid(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).tolist() == [[1, 2, 0], [3, 4, 5]]
    assert micro.pick(torch.tensor([[10, 11, 12], [20, 21, 22]])).tolist() == [10, 11, 20, 21, 22]


def test_what_the_policy_did_not_write_is_in_no_loss() -> None:
    batch = collate([([5, 6], [7, 8, 9, 10]), ([1], [2, 3, 4])], [(1, 3), None])
    assert batch.mask_SR.tolist() == [[True, False, False, True], [True, True, True, False]]
    assert batch.n_tokens == 5 and batch.select([1]).n_tokens == 3
    (micro,) = micro_batches(batch, data_rank=0, data_size=1, budget=100, multiple=1, device=CPU)
    assert micro.tokens_BT.tolist() == [[5, 6, 7, 8, 9], [1, 2, 3, 4, 0]]  # what was put there is read all the same
    assert micro.targets_N.tolist() == [7, 10, 2, 3, 4]
    assert micro.grid(torch.ones(5)).tolist() == [[1, 0, 0, 1], [1, 1, 1, 0]]


def test_the_reward_comes_with_the_last_token_that_counts() -> None:
    mask_SR = torch.tensor([[True, False, False, True], [True, True, False, False]])
    options = RLConfig(gae_gamma=1.0, gae_lambda=1.0)
    rewards_S, values_SR = torch.tensor([1.0, 2.0]), torch.zeros(2, 4)
    _, returns_SR = advantages_and_returns(rewards_S, values_SR, mask_SR, options)
    assert returns_SR[mask_SR].tolist() == [1.0, 1.0, 2.0, 2.0]


def test_the_width_is_a_multiple_of_what_sequence_parallelism_needs() -> None:
    batch = collate([([1, 2], [3, 4])])
    (micro,) = micro_batches(batch, data_rank=0, data_size=1, budget=100, multiple=4, device=CPU)
    assert micro.tokens_BT.tolist() == [[1, 2, 3, 0]]


@settings(max_examples=60, derandomize=True, deadline=None)
@given(pairs=PAIRS, ranks=st.integers(1, 4), budget=st.integers(20, 60))
def test_every_token_is_learnt_once_whatever_the_division(
    pairs: list[tuple[list[int], list[int]]], ranks: int, budget: int
) -> None:
    batch = collate(pairs)
    seen: dict[tuple[int, int], int] = {}
    counts = set()
    for rank in range(ranks):
        parts = micro_batches(batch, data_rank=rank, data_size=ranks, budget=budget, multiple=2, device=CPU)
        counts.add(len(parts))
        for micro in parts:
            assert micro.tokens_BT.shape[0] * (micro.tokens_BT.shape[1] - 1) <= budget
            found = zip(micro.rows_N.tolist(), micro.slots_N.tolist(), micro.targets_N.tolist(), strict=True)
            for row, slot, target in found:
                key = (int(micro.rows_B[row]), slot)
                assert key not in seen
                seen[key] = target
    assert seen == {(s, r): token for s, (_, response) in enumerate(pairs) for r, token in enumerate(response)}
    assert len(counts) == 1, "data-parallel ranks do the same number of micro-batches"


@settings(max_examples=60, derandomize=True, deadline=None)
@given(lengths=LENGTHS, ranks=st.integers(1, 4))
def test_ranks_get_equal_work(lengths: list[int], ranks: int) -> None:
    shares = share(lengths, ranks)
    assert sorted(row for rows in shares for row in rows) == list(range(len(lengths)))
    work = [sum(lengths[row] for row in rows) for rows in shares]
    assert max(work) - min(work) <= max(lengths)


def test_packing_is_dense_and_by_length() -> None:
    assert pack([0, 1, 2, 3], [3, 10, 9, 4], 20) == [[1, 2], [3, 0]]


def test_a_sequence_beyond_the_budget_names_the_key_to_raise() -> None:
    with pytest.raises(ValueError, match=r"trainer\.micro_batch_tokens=8: a sequence of 9 tokens does not fit"):
        pack([0], [9], 8)
