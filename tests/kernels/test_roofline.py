"""The model of what the design allows: worked by hand, and fed by the code that ships."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "kernels" / "bench"


@pytest.fixture
def roofline(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("roofline")
    sys.modules.pop("roofline", None)


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Nothing here has memory."""


def test_products_and_kernels_by_hand(roofline: ModuleType) -> None:
    card = roofline.Card(copy_tb_s=4.0, product_tflop_s=800.0, clock_ghz=1.0, exposed=0.5)
    # 8192^3 takes its own rate: 2 * 8192^3 / 800 TFLOP/s = 1.374 ms, and half of 134 MB at 4 TB/s = 0.0168 ms.
    assert card.product_ms(8192, 8192, 8192, 2 * 8192**2) == pytest.approx(1.3744 + 0.0168, rel=1e-3)
    # One tile takes as long as the 132 of a wave.
    assert card.product_ms(128, 256, 64, 0) == pytest.approx(card.product_ms(128 * 132, 256, 64, 0))
    assert card.product_ms(128 * 133, 256, 64, 0) == pytest.approx(2 * card.product_ms(128, 256, 64, 0))
    # 1e9 elements of 4 bytes: 1 ms of traffic at 92 %; 12.6 instructions: 1e9 * 12.6 / (16896 * 1e9) s = 0.746 ms.
    assert card.kernel_ms("statistics", 1e9, 4) == pytest.approx(1 / 0.92)
    assert card.kernel_ms("statistics", 1e9, 1) == pytest.approx(0.7457, rel=1e-3)


@pytest.mark.parametrize(("function", "products"), [("forward", 2), ("backward", 6), ("one pass", 6)])
def test_the_code_that_ships_is_what_is_modelled(function: str, products: int, roofline: ModuleType) -> None:
    tokens, columns, width = 4000, 8 * 160, 64
    recorder = roofline.linear(function, tokens, columns, width, 1)
    assert sum(2 * m * n * k for m, n, k, _ in recorder.products) == products * tokens * columns * width
    assert len(recorder.products) > 8  # a MiB of workspace: several chunks
    names = {"forward": {"statistics"}, "backward": {"logits gradient"}}
    passes = {name: 0 for name, _, _ in recorder.kernels}
    for name, elements, _ in recorder.kernels:
        passes[name] += elements
    assert set(passes) == names.get(function, {"statistics with weights", "weights gradient"})
    assert set(passes.values()) == {tokens * columns}


def test_the_weight_gradient_is_one_product_where_memory_allows(roofline: ModuleType) -> None:
    recorder = roofline.linear("backward", 8192, 8 * 160, 64, 2048)
    to_weight = [bytes_ for m, n, k, bytes_ in recorder.products if (n, k) == (64, 8192)]
    assert to_weight == [1280 * 64 * 2]  # written once, in bf16


def test_the_gradient_takes_as_many_segments_together_as_fit(roofline: ModuleType) -> None:
    """8192 tokens of two halves of the vocabulary: 8192 (76032 + 3584) 2 bytes are 1.30 GB of 3/4 of 2 GiB."""
    recorder = roofline.linear("backward", 8192, 152_064, 3584, 2048)
    shapes = {(m, n, k) for m, n, k, _ in recorder.products}
    assert shapes == {(2048, 76_032, 3584), (8192, 3584, 76_032), (76_032, 3584, 8192)}
    assert 2 * 8192 * (76_032 + 3584) + 4 * 2048 * 76_032 <= 2048 << 20


def test_every_goal_is_modelled(roofline: ModuleType) -> None:
    rows = {row["name"]: row for row in roofline.rows(roofline.Card())}
    assert rows["linear forward, 2048 MiB"]["reached"] > rows["linear forward, fused tl.dot"]["reached"]
    for row in (
        row for name, row in rows.items() if "480" not in name and not name.endswith("forward, 2048 MiB, logits saved")
    ):
        goal = row["goal"].split()
        assert not goal or (row["reached"] >= float(goal[1])) == (goal[0] == ">="), row
    assert {row["goal"] for row in rows.values()} == {
        ">= 640",
        ">= 700",
        "<= 1.15",
        ">= 85",
        ">= 80",
        ">= 65",
        ">= 70",
        "",
    }
    assert all(row["ms"] > 0 for row in rows.values())
