"""``group_advantages`` against a loop: ragged and unsorted groups, groups of one, groups without variance."""

import ctrl_kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracle import loop_group_advantages

ESTIMATORS = ctrl_kernels.ESTIMATORS
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def advantages(rewards: list[float], groups: list[int], estimator: str, backend: str) -> torch.Tensor:
    return ctrl_kernels.group_advantages(
        torch.tensor(rewards, device=DEVICE), torch.tensor(groups, device=DEVICE), estimator=estimator, backend=backend
    )


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_hand_worked(backend: str) -> None:
    rewards, groups = [1.0, 0.0, 5.0, 0.0, 0.3, 0.3, 0.3], [7, 7, -2, 7, 10**12, 10**12, 10**12]
    # Group 7: mean 1/3, deviations 2/3, -1/3, -1/3, unbiased variance (4/9 + 1/9 + 1/9) / 2 = 1/3.
    assert advantages(rewards, groups, "dr_grpo", backend).tolist() == pytest.approx(
        [2 / 3, -1 / 3, 0, -1 / 3, 0, 0, 0]
    )
    assert advantages(rewards, groups, "rloo", backend).tolist() == pytest.approx([1.0, -0.5, 0, -0.5, 0, 0, 0])
    scale = 3**0.5
    expected = [2 / 3 * scale, -scale / 3, 0, -scale / 3, 0, 0, 0]
    assert advantages(rewards, groups, "grpo", backend).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_no_comparison_gives_exactly_zero(estimator: str, backend: str) -> None:
    rewards, groups = [0.1] * 3 + [1e6 + 0.1] * 7 + [3.0], [0] * 3 + [1] * 7 + [2]
    assert advantages(rewards, groups, estimator, backend).tolist() == [0.0] * 11


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_nan_stays_in_its_group(backend: str) -> None:
    out = advantages([1.0, float("nan"), 2.0, 4.0], [0, 0, 1, 1], "dr_grpo", backend)
    assert out[:2].isnan().all()
    assert out[2:].tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_types_sizes_and_gradient(backend: str) -> None:
    rewards = torch.randn(1500, device=DEVICE, requires_grad=True)  # more rows than are compared at a time
    groups = torch.arange(1500, device=DEVICE, dtype=torch.int32) % 3
    out = ctrl_kernels.group_advantages(rewards, groups, backend=backend)
    expected = loop_group_advantages(rewards[:1500:3].double().tolist(), [0] * 500, "grpo")
    assert out.dtype == torch.float32 and not out.requires_grad
    assert out[::3].tolist() == pytest.approx(expected, abs=2e-6)
    half = ctrl_kernels.group_advantages(
        torch.tensor([1.0, 3.0], device=DEVICE).bfloat16(), groups[:1].repeat(2), backend=backend
    )
    assert half.tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5], rel=1e-5)
    empty = ctrl_kernels.group_advantages(rewards[:0], groups[:0], backend=backend)
    assert empty.shape == (0,)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.tuples(st.integers(0, 4), st.floats(-4, 4, width=32)), min_size=1, max_size=20),
    estimator=st.sampled_from(ESTIMATORS),
    backend=st.sampled_from(["triton", "torch"]),
)
def test_any_groups(rows: list[tuple[int, float]], estimator: str, backend: str) -> None:
    groups, rewards = zip(*rows, strict=True)
    expected = loop_group_advantages(list(rewards), list(groups), estimator)
    # A deviation near eps amplifies the rounding of rewards near 4, 2.4e-7, by up to 1 / eps.
    spread = {g: max(r for h, r in rows if h == g) - min(r for h, r in rows if h == g) for g in groups}
    for got, want, group in zip(
        advantages(list(rewards), list(groups), estimator, backend).tolist(), expected, groups, strict=True
    ):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-5 if spread[group] > 1e-2 or estimator != "grpo" else 1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"estimator": "reinforce"}, "grpo, dr_grpo, rloo"),
        ({"eps": 0.0}, "eps"),
        ({"group_ids": torch.zeros(3)}, "integers"),
        ({"group_ids": torch.zeros(2).long()}, r"\(B,\)"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    inputs = {"rewards": torch.zeros(3), "group_ids": torch.zeros(3).long()} | arguments
    with pytest.raises(ValueError, match=message):
        ctrl_kernels.group_advantages(**inputs)
