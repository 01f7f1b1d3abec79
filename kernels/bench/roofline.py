"""What the design allows on a card, before a card is at hand: a model of each function from the code that ships.

    python kernels/bench/roofline.py [--copy-tb-s 4.3] [--product-tflop-s 740] [--clock-ghz 1.755] [--exposed 0.5]
                                     [--shape N V D] [--sass FILE] [--json FILE]

The linear functions run as they are on tensors without memory, and every matrix product and kernel that they ask for is
written down with its shape: chunk sizes, orders and types of results are the real ones. A product takes whole waves of
128 x 256 tiles at the rate that a large product reached, and an ``exposed`` part of the traffic of its result, which a
kernel cannot wholly hide; a kernel takes its bytes at ``KERNEL_RATE`` of the copy's bandwidth, or its machine
instructions at the card's rate, whichever is longer; their counts come from ``sass.json``, or another file of
``compile.py --json``. The fused design beside ours is the same mathematics as one ``tl.dot`` kernel: no logits
in memory, but Triton's products, and an epilogue that no other work hides. Names in capitals are assumptions.

Legend: N tokens, V columns, D hidden width, m x n x k a product.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # ctrl_kernels, where the project is not installed

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ctrl_kernels.options import PolicyOptions, SoftmaxOptions

linear_logprobs = importlib.import_module("ctrl_kernels.linear_logprobs")
linear_policy_loss = importlib.import_module("ctrl_kernels.linear_policy_loss")
policy_kernel = importlib.import_module("ctrl_kernels.policy_kernel")
policy_tokens = importlib.import_module("ctrl_kernels.policy_tokens")
projection = importlib.import_module("ctrl_kernels.projection")

PROCESSORS = projection.PROCESSORS
TILE = (128, 256)
KERNEL_RATE = 0.92
LANES_A_CYCLE = PROCESSORS * 4 * 32
TRITON_PRODUCT = 0.86
"""Of cuBLAS's rate, what a persistent ``tl.dot`` kernel with TMA is taken to reach."""
FUSED_EPILOGUE = 14.0
"""Instructions a logit of statistics on an accumulator in registers, reductions across a tile's columns included."""
SASS = Path(__file__).with_name("sass.json")
NAMES = {
    "statistics": "statistics *fp32 tile 1x2048",
    "statistics with weights": "statistics *fp32 weights *bf16 tile 1x2048",
    "logits gradient": "logits gradient *fp32 to *bf16 entropy",
    "weights gradient": "weights gradient *bf16",
    "token_logprobs": "statistics *bf16 tile 1x2048",
    "token_logprobs backward": "logits gradient *bf16 to *bf16 entropy",
    "policy_loss": "policy benchmark",
    "gae": "gae",
}


def counts(path: Path) -> dict[str, float]:
    """Machine instructions an element on sm_90 from ``compile.py --json``."""
    listed = {row["name"]: row["instructions"] for row in json.loads(path.read_text()) if row["target"] == "sm_90"}
    return {name: listed[configuration] for name, configuration in NAMES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What a card does a second, and what part of a product's result traffic nothing hides."""

    copy_tb_s: float = 4.3
    product_tflop_s: float = 740.0
    clock_ghz: float = 1.755
    exposed: float = 0.5
    instructions: dict[str, float] = field(default_factory=lambda: counts(SASS))

    def bytes_ms(self, count: float) -> float:
        """Milliseconds to move so many bytes."""
        return count / self.copy_tb_s / 1e9

    def kernel_ms(self, name: str, elements: float, bytes_each: float) -> float:
        """A kernel's, by traffic or by instructions."""
        issue = elements * self.instructions[name] / (LANES_A_CYCLE * self.clock_ghz * 1e6)
        return max(self.bytes_ms(elements * bytes_each) / KERNEL_RATE, issue)

    def product_ms(self, m: int, n: int, k: int, result_bytes: float) -> float:
        """A product's: whole waves, at the rate of 8192 x 8192 x 8192, whose waves are 97 % full."""
        full = _waves(8192, 8192) * PROCESSORS / (64 * 32)
        flops = _waves(m, n) * PROCESSORS * TILE[0] * TILE[1] * 2 * k
        return flops / (self.product_tflop_s * full * 1e9) + self.exposed * self.bytes_ms(result_bytes)


def _waves(m: int, n: int) -> int:
    tiles = min(math.ceil(m / a) * math.ceil(n / b) for a, b in (TILE, TILE[::-1]))
    return math.ceil(tiles / PROCESSORS)


class Recorder(TorchDispatchMode):
    """Writes down the products of code that runs on tensors without memory, and what it allocates at most."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[int, int, int, float]] = []
        self.kernels: list[tuple[str, int, float]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            out = func(*args, **kwargs)
            touched = 1 if name == "mm" else 2
            self.products.append((a.shape[0], b.shape[1], a.shape[1], touched * out.numel() * out.element_size()))
            return out
        return func(*args, **kwargs)


@contextmanager
def recorded() -> Iterator[Recorder]:
    """The recorder, with launches of kernels replaced by notes of their elements and bytes an element."""
    recorder = Recorder()

    def statistics(logits: Any, *_: Any, weights_NV: Any = None, **__: Any) -> None:
        name, stored = (
            ("statistics", 0) if weights_NV is None else ("statistics with weights", weights_NV.element_size())
        )
        recorder.kernels.append((name, logits.numel(), logits.element_size() + stored))

    def from_logits(logits: Any, out: Any, *_: Any, **__: Any) -> None:
        recorder.kernels.append(("logits gradient", logits.numel(), logits.element_size() + out.element_size()))

    def from_weights(weights: Any, out: Any, *_: Any, **__: Any) -> None:
        recorder.kernels.append(("weights gradient", weights.numel(), weights.element_size() + out.element_size()))

    def combined(statistics: Any, *_: Any) -> Any:
        return tuple(statistics.new_empty(statistics.shape[1]) for _ in range(3))

    sums = policy_kernel.SUMS
    replaced = [
        (projection, "softmax_statistics", statistics),
        (linear_logprobs, "combine_segments", combined),
        (linear_logprobs, "logits_gradient", from_logits),
        (linear_logprobs, "weights_gradient", from_weights),
        (linear_policy_loss, "combine_segments", combined),
        (linear_policy_loss, "weights_gradient", from_weights),
        (policy_tokens, "policy_terms", lambda logprobs, *_, **__: logprobs.new_empty(1, sums)),
        (linear_policy_loss, "policy_totals", lambda x, *_: (x.new_empty(()), x.new_empty(len(policy_kernel.METRICS)))),
    ]
    before = [getattr(module, name) for module, name, _ in replaced]
    for module, name, function in replaced:
        setattr(module, name, function)
    try:
        with recorder:
            yield recorder
    finally:
        for (module, name, _), function in zip(replaced, before, strict=True):
            setattr(module, name, function)


def linear(function: str, tokens: int, columns: int, width: int, workspace_mb: int, *, save: bool = False) -> Recorder:
    """What a linear function asks for: ``forward``, ``backward`` or ``one pass``."""
    hidden = torch.empty(tokens, width, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(columns, width, dtype=torch.bfloat16, device="meta")
    targets = torch.empty(tokens, dtype=torch.int64, device="meta")
    vector = torch.empty(tokens, device="meta")
    shard = SoftmaxOptions().shard(columns)
    common = (False, workspace_mb, "triton", shard)
    with recorded() as recorder:
        if function == "forward":
            linear_logprobs.forward(hidden, weight, None, targets, save, True, *common)
        elif function == "backward":
            saved = linear_logprobs.forward(hidden, weight, None, targets, save, True, *common)[3:]
            recorder.products.clear()
            recorder.kernels.clear()
            scores = (vector, vector, vector, *saved, vector, None, None, True, True, False, save)
            linear_logprobs.backward(hidden, weight, None, targets, *scores, *common)
        else:
            row, mask = vector[None], torch.empty(1, tokens, dtype=torch.bool, device="meta")
            inputs = (targets, mask, row, row, None, None, None, None, 1.0, True, True, False, False, None)
            linear_policy_loss.one_pass(hidden, weight, None, *inputs, False, workspace_mb, shard, PolicyOptions())
    return recorder


def linear_ms(card: Card, recorder: Recorder) -> float:
    """Products and kernels, one after the other."""
    products = sum(card.product_ms(*product) for product in recorder.products)
    return products + sum(card.kernel_ms(*kernel) for kernel in recorder.kernels)


def fused_ms(card: Card, tokens: int, columns: int, width: int, *, gradient: bool) -> float:
    """One tl.dot kernel: Triton's product, then an epilogue on the accumulators; ``gradient`` stores a bf16 result."""
    logits = tokens * columns
    product = 2 * logits * width / (TRITON_PRODUCT * card.product_tflop_s * 1e9)
    instructions = FUSED_EPILOGUE + (10.0 if gradient else 0.0)
    epilogue = logits * instructions / (LANES_A_CYCLE * card.clock_ghz * 1e6)
    return product + epilogue + (card.exposed * card.bytes_ms(2 * logits) if gradient else 0.0)


def rows(card: Card, tokens: int = 8192, columns: int = 152_064, width: int = 3584) -> list[dict[str, Any]]:
    """Every function: milliseconds, and what they are of the limit that a goal names."""
    flops = tokens * columns * width / 1e9
    found: list[dict[str, Any]] = []

    def add(name: str, ms: float, reached: float, unit: str, goal: str) -> None:
        found.append({"name": name, "ms": ms, "reached": reached, "unit": unit, "goal": goal})

    for mib in (480, 2048):
        for save in (False, True):
            suffix = f", {mib} MiB{', logits saved' if save else ''}"
            forward = linear_ms(card, linear("forward", tokens, columns, width, mib, save=save))
            backward = linear_ms(card, linear("backward", tokens, columns, width, mib, save=save))
            add(f"linear forward{suffix}", forward, 2 * flops / forward, "TFLOP/s", ">= 640")
            count = 4 if save else 6
            add(f"linear backward{suffix}", backward, count * flops / backward, "TFLOP/s", ">= 700")
        whole = linear_ms(card, linear("one pass", tokens, columns, width, mib))
        floor = 6 * flops / card.product_tflop_s
        add(f"one pass, {mib} MiB", whole, whole / floor, "x floor", "<= 1.15")
    fused = fused_ms(card, tokens, columns, width, gradient=False)
    add("linear forward, fused tl.dot", fused, 2 * flops / fused, "TFLOP/s", "")
    backward = fused_ms(card, tokens, columns, width, gradient=True)
    backward += card.product_ms(tokens, width, columns, 4 * tokens * width)
    backward += card.product_ms(columns, width, tokens, 2 * columns * width)
    add("linear backward, fused tl.dot for the logits' gradient", backward, 6 * flops / backward, "TFLOP/s", "")
    logits = tokens * columns
    for name, elements, bytes_each, goal in (
        ("token_logprobs", logits, 2, ">= 85"),
        ("token_logprobs backward", logits, 4, ">= 80"),
        ("policy_loss", 1024 * 8192, 21, ">= 65"),
        ("gae", 1024 * 8192, 17, ">= 70"),
    ):
        ms = card.kernel_ms(name, elements, bytes_each) + FIXED_MS[name]
        add(name, ms, 100 * card.bytes_ms(elements * bytes_each) / ms, "% of copy", goal)
    return found


FIXED_MS = {
    "token_logprobs": 0.008,  # the second kernel, and the last tile of each segment, which is 28 % full
    "token_logprobs backward": 0.003,
    "policy_loss": 0.011,  # the kernel that adds up 1024 rows, that of the idle scaling, and a wave that ends unevenly
    "gae": 0.008,  # the first loads of each program, and the last block's scan
}


def main() -> int:
    """Model and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--copy-tb-s", type=float, default=4.3, help="a large copy, bytes read and written; default 4.3"
    )
    parser.add_argument("--product-tflop-s", type=float, default=740.0, help="8192^3 in bf16; default: 740")
    parser.add_argument("--clock-ghz", type=float, default=1.755, help="under load; default: 1.755")
    parser.add_argument("--exposed", type=float, default=0.5, help="part of results' traffic that shows; default: 0.5")
    shape: dict[str, Any] = {"type": int, "nargs": 3, "metavar": ("N", "V", "D"), "default": (8192, 152_064, 3584)}
    parser.add_argument("--shape", **shape, help="of the functions over a vocabulary; default: 8192 152064 3584")
    parser.add_argument("--sass", type=Path, default=SASS, help="instruction counts from compile.py --json")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    given = parser.parse_args()
    card = Card(
        copy_tb_s=given.copy_tb_s,
        product_tflop_s=given.product_tflop_s,
        clock_ghz=given.clock_ghz,
        exposed=given.exposed,
        instructions=counts(given.sass),
    )
    tokens, columns, width = given.shape
    table = rows(card, tokens, columns, width)
    print(f"N={tokens} V={columns} D={width}; policy_loss and gae at 1024 x 8192. A model, no measurement.\n")
    print(f"{'':58}{'ms':>9}{'reached':>10}  {'':10} goal")
    for row in table:
        print(f"{row['name']:58}{row['ms']:9.3f}{row['reached']:10.2f}  {row['unit']:10} {row['goal']}")
    if given.json:
        given.json.write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
