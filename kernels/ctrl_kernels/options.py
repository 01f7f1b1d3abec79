"""What calls are made of: backends, the options of the softmax and of the policy loss, and checks of their inputs.

Options are keyword arguments of the public functions, listed, explained and checked once: here.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar, get_args, get_type_hints

import torch
import torch.distributed as dist
from triton import language as tl
from triton.runtime.interpreter import InterpretedFunction

Backend = Literal["auto", "triton", "torch"]
Estimator = Literal["grpo", "dr_grpo", "rloo"]
Objective = Literal["clip", "cispo", "dppo_tv", "dppo_kl", "sapo", "gmpo"]
Ratio = Literal["token", "sequence", "sequence-token"]
Aggregation = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]
KlEstimator = Literal["k1", "k2", "k3"]

BACKENDS: tuple[str, ...] = get_args(Backend)
ESTIMATORS: tuple[str, ...] = get_args(Estimator)
OBJECTIVES: tuple[str, ...] = get_args(Objective)
RATIOS: tuple[str, ...] = get_args(Ratio)
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)
KL_ESTIMATORS: tuple[str, ...] = get_args(KlEstimator)

LOG_RATIO_LIMIT = 20.0  # exp(20) is 5e8: beyond it a ratio is a fault of the rollout, not a signal
K3_LIMIT = 10.0
LEAST_LOGPROB = -1e30  # stands in for -inf among constant log-probs, where -inf - -inf would be NaN
FLOOR = -800.0  # exp(FLOOR) is 0 in float64 too: stands in for -inf where -inf * 0 would be NaN
_MIN_TEMPERATURE = 1e-4
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = isinstance(tl.max, InterpretedFunction)
"""Whether Triton's kernels run in its interpreter: ``TRITON_INTERPRET=1`` before triton's first import."""


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up; triton's own of that name costs 10 microseconds on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least ``n`` >= 1; likewise."""
    return 1 << (n - 1).bit_length()


def choose(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError, listing what is allowed, unless ``value`` is."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(allowed)}")


def resolve_backend(backend: str, tensor: torch.Tensor) -> Literal["triton", "torch"]:
    """The backend that a call with ``backend`` uses for ``tensor``: ``auto`` is Triton on CUDA and PyTorch elsewhere.

    Raises ValueError for an unknown name, and for Triton on what it cannot run: CPU tensors outside the interpreter.
    """
    choose("backend", backend, BACKENDS)
    if backend == "triton" or (backend == "auto" and tensor.is_cuda):
        refuse_transforms()
    if backend == "auto":
        return "triton" if tensor.is_cuda else "torch"
    if backend == "triton" and not tensor.is_cuda and not INTERPRETED:
        raise ValueError(
            f"backend='triton' needs CUDA tensors, got {tensor.device}; on a CPU set TRITON_INTERPRET=1 "
            "before Python starts, or use backend='torch' or 'auto'"
        )
    return "triton" if backend == "triton" else "torch"


def refuse_transforms() -> None:
    """Raise RuntimeError inside ``torch.vmap`` and the transforms of ``torch.func``."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "ctrl_kernels: torch.vmap and torch.func are not supported; flatten the batch dimension into the tokens, "
            "and differentiate with torch.autograd"
        )


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """What plain PyTorch computes in: float64 if any tensor is, else float32."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def check_kernel_dtype(**tensors: torch.Tensor | None) -> None:
    """Raise ValueError, naming the tensor, unless every one that is given has a type that the kernels compute with."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in _KERNEL_DTYPES:
            raise ValueError(f"backend='triton' takes float32, bfloat16 or float16, got {name} in {tensor.dtype}")


def check_shapes(shape: torch.Size, device: torch.device, **tensors: torch.Tensor | None) -> None:
    """Raise ValueError, naming the tensor, unless every one that is given has this shape and device."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
        if tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the other inputs on {device}")


def check_denominator(denominator: float | torch.Tensor | None) -> None:
    """Raise ValueError unless ``denominator`` is None, a positive number or a scalar tensor."""
    if isinstance(denominator, torch.Tensor):
        if denominator.numel() != 1:
            raise ValueError(f"denominator must be a scalar, got shape {tuple(denominator.shape)}")
    elif denominator is not None and not denominator > 0:
        raise ValueError(f"denominator={denominator} must be positive")


def check_targets(targets: torch.Tensor, tokens: int, device: torch.device) -> None:
    """Raise ValueError unless ``targets`` is an integer vector with an entry a token, on ``device``."""
    if targets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"targets must be int32 or int64, got {targets.dtype}")
    if targets.shape != (tokens,):
        raise ValueError(f"targets must have shape ({tokens},), one for each row, got {tuple(targets.shape)}")
    if targets.device != device:
        raise ValueError(f"targets are on {targets.device}, the other inputs on {device}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftmaxOptions:
    """The distribution over the vocabulary: this rank's shard of it, and the map from logits x to scores,

    ``softcap * tanh(logit_scale * x / softcap) / temperature``, without the tanh if ``softcap`` is None.
    """

    temperature: float = 1.0
    """At least 1e-4."""
    group: dist.ProcessGroup | None = None
    """The ranks that share the vocabulary, each with its columns; None: this one has them all."""
    vocab_start: int = 0
    """The first column of this rank's shard in the whole vocabulary."""
    vocab_size: int | None = None
    """Columns of the true vocabulary, over all ranks; those past it are padding. None: no padding."""
    ignore_index: int = -100
    """Tokens with this target are left out: log-prob and entropy 0, no gradient."""
    softcap: float | None = None
    """The largest magnitude of a logit, > 0; None: as they come."""
    logit_scale: float = 1.0
    """What logits are multiplied by before anything else, > 0."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value outside its range."""
        if not (math.isfinite(self.temperature) and self.temperature >= _MIN_TEMPERATURE):
            raise ValueError(f"temperature={self.temperature} must be finite and at least {_MIN_TEMPERATURE}")
        if self.vocab_start < 0:
            raise ValueError(f"vocab_start={self.vocab_start} must not be negative")
        if self.vocab_size is not None and self.vocab_size < 1:
            raise ValueError(f"vocab_size={self.vocab_size} must be positive")
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise ValueError(f"softcap={self.softcap} must be positive and finite, or None")
        if not (math.isfinite(self.logit_scale) and self.logit_scale > 0):
            raise ValueError(f"logit_scale={self.logit_scale} must be positive and finite")

    def shard(self, columns: int) -> Shard:
        """These options for a shard of so many columns."""
        if self.group is None and not torch.compiler.is_compiling():
            return _cached_shard(self, columns)
        return self._shard(columns)

    def _shard(self, columns: int) -> Shard:
        start, scale = self.vocab_start, self.logit_scale
        valid = columns if self.vocab_size is None else min(max(self.vocab_size - start, 0), columns)
        return Shard(
            start=start,
            valid=valid,
            ignore_index=self.ignore_index,
            # softcap tanh(scale x / softcap) / T = (softcap / scale) tanh(x / (softcap / scale)) / (T / scale)
            temperature=self.temperature / scale,
            softcap=0.0 if self.softcap is None else self.softcap / scale,
            group="" if self.group is None else self.group.group_name,
            ranks=1 if self.group is None else dist.get_world_size(self.group),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A rank's columns of the vocabulary: ``valid`` counts those that are no padding; ``softcap`` 0 means none."""

    start: int
    valid: int
    ignore_index: int
    temperature: float
    softcap: float
    group: str
    ranks: int

    @classmethod
    def of(cls, values: tuple[Any, ...]) -> Shard:
        """From the fields' values, in order."""
        return cls(**dict(zip(_ORDER[cls], values, strict=True)))

    @property
    def process_group(self) -> dist.ProcessGroup:
        """The group of this name."""
        return dist.distributed_c10d._resolve_process_group(self.group)


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyOptions:
    """The options of the policy loss that are not tensors; ``ctrl_kernels.policy_loss`` states the formulas."""

    objective: Objective = "clip"
    """What takes the place of PPO's clipped ratio."""
    ratio: Ratio = "token"
    """Whose ratio: a token's, its sequence's (GSPO), or the sequence's with a token's gradient (GSPO-token)."""
    clip_low: float = 0.2
    """How far below 1 a ratio may fall, in [0, 1]; for ``dppo_*`` a divergence, for ``gmpo`` a log-ratio, both >= 0."""
    clip_high: float = 0.2
    """How far above 1 it may rise, >= 0; likewise."""
    dual_clip: float | None = None
    """The largest ratio that counts where the advantage is negative, > 1 (``clip`` only); None: no limit."""
    ratio_cap: float | None = None
    """The largest ratio that counts at all, > 0 (``dppo_*`` only); None: no limit."""
    tau_positive: float = 1.0
    """Steepness of ``sapo``'s gate where the advantage is positive, > 0."""
    tau_negative: float = 1.05
    """Steepness of ``sapo``'s gate elsewhere, > 0."""
    kl_coef: float = 0.0
    """Weight of the KL estimate against ``ref_logprobs``."""
    kl_estimator: KlEstimator = "k3"
    """Which estimate."""
    kl_correction: bool = False
    """Whether the estimate is multiplied by the ratio, so that its gradient is the true KL's; not for ``gmpo``."""
    aggregation: Aggregation = "token-mean"
    """How tokens' terms become one number."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value outside its range."""
        choose("objective", self.objective, OBJECTIVES)
        choose("ratio", self.ratio, RATIOS)
        choose("aggregation", self.aggregation, AGGREGATIONS)
        choose("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        if self.objective != "clip" and self.ratio != "token":
            raise ValueError(f"ratio={self.ratio!r} goes with objective='clip' alone, not {self.objective!r}")
        widest = 1.0 if self.objective in ("clip", "cispo") else math.inf
        if not 0 <= self.clip_low <= widest:
            raise ValueError(f"clip_low={self.clip_low} must lie between 0 and {widest:g}")
        if not self.clip_high >= 0:
            raise ValueError(f"clip_high={self.clip_high} must not be negative")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip={self.dual_clip} must be greater than 1, or None")
        if self.dual_clip is not None and self.objective != "clip":
            raise ValueError(f"dual_clip goes with objective='clip', not {self.objective!r}")
        if self.ratio_cap is not None and not (self.ratio_cap > 0 and self.objective.startswith("dppo")):
            raise ValueError(
                f"ratio_cap={self.ratio_cap} must be positive, and goes with objective='dppo_tv' or 'dppo_kl'"
            )
        if self.kl_correction and self.objective == "gmpo":
            raise ValueError("kl_correction does not go with objective='gmpo'")
        if not (self.tau_positive > 0 and self.tau_negative > 0):
            raise ValueError(f"tau_positive={self.tau_positive} and tau_negative={self.tau_negative} must be positive")

    def check_terms(self, **tensors: torch.Tensor | None) -> None:
        """Raise ValueError where a term has a weight, but no tensor."""
        for coefficient, name in (("kl_coef", "ref_logprobs"), ("entropy_coef", "entropy")):
            if getattr(self, coefficient) != 0 and tensors.get(name, self) is None:
                raise ValueError(f"{coefficient}={getattr(self, coefficient)} needs {name}")

    @classmethod
    def of(cls, values: tuple[Any, ...]) -> PolicyOptions:
        """From the fields' values, in order."""
        return _cached_policy(**dict(zip(_ORDER[cls], values, strict=True)))

    @property
    def by_sequence(self) -> bool:
        """Whether a token's term needs its whole sequence's log-probs."""
        return self.ratio != "token" or self.objective == "gmpo"


_Function = TypeVar("_Function", bound=Callable[..., Any])
_cached_softmax = lru_cache(maxsize=64)(SoftmaxOptions)
_cached_shard = lru_cache(maxsize=64)(SoftmaxOptions._shard)
_cached_policy = lru_cache(maxsize=64)(PolicyOptions)
_FIELDS: dict[type, tuple[str, ...]] = {
    kind: tuple(f.name for f in dataclasses.fields(kind)) for kind in (SoftmaxOptions, PolicyOptions)
}

_POLICY_NAMES = frozenset(_FIELDS[PolicyOptions])


def softmax_options(options: dict[str, Any]) -> SoftmaxOptions:
    """The softmax's part of a call's keyword arguments, taken out of them."""
    chosen = {name: options.pop(name) for name in _FIELDS[SoftmaxOptions] if name in options}
    # A process group must not live on in a cache.
    if torch.compiler.is_compiling() or chosen.get("group") is not None:
        return SoftmaxOptions(**chosen)
    return _cached_softmax(**chosen)


def policy_options(options: dict[str, Any]) -> PolicyOptions:
    """The policy loss's part of a call's keyword arguments, taken out of them."""
    if not torch.compiler.is_compiling() and options.keys() <= _POLICY_NAMES:
        taken = _cached_policy(**options)
        options.clear()
        return taken
    chosen = {name: options.pop(name) for name in _FIELDS[PolicyOptions] if name in options}
    return PolicyOptions(**chosen) if torch.compiler.is_compiling() else _cached_policy(**chosen)


def with_options(*kinds: type) -> Callable[[_Function], _Function]:
    """Show the fields of these options in a function's signature, where it says ``**options``, and refuse others."""

    def decorate(function: _Function) -> _Function:
        shown = inspect.signature(function)
        given = [p for p in shown.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        listed = []
        for kind in kinds:
            types = get_type_hints(kind)
            listed += [
                inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=types[f.name])
                for f in dataclasses.fields(kind)
            ]
        function.__signature__ = shown.replace(parameters=[*given, *listed])  # type: ignore[attr-defined]
        return function

    return decorate


def refuse(function: str, options: dict[str, Any], *kinds: type) -> None:
    """Raise TypeError for keyword arguments that no options took."""
    if options:
        allowed = ", ".join(name for kind in kinds for name in _FIELDS[kind])
        raise TypeError(f"{function}() has no option {', '.join(options)}; besides tensors it takes {allowed}")


def flat(options: Any) -> list[Any]:
    """The fields' values, in order: what an operator takes in their stead."""
    return [getattr(options, field) for field in _ORDER[type(options)]]


_ORDER = {kind: tuple(f.name for f in dataclasses.fields(kind)) for kind in (Shard, PolicyOptions)}
_TYPES = {"int": "int", "bool": "bool", "float": "float", "str": "str", "float | None": "float?"}


def schema(kind: type) -> str:
    """The fields as arguments of an operator."""
    fields = dataclasses.fields(kind)
    return ", ".join(f"{_TYPES.get(str(f.type), 'str')} {f.name}" for f in fields)
