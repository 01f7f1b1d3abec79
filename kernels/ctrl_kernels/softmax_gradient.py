"""The gradient of the logits: one read and one write of them, or of the weights that stand for them.

With p_j = exp(z_j - lse), the gradient g of the log-prob and h of the entropy H, and temperature T, a raw logit's
gradient is

    (g 1[j = target] - p_j (g + h (log p_j + H))) / T      (times 1 - tanh^2(x_j / softcap) with a softcap),

formed in fp32 and rounded once. The first kernel takes p from the logits; the second takes it from the weights and
tile maxima that ``ctrl_kernels.softmax_statistics`` stored, and at the target from the log-prob itself, so that
rounded weights do not touch the difference 1 - p that the target's gradient consists of.

Legend: N tokens, V columns of this rank's vocabulary shard, K tiles of it.
"""
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl

from ctrl_kernels.options import Shard, ceil_div, next_power_of_2
from ctrl_kernels.softmax_statistics import LN2, LOG2_FLOOR, LOG2E, TILE_ELEMENTS, softcapped, tile_shape

GRADIENT_WARPS = 4


@triton.jit
def logits_gradient_kernel(
    logits_ptr,
    logits_stride,
    bias_ptr,
    out_ptr,
    out_stride,
    targets_ptr,
    lse_ptr,
    entropy_ptr,
    d_logprob_ptr,
    d_logprob_stride,
    d_entropy_ptr,
    d_entropy_stride,
    tokens,
    columns,
    valid,
    start,
    ignore_index,
    inverse_temperature,
    softcap,
    HAS_LOGPROB: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    column_blocks = tl.cdiv(columns, BLOCK_V)
    row = (tl.program_id(0) // column_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = (tl.program_id(0) % column_blocks) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_inside = row < tokens
    inside = row_inside[:, None] & (column < valid)[None, :]
    target = tl.load(targets_ptr + row, mask=row_inside, other=ignore_index)
    lse = tl.load(lse_ptr + row, mask=row_inside, other=0.0)
    kept = (target != ignore_index) & (lse != float("inf"))  # a row of -inf alone has no gradient
    x = tl.load(logits_ptr + row[:, None] * logits_stride + column[None, :], mask=inside & kept[:, None], other=0.0).to(
        tl.float32
    )
    if bias_ptr is not None:
        x += tl.load(bias_ptr + column, mask=column < valid, other=0.0).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        x = softcapped(x, softcap)
    logp = (x * inverse_temperature - lse[:, None]) * LOG2E
    p = tl.exp2(logp)
    g = tl.zeros([BLOCK_N], tl.float32)
    if HAS_LOGPROB:
        g = tl.load(d_logprob_ptr + row * d_logprob_stride, mask=row_inside, other=0.0) * inverse_temperature
    factor = g[:, None]
    if HAS_ENTROPY:
        h = tl.load(d_entropy_ptr + row * d_entropy_stride, mask=row_inside, other=0.0) * inverse_temperature
        entropy = tl.load(entropy_ptr + row, mask=row_inside, other=0.0)
        factor += h[:, None] * (tl.maximum(logp, LOG2_FLOOR) * LN2 + entropy[:, None])
    at_target = column[None, :] == (target.to(tl.int64) - start)[:, None]
    gradient = tl.where(at_target, g[:, None], 0.0) - p * factor
    if HAS_SOFTCAP:
        gradient *= 1.0 - (x / softcap) * (x / softcap)
    gradient = tl.where(inside & kept[:, None], gradient, 0.0)
    out_inside = row_inside[:, None] & (column < columns)[None, :]
    out = out_ptr + row[:, None] * out_stride + column[None, :]
    tl.store(out, gradient.to(out_ptr.dtype.element_ty), mask=out_inside)


@triton.jit
def weights_gradient_kernel(
    weights_ptr,
    weights_stride,
    out_ptr,
    out_stride,
    tile_max_ptr,
    tile_max_stride,
    targets_ptr,
    logprob_ptr,
    lse_ptr,
    entropy_ptr,
    d_logprob_ptr,
    d_entropy_ptr,
    tokens,
    valid,
    segment,
    tiles,
    start,
    inverse_temperature,
    temperature_over_softcap,
    HAS_ENTROPY: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    tile = tl.program_id(0) % tiles
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    tiles_per_segment = tl.cdiv(segment, BLOCK_V)
    begin = (tile // tiles_per_segment) * segment
    end = tl.minimum(begin + segment, valid)
    column = begin + (tile % tiles_per_segment) * BLOCK_V + tl.arange(0, BLOCK_V)
    row_inside = row < tokens
    inside = row_inside[:, None] & (column < end)[None, :]
    lse = tl.load(lse_ptr + row, mask=row_inside, other=0.0)
    kept = row_inside & (lse != float("inf"))  # neither ignored nor -inf alone
    read = kept[:, None] & (column < end)[None, :]
    e = tl.load(weights_ptr + row[:, None] * weights_stride + column[None, :], mask=read, other=0.0).to(tl.float32)
    m = tl.load(tile_max_ptr + row * tile_max_stride + tile, mask=kept, other=0.0)
    target = tl.load(targets_ptr + row, mask=row_inside, other=-1)
    at_target = column[None, :] == (target.to(tl.int64) - start)[:, None]
    logprob = tl.load(logprob_ptr + row, mask=row_inside, other=0.0)
    p = e * tl.exp2((m - lse) * LOG2E)[:, None]
    p = tl.where(at_target, tl.exp2(logprob * LOG2E)[:, None], p)
    g = tl.load(d_logprob_ptr + row, mask=kept, other=0.0) * inverse_temperature
    factor = g[:, None]
    log_e = tl.where(e > 0.0, tl.log2(tl.where(e > 0.0, e, 1.0)), LOG2_FLOOR) * LN2
    if HAS_ENTROPY:
        h = tl.load(d_entropy_ptr + row, mask=kept, other=0.0) * inverse_temperature
        entropy = tl.load(entropy_ptr + row, mask=row_inside, other=0.0)
        logp = tl.where(at_target, logprob[:, None], log_e + (m - lse)[:, None])
        factor += h[:, None] * (tl.maximum(logp, LOG2_FLOOR * LN2) + entropy[:, None])
    gradient = tl.where(at_target, g[:, None], 0.0) - p * factor
    if HAS_SOFTCAP:
        z = tl.where(at_target, (logprob + lse)[:, None], log_e + m[:, None])
        tanh = z * temperature_over_softcap
        gradient *= tl.maximum(1.0 - tanh * tanh, 0.0)
    tl.store(out_ptr + row[:, None] * out_stride + column[None, :], gradient.to(out_ptr.dtype.element_ty), mask=inside)


def logits_gradient(
    logits_NV: torch.Tensor,
    out_NV: torch.Tensor,
    targets_N: torch.Tensor,
    lse_N: torch.Tensor,
    entropy_N: torch.Tensor,
    d_logprob_N: torch.Tensor | None,
    d_entropy_N: torch.Tensor | None,
    options: Shard,
    *,
    first_column: int = 0,
    bias_V: torch.Tensor | None = None,
) -> None:
    """Write the gradient of the logits to ``out_NV``, which may be ``logits_NV``: columns from ``first_column`` on.

    ``bias_V``, sliced likewise, is added to the logits. Rows whose targets are ignored are not read and get 0.
    """
    tokens, columns = logits_NV.shape
    if columns == 0:
        return
    block_v = min(next_power_of_2(columns), TILE_ELEMENTS)
    block_n = TILE_ELEMENTS // block_v
    logits_gradient_kernel[(ceil_div(tokens, block_n) * ceil_div(columns, block_v),)](
        logits_NV,
        logits_NV.stride(0),
        bias_V,
        out_NV,
        out_NV.stride(0),
        targets_N,
        lse_N,
        entropy_N,
        lse_N if d_logprob_N is None else d_logprob_N,
        0 if d_logprob_N is None else d_logprob_N.stride(0),
        lse_N if d_entropy_N is None else d_entropy_N,
        0 if d_entropy_N is None else d_entropy_N.stride(0),
        tokens,
        columns,
        max(options.valid - first_column, 0),
        options.start + first_column,
        options.ignore_index,
        1.0 / options.temperature,
        options.softcap,
        HAS_LOGPROB=d_logprob_N is not None,
        HAS_ENTROPY=d_entropy_N is not None,
        HAS_SOFTCAP=options.softcap > 0,
        BLOCK_N=block_n,
        BLOCK_V=block_v,
        num_warps=GRADIENT_WARPS,
    )


def weights_gradient(
    weights_NV: torch.Tensor,
    out_NV: torch.Tensor,
    tile_max_NK: torch.Tensor,
    targets_N: torch.Tensor,
    logprob_N: torch.Tensor,
    lse_N: torch.Tensor,
    entropy_N: torch.Tensor,
    d_logprob_N: torch.Tensor,
    d_entropy_N: torch.Tensor | None,
    options: Shard,
    *,
    segment: int,
    first_column: int = 0,
) -> None:
    """Write the gradient of the logits behind ``weights_NV`` to ``out_NV`` (or in place): valid columns only.

    The weights are the shard's columns from ``first_column`` on, and the tile maxima are sliced likewise. Rows with
    a log-sum-exp of +inf, as ignored ones have, are not read and get 0.
    """
    tokens, tiles = tile_max_NK.shape
    rows, columns = tile_shape(segment)
    weights_gradient_kernel[(ceil_div(tokens, rows) * tiles,)](
        weights_NV,
        weights_NV.stride(0),
        out_NV,
        out_NV.stride(0),
        tile_max_NK,
        tile_max_NK.stride(0),
        targets_N,
        logprob_N,
        lse_N,
        entropy_N,
        d_logprob_N,
        lse_N if d_entropy_N is None else d_entropy_N,
        tokens,
        min(options.valid - first_column, weights_NV.shape[1]),
        segment,
        tiles,
        options.start + first_column,
        1.0 / options.temperature,
        options.temperature / options.softcap if options.softcap > 0 else 0.0,
        HAS_ENTROPY=d_entropy_N is not None,
        HAS_SOFTCAP=options.softcap > 0,
        BLOCK_N=rows,
        BLOCK_V=columns,
        num_warps=GRADIENT_WARPS,
    )
