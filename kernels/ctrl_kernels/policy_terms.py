"""The kernel of the clipped policy loss: inputs read once, the gradient written once, a row of sums a program.

A second kernel of one program adds the partial sums up in a fixed order. Programs take whole sequences where the loss
needs their lengths or ratios (these are read twice or, for sequence ratios, three times, the later times from the
cache), and runs of tokens otherwise. The formulas are those of ``ctrl_kernels.loss``.

Legend: B sequences, T steps.
"""
# mypy: disable-error-code="no-untyped-def"

import torch
import triton
import triton.language as tl

from ctrl_kernels.clipping import K3_LIMIT, LOG_RATIO_LIMIT, PolicyOptions

BLOCK_T = 1024
PROGRAM_BLOCKS = 2  # of a run of tokens: half as many partial sums to add up
POLICY_WARPS = 4
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
FINISH_ROWS = 512
LIMIT = tl.constexpr(LOG_RATIO_LIMIT)
K3_MAX = tl.constexpr(K3_LIMIT)


@triton.jit
def _load(ptr, index, inside, active):
    """Values in fp32; 0 at masked tokens whatever they hold (a whole vector is read either way, in one instruction)."""
    return tl.where(active, tl.load(ptr + index, mask=inside, other=0.0).to(tl.float32), 0.0)


@triton.jit
def _clamped(x, limit):
    """x between -limit and limit; NaN stays NaN."""
    return tl.where(x > limit, limit, tl.where(x < -limit, -limit, x))


@triton.jit
def _sequence(
    logprobs_ptr,
    old_ptr,
    mask_ptr,
    begin,
    end,
    row_length,
    SEQUENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A sequence's number of unmasked tokens, at least 1, and its ratio exp(mean of their clamped log-ratios)."""
    length = 0.0
    log_ratio_sum = 0.0
    for block in range(0, row_length, BLOCK):
        index = begin + block + tl.arange(0, BLOCK)
        inside = index < end
        active = inside & (tl.load(mask_ptr + index, mask=inside, other=0) != 0)
        length += tl.sum(active.to(tl.float32), 0)
        if SEQUENCE:
            raw = _load(logprobs_ptr, index, inside, active) - _load(old_ptr, index, inside, active)
            log_ratio_sum += tl.sum(_clamped(raw, LIMIT), 0)
    length = tl.maximum(length, 1.0)
    return length, tl.exp(log_ratio_sum / length)


@triton.jit
def _surrogate(advantage, r, low, high, dual_clip, HAS_DUAL: tl.constexpr):
    """The ratio after clipping, and where clipping and dual clipping stopped the gradient."""
    over = (advantage > 0.0) & (r > high)
    under = (advantage < 0.0) & (r < low)
    bounded = tl.where(over, high, tl.where(under, low, r))
    dual = over & under
    if HAS_DUAL:
        dual = (advantage < 0.0) & (r > dual_clip)
        bounded = tl.where(dual, dual_clip, bounded)
    return bounded, over | under, dual


@triton.jit
def _kl(difference, KL: tl.constexpr):
    """The KL estimate of log pi - log ref and its slope."""
    d = _clamped(difference, LIMIT)
    if KL == "k1":
        kl = d
        slope = tl.where(d == d, 1.0, d)
    elif KL == "k2":
        kl = 0.5 * d * d
        slope = d
    else:
        decay = tl.exp(-d)
        kl = decay + d - 1.0
        slope = tl.where(kl > K3_MAX, 0.0, 1.0 - decay)
        kl = _clamped(kl, K3_MAX)
    return kl, tl.where(tl.abs(difference) > LIMIT, 0.0, slope)


@triton.jit
def _sequence_gradient(
    logprobs_ptr,
    old_ptr,
    mask_ptr,
    d_logprobs_ptr,
    d_log_ratio,
    begin,
    end,
    row_length,
    HAS_REF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add a sequence's share of the gradient to each of its tokens, beside the KL term that is there already."""
    for block in range(0, row_length, BLOCK):
        index = begin + block + tl.arange(0, BLOCK)
        inside = index < end
        active = inside & (tl.load(mask_ptr + index, mask=inside, other=0) != 0)
        raw = _load(logprobs_ptr, index, inside, active) - _load(old_ptr, index, inside, active)
        gradient = tl.where(active & (tl.abs(raw) <= LIMIT), d_log_ratio, 0.0)
        if HAS_REF:
            gradient += tl.load(d_logprobs_ptr + index, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_logprobs_ptr + index, gradient.to(d_logprobs_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _policy_kernel(
    logprobs_ptr,
    old_ptr,
    advantages_ptr,
    mask_ptr,
    ref_ptr,
    importance_ptr,
    entropy_ptr,
    weights_ptr,
    denominator_ptr,
    d_logprobs_ptr,
    d_entropy_ptr,
    sums_ptr,
    row_length,
    total,
    low,
    high,
    dual_clip,
    kl_coef,
    entropy_coef,
    HAS_DUAL: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_IMPORTANCE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    STORE_GRADIENT: tl.constexpr,
    STORE_ENTROPY_GRADIENT: tl.constexpr,
    SEQUENCE: tl.constexpr,
    BY_LENGTH: tl.constexpr,
    KL: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    begin = tl.program_id(0).to(tl.int64) * row_length
    end = tl.minimum(begin + row_length, total)
    denominator = tl.load(denominator_ptr).to(tl.float32)
    row_weight = tl.where(denominator > 0.0, 1.0 / denominator, 0.0)
    length, sequence_ratio = 1.0, 1.0
    if SEQUENCE or BY_LENGTH:
        length, sequence_ratio = _sequence(logprobs_ptr, old_ptr, mask_ptr, begin, end, row_length, SEQUENCE, BLOCK)
        if BY_LENGTH:
            row_weight = row_weight / length
    policy, kl_loss, entropy_loss, tokens, clipped_tokens, dual_tokens = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    log_ratios, ratios, kls, entropies, d_sequence = 0.0, 0.0, 0.0, 0.0, 0.0
    for block in range(0, row_length, BLOCK):
        index = begin + block + tl.arange(0, BLOCK)
        inside = index < end
        active = inside & (tl.load(mask_ptr + index, mask=inside, other=0) != 0)
        weight = tl.where(active, row_weight, 0.0)
        if HAS_WEIGHTS:
            weight *= _load(weights_ptr, index, inside, active)
        advantage = _load(advantages_ptr, index, inside, active)
        logprobs = _load(logprobs_ptr, index, inside, active)
        raw = logprobs - _load(old_ptr, index, inside, active)
        log_ratio = _clamped(raw, LIMIT)
        r = tl.zeros([BLOCK], tl.float32) + sequence_ratio if SEQUENCE else tl.exp(log_ratio)
        bounded, clipped, dual = _surrogate(advantage, r, low, high, dual_clip, HAS_DUAL)
        scaled = -advantage * weight
        if HAS_IMPORTANCE:
            scaled *= _load(importance_ptr, index, inside, active)
        slope = tl.where(clipped | dual, 0.0, scaled)
        policy += tl.sum(scaled * bounded, 0)
        gradient = tl.where(tl.abs(raw) > LIMIT, 0.0, slope * r)
        if SEQUENCE:
            d_sequence += tl.sum(slope, 0)
            gradient = tl.zeros([BLOCK], tl.float32)
        if HAS_REF:
            kl, slope = _kl(logprobs - _load(ref_ptr, index, inside, active), KL)
            kl_sum = tl.sum(tl.where(active, kl, 0.0), 0)
            kl_loss += tl.sum(kl * weight, 0) if HAS_WEIGHTS else kl_sum * row_weight
            kls += kl_sum
            gradient += slope * (kl_coef * weight)
        if HAS_ENTROPY:
            entropy = _load(entropy_ptr, index, inside, active)
            entropy_sum = tl.sum(entropy, 0)
            entropy_loss += tl.sum(entropy * weight, 0) if HAS_WEIGHTS else entropy_sum * row_weight
            entropies += entropy_sum
        if STORE_GRADIENT:
            tl.store(d_logprobs_ptr + index, gradient.to(d_logprobs_ptr.dtype.element_ty), mask=inside)
        if STORE_ENTROPY_GRADIENT:
            tl.store(d_entropy_ptr + index, (-entropy_coef * weight).to(d_entropy_ptr.dtype.element_ty), mask=inside)
        counts = tl.sum(active.to(tl.int32) + (clipped.to(tl.int32) << 16), 0)  # two counts in one reduction
        tokens += (counts & 0xFFFF).to(tl.float32)
        clipped_tokens += (counts >> 16).to(tl.float32)
        if HAS_DUAL:
            dual_tokens += tl.sum(dual.to(tl.float32), 0)
        log_ratios -= tl.sum(log_ratio, 0)
        ratios += tl.sum(tl.where(active, r, 0.0), 0)
    if SEQUENCE and STORE_GRADIENT:
        share = d_sequence * sequence_ratio / length
        _sequence_gradient(
            logprobs_ptr, old_ptr, mask_ptr, d_logprobs_ptr, share, begin, end, row_length, HAS_REF, BLOCK
        )
    out_ptr = sums_ptr + tl.program_id(0) * SUMS
    tl.store(out_ptr, policy)
    tl.store(out_ptr + 1, kl_loss)
    tl.store(out_ptr + 2, entropy_loss)
    tl.store(out_ptr + 3, tokens)
    tl.store(out_ptr + 4, clipped_tokens)
    tl.store(out_ptr + 5, dual_tokens)
    tl.store(out_ptr + 6, log_ratios)
    tl.store(out_ptr + 7, ratios)
    tl.store(out_ptr + 8, kls)
    tl.store(out_ptr + 9, entropies)


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
    totals = tl.zeros([SUMS], tl.float32)
    for begin in range(0, rows, BLOCK):
        row = begin + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (column < USED)[None, :]
        totals += tl.sum(tl.load(sums_ptr + row[:, None] * SUMS + column[None, :], mask=inside, other=0.0), 0)
    tokens = tl.maximum(tl.sum(tl.where(column == 3, totals, 0.0), 0), 1.0)
    coefficient = tl.where(column == 0, 1.0, tl.where(column == 1, kl_coef, tl.where(column == 2, -entropy_coef, 0.0)))
    tl.store(loss_ptr, tl.sum(tl.where(coefficient == 0.0, 0.0, totals * coefficient), 0))
    tl.store(metrics_ptr + column, tl.where(column > 3, totals / tokens, totals))


def policy_terms(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    denominator: torch.Tensor,
    options: PolicyOptions,
    *,
    ref_logprobs: torch.Tensor | None = None,
    importance_weights: torch.Tensor | None = None,
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
    by_row = by_length or options.ratio == "sequence"
    total = logprobs.numel()
    row_length = logprobs.shape[-1] if by_row else BLOCK_T * PROGRAM_BLOCKS
    block = min(BLOCK_T, max(16, triton.next_power_of_2(row_length)))
    programs = triton.cdiv(total, row_length)
    sums = logprobs.new_empty((programs, SUMS), dtype=torch.float32)
    if programs == 0:
        return sums
    unused = logprobs
    _policy_kernel[(programs,)](
        logprobs,
        old_logprobs,
        advantages,
        mask.view(torch.uint8) if mask.dtype == torch.bool else mask,
        unused if ref_logprobs is None else ref_logprobs,
        unused if importance_weights is None else importance_weights,
        unused if entropy is None else entropy,
        unused if token_weights is None else token_weights,
        denominator,
        unused if d_logprobs is None else d_logprobs,
        unused if d_entropy is None else d_entropy,
        sums,
        row_length,
        total,
        1.0 - options.clip_low,
        1.0 + options.clip_high,
        options.dual_clip or 0.0,
        options.kl_coef,
        options.entropy_coef,
        HAS_DUAL=options.dual_clip is not None,
        HAS_REF=ref_logprobs is not None,
        HAS_IMPORTANCE=importance_weights is not None,
        HAS_ENTROPY=entropy is not None,
        HAS_WEIGHTS=token_weights is not None,
        STORE_GRADIENT=d_logprobs is not None,
        STORE_ENTROPY_GRADIENT=d_entropy is not None,
        SEQUENCE=options.ratio == "sequence",
        BY_LENGTH=by_length,
        KL=options.kl_estimator,
        SUMS=SUMS,
        BLOCK=block,
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
        USED=10,
        BLOCK=FINISH_ROWS,
        num_warps=8,
    )
    return loss, metrics


def named_metrics(metrics: torch.Tensor) -> dict[str, torch.Tensor]:
    """The metrics that users see, as scalars."""
    return {name: metrics[column] for name, column in METRICS.items()}


def policy_denominator(
    mask: torch.Tensor, denominator: float | torch.Tensor | None, options: PolicyOptions
) -> torch.Tensor:
    """The denominator as an fp32 scalar on the device: where None, how many tokens or sequences are not masked."""
    if isinstance(denominator, torch.Tensor):
        return denominator.detach().to(device=mask.device, dtype=torch.float32).reshape(())
    if denominator is not None:
        return torch.full((), denominator, dtype=torch.float32, device=mask.device)
    counted = mask if options.aggregation == "token-mean" else (mask != 0).any(1)
    return torch.count_nonzero(counted).float()
