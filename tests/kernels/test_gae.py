"""``gae`` against a loop over steps: masks with holes, whole rows masked, one step, several blocks."""

import ctrl_kernels
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_oracle import loop_gae

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN = float("nan")


def check(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, lam: float, backend: str
) -> None:
    """Every step, masked ones included, against the loop."""
    outputs = ctrl_kernels.gae(
        rewards.to(DEVICE), values.to(DEVICE), mask.to(DEVICE), gamma=gamma, lam=lam, backend=backend
    )
    rows = zip(rewards.tolist(), values.tolist(), mask.int().tolist(), strict=True)
    expected = [loop_gae(*row, gamma, lam) for row in rows]
    for output, exact in zip(outputs, zip(*expected, strict=True), strict=True):
        limit = 2e-6 * (1 + torch.tensor(exact).abs().max().item())
        assert output.dtype == torch.float32
        assert torch.allclose(output.cpu().double(), torch.tensor(exact, dtype=torch.float64), atol=limit, rtol=2e-6)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_hand_worked(backend: str) -> None:
    rewards = torch.tensor([[1.0, 100.0, 2.0, NAN]], device=DEVICE)
    values = torch.tensor([[0.5, 100.0, 1.0, NAN]], device=DEVICE)
    mask = torch.tensor([[1, 0, 1, 0]], device=DEVICE)
    advantages, returns = ctrl_kernels.gae(rewards, values, mask, gamma=0.5, lam=0.5, backend=backend)
    # Step 2: 2 - 1 = 1. Step 1 carries it. Step 0: 1 + 0.5 * 1 - 0.5 + 0.25 * 1 = 1.25. Step 3: nothing follows.
    assert advantages.tolist() == [[1.25, 1.0, 1.0, 0.0]]
    assert returns.tolist() == [[1.75, 101.0, 2.0, 0.0]]


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(("sequences", "steps"), [(3, 1), (2, 17), (2, 1100)])
def test_masks_with_holes(sequences: int, steps: int, backend: str) -> None:
    generator = torch.Generator().manual_seed(steps)
    rewards, values = torch.randn(2, sequences, steps, generator=generator)
    mask = torch.rand(sequences, steps, generator=generator) > 0.4
    mask[0] = False
    check(rewards, values, mask, 0.99, 0.95, backend)
    check(rewards, values, torch.ones_like(mask, dtype=torch.float32), 1.0, 1.0, backend)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_alone(dtype: torch.dtype, backend: str) -> None:
    rewards, values = torch.randn(2, 3, 30, generator=torch.Generator().manual_seed(6)).to(dtype)
    check(rewards, values, torch.ones(3, 30, dtype=torch.int64), 0.99, 0.95, backend)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_nothing_and_views(backend: str) -> None:
    empty = torch.zeros(0, 5, device=DEVICE)
    assert ctrl_kernels.gae(empty, empty, empty, gamma=1.0, lam=1.0, backend=backend)[0].shape == (0, 5)
    tall = torch.randn(6, 4, device=DEVICE)
    mask = torch.ones(4, 6, device=DEVICE)
    found = ctrl_kernels.gae(tall.T, tall.T * 0.5, mask, gamma=0.9, lam=0.8, backend=backend)
    dense = ctrl_kernels.gae(
        tall.T.contiguous(), (tall.T * 0.5).contiguous(), mask, gamma=0.9, lam=0.8, backend=backend
    )
    assert all(torch.equal(a, b) for a, b in zip(found, dense, strict=True))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    steps=st.lists(
        st.tuples(st.floats(-2, 2, width=16), st.floats(-2, 2, width=16), st.booleans()), min_size=1, max_size=12
    ),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    backend=st.sampled_from(["triton", "torch"]),
)
def test_any_sequence(steps: list[tuple[float, float, bool]], gamma: float, lam: float, backend: str) -> None:
    rewards, values, mask = (torch.tensor([column]) for column in zip(*steps, strict=True))
    check(rewards, values, mask, gamma, lam, backend)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gamma": 1.5}, "gamma"),
        ({"lam": -0.1}, "lam"),
        ({"values": torch.zeros(2, 4)}, "values must have shape"),
        ({"rewards": torch.zeros(3)}, r"\(B, T\)"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, message: str) -> None:
    zeros = torch.zeros(2, 3)
    inputs = {"rewards": zeros, "values": zeros, "mask": zeros, "gamma": 1.0, "lam": 1.0} | arguments
    with pytest.raises(ValueError, match=message):
        ctrl_kernels.gae(**inputs)
