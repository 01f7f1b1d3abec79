"""Statistics of a softmax over the vocabulary: one read of the logits, one exponential each.

The statistics of one part of the vocabulary, for scaled logits z, are four numbers a token:

    max m = max z;  sum s = sum exp(z - m);  weighted w = sum exp(z - m) (z - m);  target t = z[target], NaN if
    elsewhere.

Parts combine exactly: with M the largest m, S = sum s exp(m - M) and W = sum (w + s (m - M)) exp(m - M), the
log-sum-exp is M + log S, the log-prob is (t - M) - log S, and the entropy is log S - W / S. Shifting by the maximum
keeps every number small, so that neither logits near +-500 nor -inf lose anything.

The vocabulary, over all ranks, is cut into 8 segments. One program reads one segment of a few rows in tiles of fixed
width. Rows whose targets are ignored are not read. Each of its lanes keeps online three of these numbers for the
columns it reads: with d = x - m for the largest raw logit m so far and c = 1 / temperature,

    s <- s exp((m_old - m) c) + sum exp(d c),        w <- (w + s (m_old - m) c) exp((m_old - m) c) + sum exp(d c) d c.

So lanes wait for nothing but memory, and meet once, at the end of the segment. Differences are taken before scaling,
so that a common offset of the logits costs no precision. A second, tiny kernel combines the segments of all ranks in
order. Since segments and tiles do not depend on the number of ranks, neither do
the results, to the bit, as long as every rank's shard is a whole number of segments of a multiple of 16 columns each.

With a weights buffer the first kernel also stores exp(d c), rounded to the buffer's type, for the row's largest logit
m up to that tile, and each tile's m c: from these the gradient needs no further look at the logits, and no weight is
larger than 1.

Legend: N tokens, V columns of this rank's vocabulary shard, S segments of this rank, P segments of all ranks, K tiles
of this rank.
"""
# mypy: disable-error-code="no-untyped-def"

from functools import lru_cache

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from ctrl_kernels.options import Shard, ceil_div, next_power_of_2

_SEGMENTS = 8
TILE_ELEMENTS = 2048
STATISTICS_WARPS = 4
VECTOR = 8  # 16 bytes of half precision, which a thread loads in one instruction
COMBINE_ROWS = 128
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOG2_FLOOR = tl.constexpr(-200.0)  # exp2(-200) is 0 in fp32: stands in for -inf where -inf * 0 would be NaN


def segment_columns(columns: int, ranks: int) -> int:
    """The width of a segment of a shard with ``columns`` columns."""
    segments = max(1, _SEGMENTS // ranks)
    return max(16, ceil_div(ceil_div(columns, segments), 16) * 16)


def segment_count(ranks: int) -> int:
    """How many segments a rank's shard has; the last ones may be empty."""
    return max(1, _SEGMENTS // ranks)


@lru_cache(maxsize=64)
def tile_shape(segment: int) -> tuple[int, int]:
    """Rows and columns of a tile for segments of this width: both depend on nothing else."""
    columns = min(next_power_of_2(segment), TILE_ELEMENTS)
    return TILE_ELEMENTS // columns, columns


@lru_cache(maxsize=16)
def lanes(columns: int) -> dict[str, int]:
    """How a row of a tile falls to lanes: each takes ``REPEATS`` times a ``VECTOR`` of neighbours."""
    vector = min(columns, VECTOR)
    count = min(columns // vector, 32 * STATISTICS_WARPS)
    return {"REPEATS": columns // vector // count, "LANES": count, "VECTOR": vector}


@triton.jit
def softcapped(x, cap):
    """cap tanh(x / cap), by a series near 0 where 1 - exp would cancel."""
    y = x / cap
    magnitude = tl.abs(y)
    decay = tl.exp(-2.0 * magnitude)
    far = (1.0 - decay) / (1.0 + decay)
    square = y * y
    near = magnitude * (1.0 + square * (-0.33333334 + square * (0.13333334 + square * -0.05396825)))
    tanh = tl.where(magnitude < 0.2, near, far)
    return cap * tl.where(y < 0, -tanh, tanh)


@triton.jit
def _absorb(
    x,
    inside,
    m,
    s,
    w,
    scale,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REPEATS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Take a tile into the lanes' m, s and w; also exp(d c) of the tile."""
    x = x.to(tl.float32)
    if HAS_SOFTCAP:
        x = tl.where(inside, softcapped(x, softcap), float("-inf"))
    x = tl.reshape(x, [BLOCK_N, REPEATS, LANES, VECTOR])
    m_new = tl.maximum(m, tl.max(tl.max(x, 3), 1))
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    d = (x - m_safe[:, None, :, None]) * scale
    e = tl.exp2(d)
    shift = tl.maximum((m - m_safe) * scale, LOG2_FLOOR)
    decay = tl.exp2(shift)
    w = (w + s * shift) * decay + tl.sum(tl.sum(e * tl.maximum(d, LOG2_FLOOR), 3), 1)
    s = s * decay + tl.sum(tl.sum(e, 3), 1)
    return m_new, s, w, e


@triton.jit
def _row_maximum(m):
    """The largest of the lanes' m, or 0 for -inf."""
    m = tl.max(m, 1)
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def _store_weights(
    e, m, row, column, inside, row_inside, tile, weights_ptr, weights_stride, tile_max_ptr, tile_max_stride,
    inverse_temperature, scale, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Store a tile's weights, and the maximum that they refer to."""
    m_row = _row_maximum(m)
    e = e * tl.exp2(tl.maximum((m - m_row[:, None]) * scale, LOG2_FLOOR))[:, None, :, None]
    e = tl.reshape(e, [BLOCK_N, BLOCK_V]).to(weights_ptr.dtype.element_ty)
    tl.store(weights_ptr + row[:, None] * weights_stride + column[None, :], e, mask=inside)
    tl.store(tile_max_ptr + row * tile_max_stride + tile, m_row * inverse_temperature, mask=row_inside)


@triton.jit
def _store_statistics(
    m, s, w, row_ptr, bias_ptr, local, held, out_ptr, row_inside, scale, inverse_temperature, softcap,
    HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Bring the lanes of a row together, and store the four numbers of its segment."""
    m_row = _row_maximum(m)
    shift = tl.maximum((m - m_row[:, None]) * scale, LOG2_FLOOR)
    decay = tl.exp2(shift)
    t = tl.load(row_ptr + local, mask=held, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        t += tl.load(bias_ptr + local, mask=held, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        t = softcapped(t, softcap)
    tl.store(out_ptr, tl.max(m, 1) * inverse_temperature, mask=row_inside)
    tl.store(out_ptr + 1, tl.sum(s * decay, 1), mask=row_inside)
    tl.store(out_ptr + 2, tl.sum((w + s * shift) * decay, 1) * LN2, mask=row_inside)
    tl.store(out_ptr + 3, tl.where(held, t * inverse_temperature, float("nan")), mask=row_inside)


@triton.jit
def statistics_kernel(
    logits_ptr, logits_stride, bias_ptr, targets_ptr, statistics_ptr, weights_ptr, weights_stride, tile_max_ptr,
    tile_max_stride, tokens, valid, segment, segments, start, ignore_index, inverse_temperature, softcap,
    HAS_SOFTCAP: tl.constexpr, STORE_WEIGHTS: tl.constexpr, BLOCK_N: tl.constexpr, REPEATS: tl.constexpr,
    LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """The statistics of a segment of a few rows; with STORE_WEIGHTS also its weights and tiles' maxima."""
    BLOCK_V: tl.constexpr = REPEATS * LANES * VECTOR
    part = tl.program_id(0) % segments
    row = (tl.program_id(0) // segments).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_inside = row < tokens
    target = tl.load(targets_ptr + row, mask=row_inside, other=ignore_index).to(tl.int64)
    begin = part * segment
    end = tl.minimum(begin + segment, valid)
    if tl.max((target != ignore_index).to(tl.int32), 0) == 0:
        end = begin  # nothing but ignored rows: no logit is read
    row_inside = row_inside & (target != ignore_index)
    row_ptr = logits_ptr + row * logits_stride
    scale = inverse_temperature * LOG2E
    m = tl.full([BLOCK_N, LANES], float("-inf"), tl.float32)
    s = tl.zeros([BLOCK_N, LANES], tl.float32)
    w = tl.zeros([BLOCK_N, LANES], tl.float32)
    tile = part * tl.cdiv(segment, BLOCK_V)
    lane = tl.arange(0, BLOCK_V)
    # Whole tiles need no mask over columns, and each is asked for before the one ahead of it is worked on.
    whole = tl.maximum(end - begin, 0) // BLOCK_V
    whole_end = begin + whole * BLOCK_V
    inside = row_inside[:, None] & (begin + lane < whole_end)[None, :]
    following = tl.load(row_ptr[:, None] + (begin + lane)[None, :], mask=inside, other=float("-inf"))
    for number in range(whole):
        column = begin + number * BLOCK_V + lane
        x = following
        if bias_ptr is not None:
            x = x.to(tl.float32) + tl.load(bias_ptr + column).to(tl.float32)[None, :]
        more = row_inside[:, None] & (column + BLOCK_V < whole_end)[None, :]
        following = tl.load(row_ptr[:, None] + (column + BLOCK_V)[None, :], mask=more, other=float("-inf"))
        m, s, w, e = _absorb(x, inside, m, s, w, scale, softcap, HAS_SOFTCAP, BLOCK_N, REPEATS, LANES, VECTOR)
        if STORE_WEIGHTS:
            _store_weights(
                e, m, row, column, inside, row_inside, tile + number, weights_ptr, weights_stride, tile_max_ptr,
                tile_max_stride, inverse_temperature, scale, BLOCK_N, BLOCK_V,
            )  # fmt: skip
    if whole_end < end:
        column = whole_end + lane
        inside = row_inside[:, None] & (column < end)[None, :]
        x = tl.load(row_ptr[:, None] + column[None, :], mask=inside, other=float("-inf"))
        if bias_ptr is not None:
            x = x.to(tl.float32) + tl.load(bias_ptr + column, mask=column < end, other=0.0).to(tl.float32)[None, :]
        m, s, w, e = _absorb(x, inside, m, s, w, scale, softcap, HAS_SOFTCAP, BLOCK_N, REPEATS, LANES, VECTOR)
        if STORE_WEIGHTS:
            _store_weights(
                e, m, row, column, inside, row_inside, tile + whole, weights_ptr, weights_stride, tile_max_ptr,
                tile_max_stride, inverse_temperature, scale, BLOCK_N, BLOCK_V,
            )  # fmt: skip
    local = target - start
    held = row_inside & (local >= begin) & (local < end)
    out_ptr = statistics_ptr + (part.to(tl.int64) * tokens + row) * 4
    _store_statistics(
        m, s, w, row_ptr, bias_ptr, local, held, out_ptr, row_inside, scale, inverse_temperature, softcap, HAS_SOFTCAP
    )


@triton.jit
def combine_kernel(
    statistics_ptr, targets_ptr, logprob_ptr, entropy_ptr, lse_ptr, tokens, parts, ignore_index, BLOCK_N: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < tokens
    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    part_ptr = statistics_ptr + row * 4
    for _ in range(parts):
        m = tl.maximum(m, tl.load(part_ptr, mask=inside, other=0.0))
        part_ptr += tokens * 4
    m_safe = tl.where(m == float("-inf"), 0.0, m)
    s = tl.zeros([BLOCK_N], tl.float32)
    w = tl.zeros([BLOCK_N], tl.float32)
    t = tl.zeros([BLOCK_N], tl.float32)
    held = t != t  # of no part yet
    part_ptr = statistics_ptr + row * 4
    for _ in range(parts):
        shift = tl.maximum((tl.load(part_ptr, mask=inside, other=0.0) - m_safe) * LOG2E, LOG2_FLOOR)
        decay = tl.exp2(shift)
        part_sum = tl.load(part_ptr + 1, mask=inside, other=1.0)
        w += (tl.load(part_ptr + 2, mask=inside, other=0.0) + part_sum * (shift * LN2)) * decay
        s += part_sum * decay
        part_target = tl.load(part_ptr + 3, mask=inside, other=0.0)
        here = part_target == part_target
        t += tl.where(here, part_target, 0.0)
        held = held | here
        part_ptr += tokens * 4
    kept = tl.load(targets_ptr + row, mask=inside, other=0) != ignore_index
    empty = s == 0.0
    log_s = tl.log(tl.where(empty, 1.0, s))
    lse = tl.where(empty, float("inf"), m_safe + log_s)
    logprob = tl.where(empty, float("-inf"), (t - m_safe) - log_s)  # a common offset costs no precision
    entropy = tl.where(empty, 0.0, log_s - w / s)
    tl.store(logprob_ptr + row, tl.where(kept, tl.where(held, logprob, float("nan")), 0.0), mask=inside)
    tl.store(entropy_ptr + row, tl.where(kept, entropy, 0.0), mask=inside)
    tl.store(lse_ptr + row, tl.where(kept, tl.where(held, lse, float("nan")), float("inf")), mask=inside)


def gather_statistics(statistics_PN4: torch.Tensor, options: Shard) -> torch.Tensor:
    """The statistics of every rank's parts, in rank order: the one collective of a forward pass."""
    if options.ranks == 1:
        return statistics_PN4
    parts, tokens, four = statistics_PN4.shape
    gathered = statistics_PN4.new_empty((options.ranks * parts, tokens, four))
    dist.all_gather_into_tensor(gathered, statistics_PN4.contiguous(), group=options.process_group)
    return gathered


def softmax_statistics(
    logits_NV: torch.Tensor,
    targets_N: torch.Tensor,
    statistics_SN4: torch.Tensor,
    options: Shard,
    *,
    segment: int,
    first_column: int = 0,
    bias_V: torch.Tensor | None = None,
    weights_NV: torch.Tensor | None = None,
    tile_max_NK: torch.Tensor | None = None,
) -> None:
    """Fill ``statistics_SN4`` for ``logits_NV``, whose columns are those of the shard from ``first_column`` on.

    ``bias_V`` is added to them. With ``weights_NV`` and ``tile_max_NK`` (all sliced likewise) fill these too. The last
    dimension of every tensor must be dense. What ignored rows get means nothing.
    """
    segments, tokens, _ = statistics_SN4.shape
    rows, columns = tile_shape(segment)
    statistics_kernel[(ceil_div(tokens, rows) * segments,)](
        logits_NV,
        logits_NV.stride(0),
        bias_V,
        targets_N,
        statistics_SN4,
        logits_NV if weights_NV is None else weights_NV,
        0 if weights_NV is None else weights_NV.stride(0),
        statistics_SN4 if tile_max_NK is None else tile_max_NK,
        0 if tile_max_NK is None else tile_max_NK.stride(0),
        tokens,
        min(options.valid - first_column, logits_NV.shape[1]),
        segment,
        segments,
        options.start + first_column,
        options.ignore_index,
        1.0 / options.temperature,
        options.softcap,
        HAS_SOFTCAP=options.softcap > 0,
        STORE_WEIGHTS=weights_NV is not None,
        BLOCK_N=rows,
        **lanes(columns),
        num_warps=STATISTICS_WARPS,
    )


def combine_segments(
    statistics_PN4: torch.Tensor, targets_N: torch.Tensor, options: Shard
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs, entropies and log-sum-exps [N] as ``ctrl_kernels.reference.combine_statistics`` defines them.

    At ignored targets the first two are 0 and the third is +inf, which makes every probability 0.
    """
    parts, tokens, _ = statistics_PN4.shape
    logprob_N, entropy_N, lse_N = (statistics_PN4.new_empty(tokens) for _ in range(3))
    combine_kernel[(ceil_div(tokens, COMBINE_ROWS),)](
        statistics_PN4,
        targets_N,
        logprob_N,
        entropy_N,
        lse_N,
        tokens,
        parts,
        options.ignore_index,
        BLOCK_N=COMBINE_ROWS,
        num_warps=4,
    )
    return logprob_N, entropy_N, lse_N
