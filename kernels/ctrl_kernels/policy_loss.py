"""``policy_loss``: the policy losses of PPO, GRPO, DAPO, GSPO and their kin, forward and backward in one pass.

With L = clamp(log pi - log pi_old, -20, 20) a token, r = exp(L) (``ratio="token"``) or exp(mean of L over the
sequence's unmasked tokens) (``"sequence"``, GSPO; ``"sequence-token"``: the same value, but its gradient is that of
r = r_sequence pi / sg(pi) at each token, GSPO-token), advantage A and importance weight w (1 if absent), a token's
policy term is, by ``objective``,

    clip      -w min(A r, A clip(r, 1 - clip_low, 1 + clip_high)), and no more than -w A dual_clip where A < 0
    cispo     -w A sg(clip(r, 1 - clip_low, 1 + clip_high)) log pi
    dppo_tv   -w A sg(min(r, ratio_cap)) log pi, and 0 where A > 0 and pi - pi_old > clip_high, or A <= 0 and
              pi_old - pi > clip_low
    dppo_kl   the same, and 0 where A > 0, pi > pi_old and d > clip_high, or A <= 0, pi < pi_old and d > clip_low,
              with d = pi_old log(pi_old / pi) + (1 - pi_old) log((1 - pi_old + 1e-8) / (1 - pi + 1e-8))
    sapo      -w A (4 / tau) sigmoid(tau (r - 1)), with tau = tau_positive where A > 0 and tau_negative elsewhere
    gmpo      -w A exp(mean of sign(A) min(sign(A) L, sign(A) clip(L, -clip_low, clip_high)) over the sequence)

PPO: Schulman et al. 2017, arXiv 1707.06347; asymmetric clipping: DAPO, arXiv 2503.14476; dual clip: Ye et al. 2020,
arXiv 1912.09729; GSPO: arXiv 2507.18071; CISPO: MiniMax-M1, arXiv 2506.13585; DPPO: arXiv 2602.04879; SAPO: arXiv
2511.20347; GMPO: arXiv 2507.20673. With ``drift_weights`` c a token's term also holds w c |L|: KL-Cov (arXiv
2505.22617), where ``covariance_tokens`` says which tokens; Clip-Cov sets their importance weights to 0.

With D = clamp(log pi - log ref, -20, 20) a token's KL estimate (Schulman 2020) is

    k1: D        k2: D^2 / 2        k3: clamp(exp(-D) + D - 1, -10, 10),

times r with ``kl_correction`` (DeepSeek-V3.2, arXiv 2512.02556).

The loss sums (policy + kl_coef KL - entropy_coef entropy) over tokens, each with weight 1 / denominator
(``token-mean`` and ``seq-mean-token-sum``) or 1 / (length denominator) (``seq-mean-token-mean``, length: the
sequence's unmasked tokens).

One kernel reads the inputs once, writes the gradient once, and leaves a row of sums a program; a second one of a single
program adds these up in a fixed order. Each lane takes four neighbouring tokens at a time, none of which it reads if
all are masked, and keeps its sums to itself until the end. Programs take whole sequences where the loss needs their
lengths or ratios (these are read twice or, for sequence ratios, three times, the later times from the cache), and runs
of tokens otherwise, as many as keep a Hopper GPU busy once.

Legend: B sequences, T steps.
"""
# mypy: disable-error-code="no-untyped-def"

from typing import Any

import torch
import triton
import triton.language as tl

from ctrl_kernels import reference
from ctrl_kernels.operators import first_order, operator
from ctrl_kernels.options import (
    K3_LIMIT,
    LOG_RATIO_LIMIT,
    Backend,
    PolicyOptions,
    ceil_div,
    check_denominator,
    check_kernel_dtype,
    check_shapes,
    flat,
    next_power_of_2,
    policy_options,
    refuse,
    resolve_backend,
    schema,
    with_options,
)
from ctrl_kernels.projection import scale_

VECTOR = 4  # tokens of a lane: 16 bytes of fp32
LANES = 128
POLICY_WARPS = 4
RUNS = 1024  # programs that share all tokens: one wave on the 132 processors of an H100 or H200
SUMS = 16  # columns of the partial sums; ``METRICS`` names those that users see
METRICS = {
    "policy_loss": 0,
    "tokens": 3,
    "clip_fraction": 4,
    "dual_clip_fraction": 5,
    "approx_kl": 6,
    "ratio": 7,
    "kl": 8,
    "entropy": 9,
}
USED = 10
FINISH_ROWS = 512
LOG2E = tl.constexpr(1.4426950408889634)
LIMIT = tl.constexpr(LOG_RATIO_LIMIT)
K3_MAX = tl.constexpr(K3_LIMIT)


@triton.jit
def _clamped(x, low, high):
    """x between low and high; NaN stays NaN."""
    return tl.minimum(tl.maximum(x, low, tl.PropagateNan.ALL), high, tl.PropagateNan.ALL)


@triton.jit
def _tile(mask_ptr, begin, end, LANES: tl.constexpr, VECTOR: tl.constexpr, EVEN: tl.constexpr):
    """Indices of a tile, which lie inside, which count, and which are read: every vector with a token that counts.

    EVEN: vectors lie inside or outside as a whole.
    """
    lane = begin + tl.arange(0, LANES) * VECTOR
    index = lane[:, None] + tl.arange(0, VECTOR)[None, :]
    inside = index < end
    if EVEN:
        inside = tl.broadcast_to((lane < end)[:, None], [LANES, VECTOR])
    active = inside & (tl.load(mask_ptr + index, mask=inside, other=0) != 0)
    some = tl.max(active.to(tl.int32), 1) != 0
    return index, inside, active, inside & some[:, None]


@triton.jit
def _read(ptr, index, read):
    return tl.load(ptr + index, mask=read, other=0.0).to(tl.float32)


@triton.jit
def _log_ratio(logprobs_ptr, old_ptr, index, read, active):
    """The log-ratio as it is; 0 at masked tokens."""
    return tl.where(active, _read(logprobs_ptr, index, read) - _read(old_ptr, index, read), 0.0)


@triton.jit
def _geometric(log_ratio, advantage, low, high):
    """GMPO's clipped log-ratio, and where clipping stopped the gradient."""
    bounded = _clamped(log_ratio, low, high)
    clipped = (log_ratio - bounded) * advantage > 0.0
    return tl.where(clipped, bounded, tl.where(advantage == 0.0, 0.0, log_ratio)), clipped


@triton.jit
def _sequence(
    logprobs_ptr,
    old_ptr,
    advantages_ptr,
    mask_ptr,
    begin,
    end,
    row_length,
    low,
    high,
    NEEDS_RATIO: tl.constexpr,
    GEOMETRIC: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A sequence's number of unmasked tokens, at least 1, and its ratio."""
    lengths = tl.zeros([LANES], tl.float32)
    log_ratios = tl.zeros([LANES], tl.float32)
    for block in range(0, row_length, LANES * VECTOR):
        index, _, active, read = _tile(mask_ptr, begin + block, end, LANES, VECTOR, EVEN)
        lengths += tl.sum(active.to(tl.float32), 1)
        if NEEDS_RATIO:
            log_ratio = _clamped(_log_ratio(logprobs_ptr, old_ptr, index, read, active), -LIMIT, LIMIT)
            if GEOMETRIC:
                advantage = tl.where(active, _read(advantages_ptr, index, read), 0.0)
                log_ratio, _ = _geometric(log_ratio, advantage, low, high)
            log_ratios += tl.sum(log_ratio, 1)
    length = tl.maximum(tl.sum(lengths, 0), 1.0)
    return length, tl.exp2(tl.sum(log_ratios, 0) / length * LOG2E)


@triton.jit
def _log_policy_slope(logp, old, advantage, scaled, r, low, high, cap, OBJECTIVE: tl.constexpr):
    """CISPO's and DPPO's factor of log pi, and where clipping acts."""
    if OBJECTIVE == "cispo":
        bounded = _clamped(r, low, high)
        return scaled * bounded, r != bounded
    p = tl.exp2(logp * LOG2E)
    q = tl.exp2(old * LOG2E)
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
        d = tl.maximum(difference, -LIMIT, tl.PropagateNan.ALL)
        decay = tl.exp2(d * -LOG2E)
        kl = decay + d - 1.0
        return tl.minimum(kl, K3_MAX, tl.PropagateNan.ALL), tl.where(kl > K3_MAX, 0.0, 1.0 - decay)
    d = _clamped(difference, -LIMIT, LIMIT)
    slope = tl.where(tl.abs(difference) > LIMIT, 0.0, d)
    if KL == "k1":
        return d, tl.where(slope == slope, tl.where(tl.abs(difference) > LIMIT, 0.0, 1.0), slope)
    return 0.5 * d * d, slope


@triton.jit
def _sequence_gradient(
    logprobs_ptr,
    old_ptr,
    advantages_ptr,
    mask_ptr,
    d_logprobs_ptr,
    share,
    begin,
    end,
    row_length,
    low,
    high,
    GEOMETRIC: tl.constexpr,
    ADD: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN: tl.constexpr,
):
    """Add a sequence's share of the gradient to each of its tokens, beside the terms that are there already."""
    for block in range(0, row_length, LANES * VECTOR):
        index, inside, active, read = _tile(mask_ptr, begin + block, end, LANES, VECTOR, EVEN)
        raw = _log_ratio(logprobs_ptr, old_ptr, index, read, active)
        free = active & (tl.abs(raw) <= LIMIT)
        if GEOMETRIC:
            advantage = tl.where(active, _read(advantages_ptr, index, read), 0.0)
            _, clipped = _geometric(raw, advantage, low, high)
            free = free & (advantage != 0.0) & (clipped == 0)
        gradient = tl.where(free, share, 0.0)
        if ADD:
            gradient += tl.load(d_logprobs_ptr + index, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_logprobs_ptr + index, gradient.to(d_logprobs_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _plus(a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4, a5 + b5, a6 + b6, a7 + b7, a8 + b8, a9 + b9, a10 + b10


@triton.jit
def _policy_kernel(
    logprobs_ptr,
    old_ptr,
    advantages_ptr,
    mask_ptr,
    ref_ptr,
    importance_ptr,
    drift_ptr,
    entropy_ptr,
    weights_ptr,
    denominator_ptr,
    d_logprobs_ptr,
    d_entropy_ptr,
    sums_ptr,
    row_length,
    total,
    constant,
    low,
    high,
    extra_0,
    extra_1,
    kl_coef,
    entropy_coef,
    OBJECTIVE: tl.constexpr,
    RATIO: tl.constexpr,
    HAS_DUAL: tl.constexpr,
    BY_LENGTH: tl.constexpr,
    KL: tl.constexpr,
    KL_CORRECTION: tl.constexpr,
    SUMS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    EVEN: tl.constexpr,
):
    GEOMETRIC: tl.constexpr = OBJECTIVE == "gmpo"
    SHARED: tl.constexpr = RATIO == "sequence" or GEOMETRIC  # one slope for all tokens of a sequence
    begin = tl.program_id(0).to(tl.int64) * row_length
    end = tl.minimum(begin + row_length, total)
    row_weight = constant
    if denominator_ptr is not None:
        denominator = tl.load(denominator_ptr).to(tl.float32)
        row_weight = tl.where(denominator > 0.0, 1.0 / denominator, 0.0)
    length, sequence_ratio = 1.0, 1.0
    if RATIO != "token" or GEOMETRIC or BY_LENGTH:
        length, sequence_ratio = _sequence(
            logprobs_ptr, old_ptr, advantages_ptr, mask_ptr, begin, end, row_length, low, high,
            RATIO != "token" or GEOMETRIC, GEOMETRIC, LANES, VECTOR, EVEN,
        )  # fmt: skip
        if BY_LENGTH:
            row_weight = row_weight / length
    zeros = tl.zeros([LANES], tl.float32)
    policy, kl_loss, entropy_loss, log_ratios, ratios, kls, entropies, d_sequence = (
        zeros, zeros, zeros, zeros, zeros, zeros, zeros, zeros,
    )  # fmt: skip
    tokens, clipped_tokens, duals = zeros, zeros, zeros
    for block in range(0, row_length, LANES * VECTOR):
        index, inside, active, read = _tile(mask_ptr, begin + block, end, LANES, VECTOR, EVEN)
        logp = _read(logprobs_ptr, index, read)
        old = _read(old_ptr, index, read)
        advantage = tl.where(active, _read(advantages_ptr, index, read), 0.0)
        raw = tl.where(active, logp - old, 0.0)
        log_ratio = _clamped(raw, -LIMIT, LIMIT)
        outside = tl.abs(raw) > LIMIT
        counted = tl.where(active, 1.0, 0.0)
        weight = row_weight  # of tokens that count
        if weights_ptr is not None:
            weight = tl.where(active, _read(weights_ptr, index, read) * row_weight, 0.0)
        behaviour = weight
        if importance_ptr is not None:
            behaviour = tl.where(active, _read(importance_ptr, index, read) * weight, 0.0)
        scaled = -advantage * behaviour
        r = tl.zeros([LANES, VECTOR], tl.float32) + sequence_ratio
        if RATIO == "token" and not GEOMETRIC:
            r = tl.exp2(log_ratio * LOG2E)
        never = inside & (counted > 1.0)
        clipped, dual = never, never
        gradient = tl.zeros([LANES, VECTOR], tl.float32)
        if OBJECTIVE == "clip":
            bounded, clipped, dual = _clip(advantage, r, low, high, extra_0, HAS_DUAL)
            stopped = clipped | dual
            term = scaled * bounded
            if SHARED:
                d_sequence += tl.sum(tl.where(stopped, 0.0, scaled), 1)
            else:
                gradient = tl.where(stopped | outside, 0.0, scaled * r)
        elif OBJECTIVE == "sapo":
            tau = tl.where(advantage > 0.0, extra_0, extra_1)
            gate = 1.0 / (1.0 + tl.exp2(tau * (1.0 - r) * LOG2E))
            term = scaled * (4.0 / tau) * gate
            gradient = tl.where(outside, 0.0, 4.0 * scaled * gate * (1.0 - gate) * r)
        elif GEOMETRIC:
            term = scaled * r
            d_sequence += tl.sum(scaled, 1)
            _, clipped = _geometric(log_ratio, advantage, low, high)
        else:
            logp_active = tl.where(active, logp, 0.0)
            old_active = tl.where(active, old, 0.0)
            gradient, clipped = _log_policy_slope(
                logp_active, old_active, advantage, scaled, r, low, high, extra_0, OBJECTIVE
            )
            term = gradient * logp_active
        if drift_ptr is not None:
            drift = tl.where(active, _read(drift_ptr, index, read) * behaviour, 0.0)
            term += drift * tl.abs(log_ratio)
            sign = tl.where(raw > 0.0, 1.0, tl.where(raw < 0.0, -1.0, 0.0))
            gradient += tl.where(outside, 0.0, drift * sign)
        policy += tl.sum(term, 1)
        if ref_ptr is not None:
            kl, kl_slope = _kl(tl.where(active, logp - _read(ref_ptr, index, read), 0.0), KL)
            if KL == "k1":
                kl_slope = tl.where(active, kl_slope, 0.0)
            kls += tl.sum(kl, 1)
            if KL_CORRECTION:
                kl_loss += tl.sum(kl * (r * weight), 1)
                if SHARED:
                    d_sequence += tl.sum(kl * (kl_coef * weight), 1)
                else:
                    kl_slope += tl.where(outside, 0.0, kl)
                kl_slope *= r
            elif weights_ptr is not None:
                kl_loss += tl.sum(kl * weight, 1)
            gradient += kl_slope * (kl_coef * weight)
        if entropy_ptr is not None:
            entropy = tl.where(active, _read(entropy_ptr, index, read), 0.0)
            entropies += tl.sum(entropy, 1)
            if weights_ptr is not None:
                entropy_loss += tl.sum(entropy * weight, 1)
        if d_logprobs_ptr is not None:
            tl.store(d_logprobs_ptr + index, gradient.to(d_logprobs_ptr.dtype.element_ty), mask=inside)
        if d_entropy_ptr is not None:
            d_entropy = counted * (-entropy_coef * weight)
            tl.store(d_entropy_ptr + index, d_entropy.to(d_entropy_ptr.dtype.element_ty), mask=inside)
        tokens += tl.sum(counted, 1)
        clipped_tokens += tl.sum(tl.where(clipped & active, 1.0, 0.0), 1)
        if HAS_DUAL:
            duals += tl.sum(tl.where(dual & active, 1.0, 0.0), 1)
        log_ratios -= tl.sum(log_ratio, 1)
        ratios += tl.sum(r * counted, 1)
    sums = (
        policy,
        kl_loss,
        entropy_loss,
        tokens,
        clipped_tokens,
        duals,
        log_ratios,
        ratios,
        kls,
        entropies,
        d_sequence,
    )
    s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, slope_sum = tl.reduce(sums, 0, _plus)
    if SHARED and d_logprobs_ptr is not None:
        tl.debug_barrier()  # other lanes wrote the terms that are added to
        share = slope_sum * sequence_ratio / length
        _sequence_gradient(
            logprobs_ptr, old_ptr, advantages_ptr, mask_ptr, d_logprobs_ptr, share, begin, end, row_length, low, high,
            GEOMETRIC, ref_ptr is not None or drift_ptr is not None, LANES, VECTOR, EVEN,
        )  # fmt: skip
    if weights_ptr is None and not KL_CORRECTION:
        s1 = s8 * row_weight
    if weights_ptr is None:
        s2 = s9 * row_weight
    out_ptr = sums_ptr + tl.program_id(0) * SUMS
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
def _finish_kernel(
    sums_ptr,
    loss_ptr,
    metrics_ptr,
    rows,
    kl_coef,
    entropy_coef,
    SUMS: tl.constexpr,
    USED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.arange(0, SUMS)
    totals = tl.zeros([BLOCK, SUMS], tl.float32)
    for begin in range(0, rows, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (column < USED)[None, :]
        totals += tl.load(sums_ptr + row[:, None] * SUMS + column[None, :], mask=inside, other=0.0)
    totals = tl.sum(totals, 0)
    tokens = tl.maximum(tl.sum(tl.where(column == 3, totals, 0.0), 0), 1.0)
    coefficient = tl.where(column == 0, 1.0, tl.where(column == 1, kl_coef, tl.where(column == 2, -entropy_coef, 0.0)))
    tl.store(loss_ptr, tl.sum(tl.where(coefficient == 0.0, 0.0, totals * coefficient), 0))
    tl.store(metrics_ptr + column, tl.where(column > 3, totals / tokens, totals))


def _bounds(options: PolicyOptions) -> tuple[float, float, float, float]:
    """What the kernel takes as low and high, and the objective's two further numbers."""
    low, high = -options.clip_low, options.clip_high
    if options.objective in ("clip", "cispo"):
        low, high = 1 + low, 1 + high
    elif options.objective in ("dppo_tv", "dppo_kl"):
        low = -low
    if options.objective == "sapo":
        return low, high, options.tau_positive, options.tau_negative
    if options.objective in ("dppo_tv", "dppo_kl"):
        return low, high, float("inf") if options.ratio_cap is None else options.ratio_cap, 0.0
    return low, high, options.dual_clip or 0.0, 0.0


def policy_terms(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    denominator: float | torch.Tensor,
    options: PolicyOptions,
    *,
    ref_logprobs: torch.Tensor | None = None,
    importance_weights: torch.Tensor | None = None,
    drift_weights: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    token_weights: torch.Tensor | None = None,
    d_logprobs: torch.Tensor | None = None,
    d_entropy: torch.Tensor | None = None,
) -> torch.Tensor:
    """The partial sums of the loss [programs, SUMS]; fills ``d_logprobs`` and ``d_entropy`` where given.

    All tensors are dense and of one shape, [B, T], but ``denominator``, a scalar. ``token_weights``, if given, multiply
    what 1 / ``denominator`` gives; the aggregation then has no further say.
    """
    by_length = options.aggregation == "seq-mean-token-mean" and token_weights is None
    total, tile = logprobs.numel(), LANES * VECTOR
    row_length = max(1, ceil_div(ceil_div(total, tile), RUNS)) * tile
    if by_length or options.by_sequence:
        row_length = logprobs.shape[-1]
    programs = ceil_div(total, row_length) if total else 0
    sums = logprobs.new_empty((programs, SUMS), dtype=torch.float32)
    if programs == 0:
        return sums
    on_device = isinstance(denominator, torch.Tensor)
    low, high, extra_0, extra_1 = _bounds(options)
    _policy_kernel[(programs,)](
        logprobs,
        old_logprobs,
        advantages,
        mask.view(torch.uint8) if mask.dtype == torch.bool else mask,
        ref_logprobs,
        importance_weights,
        drift_weights,
        entropy,
        token_weights,
        denominator if on_device else None,
        d_logprobs,
        d_entropy,
        sums,
        row_length,
        total,
        1.0 if on_device else 1.0 / denominator,
        low,
        high,
        extra_0,
        extra_1,
        options.kl_coef,
        options.entropy_coef,
        OBJECTIVE=options.objective,
        RATIO=options.ratio,
        HAS_DUAL=options.dual_clip is not None,
        BY_LENGTH=by_length,
        KL=options.kl_estimator,
        KL_CORRECTION=options.kl_correction,
        SUMS=SUMS,
        LANES=min(LANES, max(16, next_power_of_2(ceil_div(min(row_length, total), VECTOR)))),
        VECTOR=VECTOR,
        EVEN=total % VECTOR == 0 and row_length % VECTOR == 0,
        num_warps=POLICY_WARPS,
    )
    return sums


def policy_totals(sums: torch.Tensor, options: PolicyOptions) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, a scalar, and its metrics [SUMS] from partial sums."""
    loss = sums.new_empty(())
    metrics = sums.new_empty(SUMS)
    _finish_kernel[(1,)](
        sums,
        loss,
        metrics,
        len(sums),
        options.kl_coef,
        options.entropy_coef,
        SUMS=SUMS,
        USED=USED,
        BLOCK=FINISH_ROWS,
        num_warps=8,
    )
    return loss, metrics


def named_metrics(metrics: torch.Tensor) -> dict[str, torch.Tensor]:
    """The metrics that users see, as scalars."""
    scalars = metrics.unbind()
    return {name: scalars[column] for name, column in METRICS.items()}


def policy_denominator(
    mask: torch.Tensor, denominator: float | torch.Tensor | None, options: PolicyOptions
) -> float | torch.Tensor:
    """The denominator as a number, or as a scalar on the device: where None, the unmasked tokens or sequences."""
    if isinstance(denominator, torch.Tensor):
        return denominator.detach().to(mask.device).reshape(())
    if denominator is not None:
        return float(denominator)
    return torch.count_nonzero(mask if options.aggregation == "token-mean" else (mask != 0).any(1))


def _fake(logprobs: torch.Tensor, *arguments: Any) -> Any:
    entropy, d_logprobs, d_entropy = arguments[6], arguments[9], arguments[10]
    scalar, nothing = logprobs.new_empty((), dtype=torch.float32), logprobs.new_empty(0)
    return (
        scalar,
        logprobs.new_empty(SUMS, dtype=torch.float32),
        torch.empty_like(logprobs) if d_logprobs else nothing,
        torch.empty_like(entropy) if d_entropy else nothing.clone(),
    )


@operator(
    "policy_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, Tensor? ref_logprobs, "
    "Tensor? importance_weights, Tensor? drift_weights, Tensor? entropy, Tensor? denominator, float constant, "
    f"bool train_logprobs, bool train_entropy, {schema(PolicyOptions)}) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
def _policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
    importance_weights: torch.Tensor | None,
    drift_weights: torch.Tensor | None,
    entropy: torch.Tensor | None,
    denominator: torch.Tensor | None,
    constant: float,
    train_logprobs: bool,
    train_entropy: bool,
    *values: Any,
) -> tuple[torch.Tensor, ...]:
    """Loss, metrics [SUMS] and the gradients that are asked for, else nothing in their place."""
    options = PolicyOptions.of(values)
    d_logprobs = torch.empty_like(logprobs) if train_logprobs else None
    d_entropy = torch.empty_like(entropy) if train_entropy and entropy is not None else None
    sums = policy_terms(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        constant if denominator is None else denominator,
        options,
        ref_logprobs=ref_logprobs,
        importance_weights=importance_weights,
        drift_weights=drift_weights,
        entropy=entropy,
        d_logprobs=d_logprobs,
        d_entropy=d_entropy,
    )
    loss, metrics = policy_totals(sums, options)
    empty = (logprobs.new_empty(0) if x is None else x for x in (d_logprobs, d_entropy))
    return loss, metrics, *empty


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logprobs: torch.Tensor,
        entropy: torch.Tensor | None,
        constants: tuple[torch.Tensor | None, ...],
        denominator: float | torch.Tensor,
        options: PolicyOptions,
    ) -> Any:
        on_device = isinstance(denominator, torch.Tensor)
        scalar = (denominator, 1.0) if on_device else (None, denominator)
        arguments = (logprobs, *constants, entropy, *scalar, *ctx.needs_input_grad[:2], *flat(options))
        loss, metrics, *gradients = _policy_loss(*arguments)
        ctx.mark_non_differentiable(metrics)
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*gradients)
        else:
            ctx.save_for_backward(logprobs, entropy)
            ctx.arguments, ctx.gradients = arguments, gradients
        return loss, metrics

    @staticmethod
    @first_order
    def backward(ctx: Any, d_loss: torch.Tensor, d_metrics: torch.Tensor) -> Any:
        if torch.compiler.is_compiling():
            scaled = [(d_loss * x).to(x.dtype) for x in ctx.saved_tensors]
        else:
            # Scaled in place and given away, so a second pass over a retained graph forms the gradients again.
            ctx.saved_tensors  # noqa: B018  (raises if an input was changed in place since)
            gradients = ctx.gradients or _policy_loss(*ctx.arguments)[2:]
            ctx.gradients = None
            scaled = [scale_(x, d_loss) for x in gradients]
        returned = (x if needed else None for x, needed in zip(scaled, ctx.needs_input_grad[:2], strict=True))
        return *returned, None, None, None


def _dense(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None:
        return None
    constant = tensor.detach() if tensor.requires_grad else tensor
    return constant if constant.is_contiguous() else constant.contiguous()


@with_options(PolicyOptions)
def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    ref_logprobs: torch.Tensor | None = None,
    importance_weights: torch.Tensor | None = None,
    drift_weights: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    denominator: float | torch.Tensor | None = None,
    backend: Backend = "auto",
    **options: Any,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The policy loss, an fp32 scalar, and its metrics, a dict of detached scalars.

    All tensors are [B, T] and on one device; a token counts where ``mask`` is not 0, and what the others hold, NaN
    included, does not matter. ``advantages`` may be [B] or [B, 1]: one a sequence. Gradients flow to ``logprobs`` and
    ``entropy``. The module's docstring states the formulas and their sources, ``ctrl_kernels.PolicyOptions`` the
    ``options``.

    ``denominator``: what the sum is divided by; pass the global one (unmasked tokens for ``token-mean``, sequences
    for the others) when micro-batches or data-parallel ranks share a batch. None counts this call's own: its unmasked
    tokens, or its sequences that have any. A fully masked batch has loss 0 and gradient 0.

    Metrics are means over this call's unmasked tokens: ``clip_fraction`` (tokens whose gradient clipping stopped, or
    for ``cispo`` bounded), ``dual_clip_fraction``, ``approx_kl`` (mean of log pi_old - log pi), ``ratio``, ``kl`` (the
    estimate against the reference) and ``entropy``; besides ``policy_loss``, the loss without its KL and entropy
    terms, and ``tokens``, their number.
    """
    chosen = policy_options(options)
    refuse("policy_loss", options, PolicyOptions)
    if logprobs.dim() != 2:
        raise ValueError(f"logprobs must have shape (B, T), got {tuple(logprobs.shape)}")
    if advantages.shape in ((len(logprobs),), (len(logprobs), 1)):
        advantages = advantages.reshape(-1, 1).expand(logprobs.shape)
    tensors = {
        "old_logprobs": old_logprobs,
        "advantages": advantages,
        "ref_logprobs": ref_logprobs,
        "importance_weights": importance_weights,
        "drift_weights": drift_weights,
        "entropy": entropy,
    }
    check_shapes(logprobs.shape, logprobs.device, mask=mask, **tensors)
    check_denominator(denominator)
    if chosen.kl_coef != 0 and ref_logprobs is None:
        raise ValueError(f"kl_coef={chosen.kl_coef} needs ref_logprobs")
    if chosen.entropy_coef != 0 and entropy is None:
        raise ValueError(f"entropy_coef={chosen.entropy_coef} needs entropy")
    if resolve_backend(backend, logprobs) == "triton" and logprobs.numel() > 0:
        check_kernel_dtype(logprobs=logprobs, **tensors)
        constants = (old_logprobs, advantages, mask, ref_logprobs, importance_weights, drift_weights)
        loss, vector = _PolicyLoss.apply(
            logprobs.contiguous(),
            None if entropy is None else entropy.contiguous(),
            tuple(map(_dense, constants)),
            policy_denominator(mask, denominator, chosen),
            chosen,
        )
        return loss, named_metrics(vector)
    return reference.policy_loss(logprobs, mask=mask, options=chosen, denominator=denominator, **tensors)


def covariance_tokens(
    logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    fraction: float,
    bounds: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Tokens [B, T], as bool, whose log-prob and advantage vary together the most (Cui et al. 2025, arXiv 2505.22617).

    A token's covariance is (A - mean A) (log pi - mean log pi), means over the tokens where ``mask`` is not 0. KL-Cov
    takes the largest ``fraction`` of them, at least one; pass ``coefficient * tokens`` as ``drift_weights`` with
    ``clip_low=1, clip_high=inf``. Clip-Cov takes as many at random of those strictly within ``bounds``; leave tokens
    that clipping stops anyway out of ``mask``, and pass ``~tokens`` as ``importance_weights``. Waits for the device.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction} must lie between 0 and 1")
    check_shapes(logprobs.shape, logprobs.device, advantages=advantages, mask=mask)
    kept = (mask != 0).flatten().nonzero().squeeze(1)
    chosen = torch.zeros(mask.numel(), dtype=torch.bool, device=mask.device)
    if len(kept) == 0:
        return chosen.view(mask.shape)
    logp, advantage = logprobs.detach().float().flatten()[kept], advantages.detach().float().flatten()[kept]
    covariance = (advantage - advantage.mean()) * (logp - logp.mean())
    wanted = max(1, int(fraction * len(kept)))
    if bounds is None:
        picked = covariance.topk(wanted).indices
    else:
        picked = ((covariance > bounds[0]) & (covariance < bounds[1])).nonzero().squeeze(1)
        order = torch.randperm(len(picked), generator=generator, device=None if generator is None else generator.device)
        picked = picked[order[:wanted].to(picked.device)]
    chosen[kept[picked]] = True
    return chosen.view(mask.shape)
