"""``trainer.shared_prefix``: a prompt computed once gives what it gives computed for each response, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_jobs import spawn
from prefixes import LAYOUTS, MODELS, OPTIONS, batch_of

from ctrl_hpc.train.batch import collate, packed_micro_batches

ALL_LAYOUTS = [layout for layouts in LAYOUTS.values() for layout in layouts]
CPU = torch.device("cpu")


def packed(batch: Any, budget: int = 64, data_rank: int = 0, data_size: int = 1, multiple: int = 1) -> list[Any]:
    return packed_micro_batches(
        batch, data_rank=data_rank, data_size=data_size, budget=budget, multiple=multiple, device=CPU
    )


def test_a_group_is_one_row_whose_prompt_stands_once() -> None:
    batch = collate([([1, 2, 3], [4, 5, 6]), ([1, 2, 3], [7]), ([1, 2, 3], [8, 9])], [None, None, (0, 1)])
    (micro,) = packed(batch, multiple=4)
    assert micro.tokens_BT.tolist() == [[1, 2, 3, 4, 5, 8, 0, 0]]
    assert micro.positions_T.tolist() == [0, 1, 2, 3, 4, 3, 0, 0]
    assert micro.segments.tolist() == [[3, 2, 0, 1]]
    assert micro.targets_N.tolist() == [4, 5, 6, 7, 9]  # 8 is not the policy's
    assert micro.positions_N.tolist() == [2, 3, 4, 2, 5]
    assert micro.rows_N.tolist() == [0, 0, 0, 1, 2] and micro.slots_N.tolist() == [0, 1, 2, 0, 1]
    assert micro.n_slots == 3


def test_micro_batches_count_packed_tokens_and_every_response_is_in_one() -> None:
    batch = collate([([1] * 10, [2] * 5) for _ in range(4)] + [([3] * 6, [4] * 3) for _ in range(2)])
    parts = packed(batch, budget=20)
    assert [micro.tokens_BT.shape[1] for micro in parts] == [18, 18, 10]  # 10 + 2 x 4 twice, 6 + 2 x 2
    assert sorted(row for micro in parts for row in micro.rows_B.tolist()) == list(range(6))
    ranks = [packed(batch, budget=64, data_rank=rank, data_size=2) for rank in range(2)]
    assert sorted(row for parts in ranks for micro in parts for row in micro.rows_B.tolist()) == list(range(6))
    assert len(ranks[0]) == len(ranks[1])
    with pytest.raises(ValueError, match="a sequence of 14 tokens does not fit"):
        packed(batch, budget=13)


def test_without_a_shared_prompt_each_sequence_is_a_row() -> None:
    (micro,) = packed(collate([([1, 2], [3]), ([1, 3], [3])]))
    assert micro.segments is None and micro.tokens_BT.tolist() == [[1, 2], [1, 3]]


@pytest.fixture(scope="module")
def found(workplace: Path) -> dict[tuple[str, str, bool], dict[str, Any]]:
    """What each model gave in each layout, with prompts computed once or not."""
    for ranks in LAYOUTS:
        spawn("prefixes", "check", workplace, ranks)
    return {
        (model, layout, shared): torch.load(workplace / f"prefix-{model}-{layout}-{shared}.pt")
        for model in MODELS
        for layout in ALL_LAYOUTS
        for shared in (True, False)
    }


@pytest.mark.slow
@pytest.mark.parametrize("layout", ALL_LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_gradients_are_those_without(
    found: dict[tuple[str, str, bool], dict[str, Any]], model: str, layout: str
) -> None:
    ours, apart = found[model, layout, True], found[model, "single", False]
    for name in ("logprobs", "entropy"):
        assert (ours[name] - apart[name]).abs().max() <= 1e-5 * apart[name].abs().max()
    assert ours["tokens"] < found[model, layout, False]["tokens"]
    assert batch_of(97).n_tokens == 57
    for kind in OPTIONS:
        names = apart[kind]["gradients"]
        assert ours[kind]["gradients"].keys() == names.keys()
        together = [torch.cat([x[kind]["gradients"][name].flatten() for name in names]) for x in (ours, apart)]
        assert (together[0] - together[1]).norm() <= 1e-5 * together[1].norm()
        assert ours[kind]["logged"] == pytest.approx(apart[kind]["logged"], rel=1e-4, abs=1e-6)
