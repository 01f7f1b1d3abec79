"""What is timed: shapes, inputs, and the contenders that are ours or PyTorch's own.

A contender makes, from a case's inputs, the call to time. ``results`` says what the call returns: ``logprobs``,
``logprobs and entropy`` (both [N]), ``sum`` (of the log-probs), ``loss`` (of the policy), or ``values`` (no gradient).

Legend: N tokens, V columns of a shard, D hidden width, B sequences, T steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

import ctrl_kernels

Family = Literal["logits", "linear", "one pass", "group advantages", "gae", "policy loss"]
Results = Literal["logprobs", "logprobs and entropy", "sum", "loss", "values"]
Call = Callable[[], tuple[torch.Tensor, ...]]
TRITON: Any = "triton"
LOSS_OPTIONS: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A family at a shape: ``rows`` are tokens, or sequences; ``columns`` a shard's vocabulary, or steps."""

    family: Family
    rows: int
    columns: int = 0
    width: int = 0
    shards: int = 1

    @property
    def name(self) -> str:
        """As the table shows it."""
        if self.family in ("logits", "linear", "one pass"):
            width = f" D={self.width}" if self.width else ""
            return f"{self.family} N={self.rows} V={self.columns * self.shards}{width} shards={self.shards}"
        return f"{self.family} {self.rows}x{self.columns}" if self.columns else f"{self.family} {self.rows}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Tensors of a case; ``leaves`` are those that get gradients."""

    case: Case
    tensors: dict[str, torch.Tensor]
    leaves: tuple[torch.Tensor, ...]
    upstream: tuple[torch.Tensor, ...]

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A way to compute a family; ``products`` are its multiples of N V D operations, forward and backward.

    ``captured``: its kernels alone are timed, in a CUDA graph. ``single_shard``: it knows no shards.
    """

    name: str
    families: tuple[Family, ...]
    results: Results
    make: Callable[[Inputs], Call]
    products: tuple[int, int] | None = None
    captured: bool = False
    ours: bool = False
    slow: bool = False
    dtypes: tuple[torch.dtype, ...] = field(default=(torch.bfloat16, torch.float32))


def inputs(case: Case, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Inputs:
    """Random ones, always the same for a case."""
    generator = torch.Generator(device).manual_seed(case.rows + case.columns + case.width)

    def normal(*size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*size, device=device, dtype=dtype, generator=generator)

    if case.family in ("logits", "linear", "one pass"):
        return _vocabulary_inputs(case, device, dtype, normal, generator)
    if case.family == "group advantages":
        groups = torch.randperm(case.rows, device=device, generator=generator) // 8
        return Inputs(case=case, tensors={"rewards": normal(case.rows), "groups": groups}, leaves=(), upstream=())
    shape = (case.rows, case.columns)
    mask = torch.rand(shape, device=device, generator=generator) < 0.9
    if case.family == "gae":
        tensors = {"rewards": normal(*shape), "values": normal(*shape), "mask": mask}
        return Inputs(case=case, tensors=tensors, leaves=(), upstream=())
    old = normal(*shape) - 3
    tensors = {
        "logprobs": (old + 0.2 * normal(*shape)).requires_grad_(),
        "old_logprobs": old,
        "advantages": normal(*shape),
        "ref_logprobs": old + 0.1 * normal(*shape),
        "mask": mask,
    }
    return Inputs(case=case, tensors=tensors, leaves=(tensors["logprobs"],), upstream=())


def _vocabulary_inputs(
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    normal: Callable[..., torch.Tensor],
    generator: torch.Generator,
) -> Inputs:
    targets = torch.randint(case.columns, (case.rows,), device=device, generator=generator)
    tensors = {"targets": targets}
    if case.family == "logits":
        tensors["logits"] = normal(case.rows, case.columns, dtype=dtype).mul_(2).requires_grad_()
        leaves = (tensors["logits"],)
    else:
        tensors["hidden"] = normal(case.rows, case.width, dtype=dtype).requires_grad_()
        tensors["weight"] = normal(case.columns, case.width, dtype=dtype).mul_(2 * case.width**-0.5).requires_grad_()
        leaves = (tensors["hidden"], tensors["weight"])
    if case.family == "one pass":
        tensors |= {
            "old_logprobs": normal(case.rows) * 0.2 - 10,
            "advantages": normal(case.rows),
            "mask": torch.ones(case.rows, dtype=torch.bool, device=device),
        }
        return Inputs(case=case, tensors=tensors, leaves=leaves, upstream=())
    return Inputs(case=case, tensors=tensors, leaves=leaves, upstream=(normal(case.rows), normal(case.rows)))


def eager(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropy as one writes them."""
    logp = torch.log_softmax(logits.float(), 1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(1)


def _policy_constants(x: Inputs) -> dict[str, Any]:
    names = ("old_logprobs", "advantages", "mask")
    return {name: x[name] for name in names} | {"denominator": float(x.case.rows), **LOSS_OPTIONS}


def _rows(x: Inputs) -> dict[str, Any]:
    return {name: v[None] if isinstance(v, torch.Tensor) else v for name, v in _policy_constants(x).items()}


def _two_passes(x: Inputs, logprobs_and_entropy: Callable[[], tuple[Any, Any]], backend: Any) -> Call:
    def call() -> tuple[torch.Tensor, ...]:
        logprobs, entropy = logprobs_and_entropy()
        loss, _ = ctrl_kernels.policy_loss(logprobs[None], **_rows(x), entropy=entropy[None], backend=backend)
        return (loss,)

    return call


def _linear(x: Inputs, **options: Any) -> tuple[torch.Tensor, ...]:
    outputs = ctrl_kernels.linear_token_logprobs(
        x["hidden"], x["weight"], x["targets"], return_entropy=True, backend=TRITON, **options
    )
    return tuple(outputs)


def _one_pass(x: Inputs, **options: Any) -> Call:
    constants = _policy_constants(x)
    arguments = (x["hidden"], x["weight"], x["targets"])
    return lambda: ctrl_kernels.linear_policy_loss(*arguments, **constants, backend=TRITON, **options)[:1]


def _policy_loss(x: Inputs, backend: Any) -> tuple[torch.Tensor, ...]:
    tokens = float(x.case.rows * x.case.columns)
    options = LOSS_OPTIONS | {"kl_coef": 0.01, "denominator": tokens}
    return ctrl_kernels.policy_loss(**x.tensors, backend=backend, **options)[:1]


def ours() -> list[Contender]:
    """The kernels."""
    return [*_ours_over_the_vocabulary(), *_ours_over_tokens()]


def _ours_over_the_vocabulary() -> list[Contender]:
    def logits(x: Inputs) -> Call:
        return lambda: tuple(
            ctrl_kernels.token_logprobs(x["logits"], x["targets"], return_entropy=True, backend=TRITON)
        )

    def linear(**options: Any) -> Callable[[Inputs], Call]:
        return lambda x: lambda: _linear(x, **options)

    both: Results = "logprobs and entropy"
    passes: list[tuple[str, Callable[[Inputs], Call], tuple[int, int]]] = [
        ("ctrl", _one_pass, (6, 0)),
        ("ctrl, 480 MiB of workspace", lambda x: _one_pass(x, workspace_mb=480), (6, 0)),
        ("ctrl, two passes", lambda x: _two_passes(x, lambda: _linear(x), TRITON), (2, 6)),  # type: ignore[arg-type,return-value]
    ]
    return [
        Contender(name="ctrl", families=("logits",), results=both, make=logits, ours=True),
        *(
            Contender(name=name, families=("linear",), results=both, make=make, products=products, ours=True)
            for name, make, products in (
                ("ctrl, logits recomputed", linear(), (2, 6)),
                ("ctrl, logits saved", linear(save_logits=True), (2, 4)),
            )
        ),
        *(
            Contender(name=name, families=("one pass",), results="loss", make=make, products=products, ours=True)
            for name, make, products in passes
        ),
    ]


def _ours_over_tokens() -> list[Contender]:
    def groups(x: Inputs) -> Call:
        return lambda: (ctrl_kernels.group_advantages(x["rewards"], x["groups"], backend=TRITON),)

    def gae(x: Inputs) -> Call:
        return lambda: ctrl_kernels.gae(**x.tensors, gamma=0.99, lam=0.95, backend=TRITON)

    def loss(x: Inputs) -> Call:
        return lambda: _policy_loss(x, TRITON)

    made: list[tuple[Family, Results, Callable[[Inputs], Call]]] = [
        ("group advantages", "values", groups),
        ("gae", "values", gae),
        ("policy loss", "loss", loss),
    ]
    return [
        Contender(name="ctrl", families=(family,), results=results, make=make, captured=True, ours=True)
        for family, results, make in made
    ]


def eager_torch() -> list[Contender]:
    """PyTorch, one operation at a time."""

    def logits(x: Inputs) -> torch.Tensor:
        return x["hidden"] @ x["weight"].T

    both: Results = "logprobs and entropy"
    return [
        Contender(
            name="torch eager",
            families=("logits",),
            results=both,
            make=lambda x: lambda: eager(x["logits"], x["targets"]),
        ),
        Contender(
            name="torch eager",
            families=("linear",),
            results=both,
            make=lambda x: lambda: eager(logits(x), x["targets"]),
            products=(2, 4),
        ),
        Contender(
            name="torch eager",
            families=("one pass",),
            results="loss",
            make=lambda x: _two_passes(x, lambda: eager(logits(x), x["targets"]), "torch"),
            products=(2, 4),
        ),
        Contender(
            name="torch eager",
            families=("group advantages",),
            results="values",
            make=lambda x: lambda: (ctrl_kernels.group_advantages(x["rewards"], x["groups"], backend="torch"),),
        ),
        Contender(
            name="torch eager",
            families=("gae",),
            results="values",
            make=lambda x: lambda: ctrl_kernels.gae(**x.tensors, gamma=0.99, lam=0.95, backend="torch"),
            slow=True,
        ),
        Contender(
            name="torch eager",
            families=("policy loss",),
            results="loss",
            make=lambda x: lambda: _policy_loss(x, "torch"),
            captured=True,
        ),
    ]
