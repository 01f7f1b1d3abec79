"""``value_loss``: PPO's clipped loss of a value network, forward and backward in one pass.

With value v, old value o and return R, a token's term is (Schulman et al. 2017, arXiv 1707.06347, in the form of
OpenAI's baselines, which TRL and verl share)

    1/2 max((v - R)^2, (clip(v, o - clip, o + clip) - R)^2),      or 1/2 (v - R)^2 without clipping.

Terms are aggregated as those of ``ctrl_kernels.policy_loss`` are.

Legend: B sequences, T steps.
"""
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl

from ctrl_kernels import losses_reference
from ctrl_kernels.operators import first_order, operator
from ctrl_kernels.options import (
    AGGREGATIONS,
    Aggregation,
    Backend,
    PolicyOptions,
    check_denominator,
    check_kernel_dtype,
    check_shapes,
    choose,
    resolve_backend,
)
from ctrl_kernels.policy_loss import finish, policy_denominator
from ctrl_kernels.token_tiles import bytes_of, clamped, dense, inverse_denominator, load_fp32, token_runs, token_tile

VALUE_WARPS = 4
_METRICS = ("loss", "tokens", "clip_fraction", "error")  # the columns of the partial sums


@triton.jit
def value_kernel(
    values_ptr,
    old_ptr,
    returns_ptr,
    mask_ptr,
    denominator_ptr,
    d_values_ptr,
    sums_ptr,
    row_length,
    total,
    constant,
    clip,
    BY_LENGTH: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64) * row_length
    end = tl.minimum(begin + row_length, total)
    row_weight = inverse_denominator(denominator_ptr, constant)
    tokens = tl.zeros([LANES], tl.float32)
    if BY_LENGTH:
        for block in range(0, row_length, LANES * VECTOR):
            _, _, active, _ = token_tile(mask_ptr, begin + block, end, LANES, VECTOR, EVEN)
            tokens += tl.sum(tl.where(active, 1.0, 0.0), 1)
        row_weight = row_weight / tl.maximum(tl.sum(tokens, 0), 1.0)
    tokens = tl.zeros([LANES], tl.float32)
    losses = tl.zeros([LANES], tl.float32)
    squares = tl.zeros([LANES], tl.float32)
    clipped_tokens = tl.zeros([LANES], tl.float32)
    for block in range(0, row_length, LANES * VECTOR):
        index, inside, active, read = token_tile(mask_ptr, begin + block, end, LANES, VECTOR, EVEN)
        value = tl.where(active, load_fp32(values_ptr, index, read), 0.0)
        returned = tl.where(active, load_fp32(returns_ptr, index, read), 0.0)
        error = value - returned
        square = error * error
        worse, slope = square, error
        if old_ptr is not None:
            old = tl.where(active, load_fp32(old_ptr, index, read), 0.0)
            bounded = clamped(value, old - clip, old + clip)
            bounded_error = bounded - returned
            clipped = bounded_error * bounded_error > square
            worse = tl.where(clipped, bounded_error * bounded_error, square)
            slope = tl.where(clipped, 0.0, error)
            clipped_tokens += tl.sum(tl.where(clipped, 1.0, 0.0), 1)
        losses += tl.sum(0.5 * worse, 1)
        squares += tl.sum(square, 1)
        tokens += tl.sum(tl.where(active, 1.0, 0.0), 1)
        if d_values_ptr is not None:
            tl.store(d_values_ptr + index, (slope * row_weight).to(d_values_ptr.dtype.element_ty), mask=inside)
    out_ptr = sums_ptr + tl.program_id(0) * 4
    tl.store(out_ptr, tl.sum(losses, 0) * row_weight)
    tl.store(out_ptr + 1, tl.sum(tokens, 0))
    tl.store(out_ptr + 2, tl.sum(clipped_tokens, 0))
    tl.store(out_ptr + 3, tl.sum(squares, 0))


def _fake(
    values: torch.Tensor, old: Any, returns: Any, mask: Any, denominator: Any, constant: Any, train: bool, *_: Any
) -> Any:
    loss, metrics = (values.new_empty(shape, dtype=torch.float32) for shape in ((), len(_METRICS)))
    return loss, metrics, torch.empty_like(values) if train else values.new_empty(0)


@operator(
    "value_loss(Tensor values, Tensor? old_values, Tensor returns, Tensor mask, Tensor? denominator, float constant, "
    "bool train, float clip, bool by_length) -> (Tensor, Tensor, Tensor)",
    _fake,
)
def _value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor | None,
    returns: torch.Tensor,
    mask: torch.Tensor,
    denominator: torch.Tensor | None,
    constant: float,
    train: bool,
    clip: float,
    by_length: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The loss, its metrics, and the gradient of ``values`` if it is asked for."""
    run, programs, tiles = token_runs(values.numel(), values.shape[1] if by_length else None)
    sums = values.new_empty((programs, len(_METRICS)), dtype=torch.float32)
    d_values = torch.empty_like(values) if train else None
    value_kernel[(programs,)](
        values,
        old_values,
        returns,
        bytes_of(mask),
        denominator,
        d_values,
        sums,
        run,
        values.numel(),
        1.0 / constant,
        clip,
        BY_LENGTH=by_length,
        **tiles,
        num_warps=VALUE_WARPS,
    )
    return *finish(sums, len(_METRICS), len(_METRICS)), d_values


class _ValueLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, constants: tuple[Any, ...], settings: tuple[float, bool]) -> Any:
        arguments = (values, *constants, ctx.needs_input_grad[0], *settings)
        loss, metrics, gradient = _value_loss(*arguments)
        ctx.save_for_backward(values, gradient)
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @first_order
    def backward(ctx: Any, d_loss: torch.Tensor, d_metrics: torch.Tensor) -> Any:
        _, gradient = ctx.saved_tensors
        return (gradient * d_loss).to(gradient.dtype), None, None


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    *,
    clip: float | None = 0.2,
    aggregation: Aggregation = "token-mean",
    denominator: float | torch.Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped value loss, an fp32 scalar, and its metrics, a dict of detached scalars.

    All tensors are [B, T]; a token counts where ``mask`` is not 0, and what the others hold does not matter. Gradients
    flow to ``values``. ``clip``: the largest move from ``old_values`` that lowers the loss, > 0; None: no limit.
    ``aggregation`` and ``denominator`` are those of ``policy_loss``. Metrics: ``clip_fraction`` and ``error`` (the mean
    of (v - R)^2) over this call's unmasked tokens, and ``tokens``, their number.
    """
    choose("aggregation", aggregation, AGGREGATIONS)
    if values.dim() != 2:
        raise ValueError(f"values must have shape (B, T), got {tuple(values.shape)}")
    check_shapes(values.shape, values.device, old_values=old_values, returns=returns, mask=mask)
    check_denominator(denominator)
    if clip is not None and not clip > 0:
        raise ValueError(f"clip={clip} must be positive, or None")
    if resolve_backend(backend, values) == "torch" or values.numel() == 0:
        return losses_reference.value_loss(
            values, old_values, returns, mask, clip=clip, aggregation=aggregation, denominator=denominator
        )
    check_kernel_dtype(values=values, old_values=old_values, returns=returns)
    if not torch.is_grad_enabled():
        values = values.detach()
    scalar = policy_denominator(mask, denominator, PolicyOptions(aggregation=aggregation))
    constants = (None if clip is None else dense(old_values), dense(returns), dense(mask))
    on_device = (scalar, 1.0) if isinstance(scalar, torch.Tensor) else (None, scalar)
    by_length = aggregation == "seq-mean-token-mean"
    loss, metrics = _ValueLoss.apply(values.contiguous(), (*constants, *on_device), (clip or 0.0, by_length))
    return loss, dict(zip(_METRICS[1:], metrics.unbind()[1:], strict=True))
