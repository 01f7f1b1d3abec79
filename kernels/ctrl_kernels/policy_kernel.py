"""The kernel of the policy loss: a tile's terms and their slopes, a program's sums, the sum of all.

It reads the inputs once, writes the gradient once, and leaves a row of sums a program; a second kernel of a single
program adds these up in a fixed order. Each lane takes four neighbouring tokens at a time and keeps its sums to itself
until the end. Programs that take whole sequences read these twice or, for sequence ratios, three times, the later times
from the cache. ``ctrl_kernels.policy_loss`` states the formulas.
"""
# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from ctrl_kernels.options import K3_LIMIT, LEAST_LOGPROB, LOG_RATIO_LIMIT
from ctrl_kernels.token_tiles import clamped, inverse_denominator, load_fp32, token_tile

SUMS = 16  # columns of the partial sums: these, and what the KL and the entropy are in the loss
METRICS = (
    "policy_loss", "tokens", "clip_fraction", "dual_clip_fraction", "approx_kl", "ratio", "kl", "entropy",
)  # fmt: skip
_LOG2E = tl.constexpr(1.4426950408889634)
_LIMIT = tl.constexpr(LOG_RATIO_LIMIT)
_LEAST = tl.constexpr(LEAST_LOGPROB)
_K3_MAX = tl.constexpr(K3_LIMIT)


@triton.jit
def _finite(logprob):
    """A log-prob, the least number for -inf; NaN stays NaN."""
    return tl.maximum(logprob, _LEAST, tl.PropagateNan.ALL)


@triton.jit
def _log_ratio(logprobs_ptr, old_ptr, index, read, active):
    """The log-ratio as it is, -inf at log-probs of -inf; 0 at masked tokens."""
    old = _finite(load_fp32(old_ptr, index, read))
    return tl.where(active, load_fp32(logprobs_ptr, index, read) - old, 0.0)


@triton.jit
def _geometric(log_ratio, advantage, low, high):
    """GMPO's clipped log-ratio, and where clipping stopped the gradient."""
    bounded = clamped(log_ratio, low, high)
    clipped = (log_ratio - bounded) * advantage > 0.0
    return tl.where(clipped, bounded, tl.where(advantage == 0.0, 0.0, log_ratio)), clipped


@triton.jit
def _sequence(
    logprobs_ptr, old_ptr, advantages_ptr, mask_ptr, begin, end, row_length, low, high,
    NEEDS_RATIO: tl.constexpr, GEOMETRIC: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A sequence's number of unmasked tokens, at least 1, and its ratio."""
    lengths = tl.zeros([LANES], tl.float32)
    log_ratios = tl.zeros([LANES], tl.float32)
    for block in range(0, row_length, LANES * VECTOR):
        index, _, active, read = token_tile(mask_ptr, begin + block, end, LANES, VECTOR, EVEN)
        lengths += tl.sum(active.to(tl.float32), 1)
        if NEEDS_RATIO:
            log_ratio = clamped(_log_ratio(logprobs_ptr, old_ptr, index, read, active), -_LIMIT, _LIMIT)
            if GEOMETRIC:
                advantage = tl.where(active, load_fp32(advantages_ptr, index, read), 0.0)
                log_ratio, _ = _geometric(log_ratio, advantage, low, high)
            log_ratios += tl.sum(log_ratio, 1)
    length = tl.maximum(tl.sum(lengths, 0), 1.0)
    return length, tl.exp2(tl.sum(log_ratios, 0) / length * _LOG2E)


@triton.jit
def _log_policy_slope(logp, old, advantage, scaled, r, low, high, cap, OBJECTIVE: tl.constexpr):
    """CISPO's and DPPO's factor of log pi, and where clipping acts."""
    if OBJECTIVE == "cispo":
        bounded = clamped(r, low, high)
        return scaled * bounded, r != bounded
    p = tl.exp2(logp * _LOG2E)
    q = tl.exp2(old * _LOG2E)
    rises = advantage > 0.0
    if OBJECTIVE == "dppo_tv":
        clipped = tl.where(rises, p - q > high, q - p > low)
    else:
        divergence = q * (old - logp) + (1.0 - q) * tl.log((1.0 - q + 1e-8) / (1.0 - p + 1e-8))
        clipped = tl.where(rises, (divergence > high) & (p > q), (divergence > low) & (p < q))
    return tl.where(clipped, 0.0, scaled * tl.minimum(r, cap, tl.PropagateNan.ALL)), clipped


@triton.jit
def _clip(advantage, r, low, high, dual_clip, HAS_DUAL: tl.constexpr):
    """What PPO puts in the ratio's place, and where clipping and dual clipping stopped the gradient."""
    bound = tl.where(advantage > 0.0, high, low)
    clipped = (r - bound) * advantage > 0.0
    bounded = tl.where(clipped, bound, r)
    dual = clipped
    if HAS_DUAL:
        dual = (advantage < 0.0) & (r > dual_clip)
        bounded = tl.where(dual, dual_clip, bounded)
    return bounded, clipped, dual


@triton.jit
def _kl(difference, KL: tl.constexpr):
    """The KL estimate of log pi - log ref and its slope."""
    if KL == "k3":  # past the limits of the difference it is past its own, where only -inf needs the clamp
        d = tl.maximum(difference, -_LIMIT, tl.PropagateNan.ALL)
        decay = tl.exp2(d * -_LOG2E)
        kl = decay + d - 1.0
        return tl.minimum(kl, _K3_MAX, tl.PropagateNan.ALL), tl.where(kl > _K3_MAX, 0.0, 1.0 - decay)
    d = clamped(difference, -_LIMIT, _LIMIT)
    slope = tl.where(tl.abs(difference) > _LIMIT, 0.0, d)
    if KL == "k1":
        return d, tl.where(tl.abs(difference) > _LIMIT, 0.0, 1.0)
    return 0.5 * d * d, slope


@triton.jit
def _sequence_gradient(
    logprobs_ptr, old_ptr, advantages_ptr, mask_ptr, d_logprobs_ptr, share, begin, end, row_length, low, high,
    GEOMETRIC: tl.constexpr, ADD: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Add a sequence's share of the gradient to each of its tokens, beside the terms that are there already."""
    for block in range(0, row_length, LANES * VECTOR):
        index, inside, active, read = token_tile(mask_ptr, begin + block, end, LANES, VECTOR, EVEN)
        raw = _log_ratio(logprobs_ptr, old_ptr, index, read, active)
        free = active
        if GEOMETRIC:
            advantage = tl.where(active, load_fp32(advantages_ptr, index, read), 0.0)
            _, clipped = _geometric(raw, advantage, low, high)
            free = free & (advantage != 0.0) & (clipped == 0)
        gradient = tl.where(free, tl.where(tl.abs(raw) > _LIMIT, 0.0, share), 0.0)
        if ADD:
            gradient += tl.load(d_logprobs_ptr + index, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_logprobs_ptr + index, gradient.to(d_logprobs_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _plus(a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7, a8 + b8, a9 + b9, a10 + b10


@triton.jit
def _weights(weights_ptr, importance_ptr, index, read, active, row_weight):
    """What tokens that count have as their weight in the loss, and in its policy term."""
    weight = row_weight
    if weights_ptr is not None:
        weight = tl.where(active, load_fp32(weights_ptr, index, read) * row_weight, 0.0)
    behaviour = weight
    if importance_ptr is not None:
        behaviour = tl.where(active, load_fp32(importance_ptr, index, read) * weight, 0.0)
    return weight, behaviour


@triton.jit
def _policy_term(
    logp, old, advantage, scaled, log_ratio, outside, r, active, low, high, extra_0, extra_1,
    OBJECTIVE: tl.constexpr, SHARED: tl.constexpr, HAS_DUAL: tl.constexpr,
):  # fmt: skip
    """Tokens' terms; the slope at each token, and what each adds to one that a sequence shares; what was clipped."""
    clipped = active & (r != r) & (r == r)  # nowhere
    dual = clipped
    gradient = tl.zeros_like(logp)
    shared = tl.zeros_like(logp)
    if OBJECTIVE == "clip":
        bounded, clipped, dual = _clip(advantage, r, low, high, extra_0, HAS_DUAL)
        stopped = clipped | dual
        term = scaled * bounded
        if SHARED:
            shared = tl.where(stopped, 0.0, scaled)
        else:
            gradient = tl.where(stopped | outside, 0.0, scaled * r)
    elif OBJECTIVE == "sapo":
        tau = tl.where(advantage > 0.0, extra_0, extra_1)
        gate = 1.0 / (1.0 + tl.exp2(tau * (1.0 - r) * _LOG2E))
        term = scaled * (4.0 / tau) * gate
        gradient = tl.where(outside, 0.0, 4.0 * scaled * gate * (1.0 - gate) * r)
    elif OBJECTIVE == "gmpo":
        term = scaled * r
        shared = scaled
        _, clipped = _geometric(log_ratio, advantage, low, high)
    else:
        logp_active = tl.where(active, _finite(logp), 0.0)
        old_active = tl.where(active, old, 0.0)
        gradient, clipped = _log_policy_slope(
            logp_active, old_active, advantage, scaled, r, low, high, extra_0, OBJECTIVE
        )
        term = gradient * logp_active
        gradient = tl.where(logp_active == _LEAST, 0.0, gradient)
    return term, gradient, shared, clipped, dual


@triton.jit
def _drift(drift_ptr, index, read, active, behaviour, raw, log_ratio, outside):
    """The terms of what drift weights single out, and their slopes."""
    drift = tl.where(active, load_fp32(drift_ptr, index, read) * behaviour, 0.0)
    sign = tl.where(raw > 0.0, 1.0, tl.where(raw < 0.0, -1.0, 0.0))
    return drift * tl.abs(log_ratio), tl.where(outside, 0.0, drift * sign)


@triton.jit
def _reference_kl(
    ref_ptr, logp, outside, r, index, read, active, KL: tl.constexpr, KL_CORRECTION: tl.constexpr, SHARED: tl.constexpr
):
    """The KL estimates, what they are in the loss, and their slopes."""
    kl, slope = _kl(tl.where(active, logp - _finite(load_fp32(ref_ptr, index, read)), 0.0), KL)
    if KL == "k1":
        slope = tl.where(active, slope, 0.0)
    corrected = kl
    if KL_CORRECTION:
        corrected = kl * r
        if not SHARED:
            slope += tl.where(outside, 0.0, kl)
        slope *= r
    return kl, corrected, slope


@triton.jit
def _store_sums(out_ptr, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9):
    tl.store(out_ptr, s0)
    tl.store(out_ptr + 1, s1)
    tl.store(out_ptr + 2, s2)
    tl.store(out_ptr + 3, s3)
    tl.store(out_ptr + 4, s4)
    tl.store(out_ptr + 5, s5)
    tl.store(out_ptr + 6, s6)
    tl.store(out_ptr + 7, s7)
    tl.store(out_ptr + 8, s8)
    tl.store(out_ptr + 9, s9)


@triton.jit
def _policy_tile(
    logprobs_ptr, old_ptr, advantages_ptr, mask_ptr, ref_ptr, importance_ptr, drift_ptr, entropy_ptr, weights_ptr,
    d_logprobs_ptr, d_entropy_ptr, begin, end, row_weight, sequence_ratio, low, high, extra_0, extra_1, kl_coef,
    entropy_coef, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10,
    OBJECTIVE: tl.constexpr, BY_TOKEN: tl.constexpr, SHARED: tl.constexpr, HAS_DUAL: tl.constexpr, KL: tl.constexpr,
    KL_CORRECTION: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Write a tile's gradients; the lanes' sums with it, the last that of slopes which a sequence shares."""
    index, inside, active, read = token_tile(mask_ptr, begin, end, LANES, VECTOR, EVEN)
    logp, old = load_fp32(logprobs_ptr, index, read), _finite(load_fp32(old_ptr, index, read))
    advantage = tl.where(active, load_fp32(advantages_ptr, index, read), 0.0)
    raw = tl.where(active, logp - old, 0.0)
    log_ratio = clamped(raw, -_LIMIT, _LIMIT)
    outside = tl.abs(raw) > _LIMIT
    counted = tl.where(active, 1.0, 0.0)
    weight, behaviour = _weights(weights_ptr, importance_ptr, index, read, active, row_weight)
    scaled = -advantage * behaviour
    r = tl.zeros([LANES, VECTOR], tl.float32) + sequence_ratio
    if BY_TOKEN:
        r = tl.exp2(log_ratio * _LOG2E)
    term, gradient, shared, clipped, dual = _policy_term(
        logp, old, advantage, scaled, log_ratio, outside, r, active, low, high, extra_0, extra_1,
        OBJECTIVE, SHARED, HAS_DUAL,
    )  # fmt: skip
    if SHARED:
        s10 += tl.sum(shared, 1)
    if drift_ptr is not None:
        drift, slope = _drift(drift_ptr, index, read, active, behaviour, raw, log_ratio, outside)
        term += drift
        gradient += slope
    if ref_ptr is not None:
        kl, corrected, slope = _reference_kl(ref_ptr, logp, outside, r, index, read, active, KL, KL_CORRECTION, SHARED)
        s6 += tl.sum(kl, 1)
        if KL_CORRECTION or weights_ptr is not None:
            s8 += tl.sum(corrected * weight, 1)
        if KL_CORRECTION and SHARED:
            s10 += tl.sum(kl * (kl_coef * weight), 1)
        gradient += slope * (kl_coef * weight)
    if entropy_ptr is not None:
        entropy = tl.where(active, load_fp32(entropy_ptr, index, read), 0.0)
        s7 += tl.sum(entropy, 1)
        if weights_ptr is not None:
            s9 += tl.sum(entropy * weight, 1)
    if d_logprobs_ptr is not None:
        tl.store(d_logprobs_ptr + index, gradient.to(d_logprobs_ptr.dtype.element_ty), mask=inside)
    if d_entropy_ptr is not None:
        d_entropy = counted * (-entropy_coef * weight)
        tl.store(d_entropy_ptr + index, d_entropy.to(d_entropy_ptr.dtype.element_ty), mask=inside)
    s1 += tl.sum(counted, 1)
    s2 += tl.sum(tl.where(clipped & active, 1.0, 0.0), 1)
    if HAS_DUAL:
        s3 += tl.sum(tl.where(dual & active, 1.0, 0.0), 1)
    s0 += tl.sum(term, 1)
    s4 -= tl.sum(log_ratio, 1)
    s5 += tl.sum(r * counted, 1)
    return s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10


@triton.jit
def policy_kernel(
    logprobs_ptr, old_ptr, advantages_ptr, mask_ptr, ref_ptr, importance_ptr, drift_ptr, entropy_ptr, weights_ptr,
    denominator_ptr, d_logprobs_ptr, d_entropy_ptr, sums_ptr, row_length, total, constant, low, high, extra_0, extra_1,
    kl_coef, entropy_coef,
    OBJECTIVE: tl.constexpr, RATIO: tl.constexpr, HAS_DUAL: tl.constexpr, BY_LENGTH: tl.constexpr, KL: tl.constexpr,
    KL_CORRECTION: tl.constexpr, SUMS: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A program's sums, and the gradients of its tokens where they are asked for."""
    GEOMETRIC: tl.constexpr = OBJECTIVE == "gmpo"
    BY_TOKEN: tl.constexpr = RATIO == "token" and not GEOMETRIC
    SHARED: tl.constexpr = RATIO == "sequence" or GEOMETRIC  # one slope for all tokens of a sequence
    begin = tl.program_id(0).to(tl.int64) * row_length
    end = tl.minimum(begin + row_length, total)
    row_weight = inverse_denominator(denominator_ptr, constant)
    length, sequence_ratio = 1.0, 1.0
    if BY_LENGTH or not BY_TOKEN:
        length, sequence_ratio = _sequence(
            logprobs_ptr, old_ptr, advantages_ptr, mask_ptr, begin, end, row_length, low, high,
            not BY_TOKEN, GEOMETRIC, LANES, VECTOR, EVEN,
        )  # fmt: skip
        if BY_LENGTH:
            row_weight = row_weight / length
    zeros = tl.zeros([LANES], tl.float32)
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10 = (
        zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros,
    )  # fmt: skip
    for block in range(0, row_length, LANES * VECTOR):
        s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10 = _policy_tile(
            logprobs_ptr, old_ptr, advantages_ptr, mask_ptr, ref_ptr, importance_ptr, drift_ptr, entropy_ptr,
            weights_ptr, d_logprobs_ptr, d_entropy_ptr, begin + block, end, row_weight, sequence_ratio, low, high,
            extra_0, extra_1, kl_coef, entropy_coef, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10,
            OBJECTIVE, BY_TOKEN, SHARED, HAS_DUAL, KL, KL_CORRECTION, LANES, VECTOR, EVEN,
        )  # fmt: skip
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10 = tl.reduce((s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10), 0, _plus)
    if SHARED and d_logprobs_ptr is not None:
        tl.debug_barrier()  # other lanes wrote the terms that are added to
        _sequence_gradient(
            logprobs_ptr, old_ptr, advantages_ptr, mask_ptr, d_logprobs_ptr, s10 * sequence_ratio / length, begin, end,
            row_length, low, high, GEOMETRIC, ref_ptr is not None or drift_ptr is not None, LANES, VECTOR, EVEN,
        )  # fmt: skip
    if weights_ptr is None and not KL_CORRECTION:
        s8 = s6 * row_weight
    if weights_ptr is None:
        s9 = s7 * row_weight
    _store_sums(sums_ptr + tl.program_id(0) * SUMS, s0, s1, s2, s3, s4, s5, s6, s7, s8, s9)


@triton.jit
def finish_kernel(
    sums_ptr, loss_ptr, metrics_ptr, rows, kl_coef, entropy_coef,
    SUMS: tl.constexpr, METRICS: tl.constexpr, USED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss, and its metrics: the first two columns' sums, and the others' means over tokens."""
    column = tl.arange(0, SUMS)
    totals = tl.zeros([BLOCK, SUMS], tl.float32)
    for begin in range(0, rows, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (column < USED)[None, :]
        totals += tl.load(sums_ptr + row[:, None] * SUMS + column[None, :], mask=inside, other=0.0)
    totals = tl.sum(totals, 0)
    tokens = tl.maximum(tl.sum(tl.where(column == 1, totals, 0.0), 0), 1.0)
    kl_entropy = tl.where(column == METRICS, kl_coef, tl.where(column == METRICS + 1, -entropy_coef, 0.0))
    coefficient = tl.where(column == 0, 1.0, kl_entropy)
    tl.store(loss_ptr, tl.sum(tl.where(coefficient == 0.0, 0.0, totals * coefficient), 0))
    tl.store(metrics_ptr + column, tl.where(column > 1, totals / tokens, totals), mask=column < METRICS)
