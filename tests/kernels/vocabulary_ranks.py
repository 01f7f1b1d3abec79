"""One rank of a vocabulary-parallel test: ``python vocabulary_ranks.py FOLDER WORLD RANK`` leaves FOLDER/rank-RANK.pt.

The inputs are the same on every rank and in the test; each rank takes its columns of them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ctrl_kernels
import interpreter_rounding
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

TOKENS, COLUMNS, VOCABULARY, WIDTH = 24, 130, 121, 10
UNEVEN = {1: (0, 130), 2: (0, 37, 130), 4: (0, 50, 61, 125, 130)}
"""Where shards begin and end; of four, the last has padding alone."""
EVEN_COLUMNS = 8 * 48
"""Eight segments, whole on each of 1, 2 or 4 ranks."""
BACKENDS = ("triton", "torch")
POLICY = {"clip_high": 0.28, "dual_clip": 3.0, "kl_coef": 0.1, "entropy_coef": 0.02}


class Collectives(TorchDispatchMode):
    """Counts the collectives of this rank, whoever starts them."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "c10d"
        return func(*args, **(kwargs or {}))


def inputs(columns: int = COLUMNS, vocabulary: int = VOCABULARY) -> dict[str, torch.Tensor]:
    """Of the whole vocabulary: what all functions take, with ignored targets and a row that is -inf on one shard."""
    generator = torch.Generator().manual_seed(3)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    targets = torch.randint(0, vocabulary, (TOKENS,), generator=generator)
    targets[::7] = -100
    logits = 4 * normal(TOKENS, columns)
    targets[1] = 2
    logits[1, 37:] = -math.inf
    return {
        "logits": logits,
        "hidden": normal(TOKENS, WIDTH),
        "weight": 3 / math.sqrt(WIDTH) * normal(columns, WIDTH),
        "targets": targets,
        "old_logprobs": -4 + 0.5 * normal(TOKENS),
        "advantages": normal(TOKENS),
        "ref_logprobs": -4 + 0.5 * normal(TOKENS),
        "mask": torch.rand(TOKENS, generator=generator) < 0.8,
        "upstream": normal(2, TOKENS),
    }


def counted(work: Callable[[], Any]) -> tuple[Any, int]:
    """What ``work`` gives, and how many collectives it takes."""
    with Collectives() as collectives:
        return work(), collectives.count


def functions(given: dict[str, torch.Tensor], shard: slice, **options: Any) -> dict[str, Any]:
    """Outputs, gradients and numbers of collectives, forward and backward, of each function on a shard."""
    found: dict[str, Any] = {}
    leaves = [x.clone().requires_grad_() for x in (given["hidden"], given["weight"][shard])]
    logits = given["logits"][:, shard].clone().requires_grad_()
    targets, upstream = given["targets"], list(given["upstream"])
    common = {"vocab_start": shard.start, **options}

    def note(name: str, forward: Callable[[], Any], leaves: list[torch.Tensor], upstream: list[torch.Tensor]) -> None:
        outputs, forward_collectives = counted(forward)
        gradients, backward_collectives = counted(lambda: torch.autograd.grad(outputs, leaves, upstream))
        found[name] = [x.detach() for x in (*outputs, *gradients)]
        found[f"{name} collectives"] = forward_collectives, backward_collectives

    note(
        "token_logprobs",
        lambda: ctrl_kernels.token_logprobs(logits, targets, return_entropy=True, **common),
        [logits],
        upstream,
    )
    for save_logits in (False, True):
        linear = {"return_entropy": True, "save_logits": save_logits, **common}
        name = f"linear_token_logprobs{' saved' if save_logits else ''}"
        note(name, lambda: ctrl_kernels.linear_token_logprobs(*leaves, targets, **linear), leaves, upstream)  # noqa: B023
    constants = {name: given[name] for name in ("old_logprobs", "advantages", "ref_logprobs", "mask")}
    note(
        "linear_policy_loss",
        lambda: ctrl_kernels.linear_policy_loss(*leaves, targets, **constants, **POLICY, **common)[:1],
        leaves,
        [torch.ones(())],
    )
    return found


def main(folder: Path, world: int, rank: int) -> None:
    """Every case on this rank's shard."""
    interpreter_rounding.install()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", world_size=world, rank=rank)
    group = dist.group.WORLD
    shard = slice(*UNEVEN[world][rank : rank + 2])
    found: dict[str, Any] = {}
    for backend in BACKENDS:
        for temperature in (1.0, 0.6):
            found[backend, temperature] = functions(
                inputs(), shard, group=group, vocab_size=VOCABULARY, backend=backend, temperature=temperature
            )
    step = EVEN_COLUMNS // world
    even = slice(rank * step, (rank + 1) * step)
    for dtype in (torch.float32, torch.bfloat16):
        given = {
            name: x.to(dtype) if name in ("logits", "hidden", "weight") else x for name, x in even_inputs().items()
        }
        found["even", dtype] = functions(given, even, group=group, backend="triton")
    torch.save(found, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()


def even_inputs() -> dict[str, torch.Tensor]:
    """A vocabulary of whole segments."""
    return inputs(EVEN_COLUMNS, EVEN_COLUMNS)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
