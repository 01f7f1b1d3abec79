"""The next token of every row of a batch: logits adjusted, the unlikely cut, one drawn by its own random number."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence

import numpy as np
import torch

from ctrl_hpc.rollout.decoding import Decoding

NUCLEUS_WIDTHS = (256, 4096)
"""Likeliest tokens among which those that may be drawn are looked for, before the whole vocabulary is."""
_HALVINGS = 8
"""How often the range of the nucleus' edge is halved before the tokens within are sorted."""


def _uniforms(seeds: Sequence[int | None], steps: int) -> torch.Tensor:
    """``[B, T]`` float64 numbers in [0, 1): row b is a Philox stream keyed by seed b, whatever the other rows."""
    out_BT = np.empty((len(seeds), steps))
    for row, seed in enumerate(seeds):
        key = secrets.randbits(62) if seed is None else seed
        out_BT[row] = np.random.Generator(np.random.Philox(key=key)).random(steps)
    return torch.from_numpy(out_BT)


class Sampler:
    """Draws the next token of every row of a batch by inverting the cumulative distribution.

    Log-probabilities are those of the softmax at the row's temperature, after penalties and biases, before the cut of
    unlikely tokens (at temperature 1 for greedy rows): what a trainer recomputes from the logits.
    """

    def __init__(self, decodings: Sequence[Decoding], steps: int, device: torch.device) -> None:
        """``steps``: the most tokens that a row draws."""
        greedy = [item.temperature == 0.0 for item in decodings]
        self._greedy_B = torch.tensor(greedy, device=device)
        self._all_greedy, self._none_greedy = all(greedy), not any(greedy)
        scale = [1.0 if item.temperature == 0.0 else 1.0 / item.temperature for item in decodings]
        self._scale_B1 = torch.tensor(scale, dtype=torch.float32, device=device)[:, None]
        self._cuts_B = torch.tensor([item.cuts for item in decodings], device=device)
        self._all_cut, self._none_cut = all(item.cuts for item in decodings), not any(item.cuts for item in decodings)
        self._top_p_B1 = torch.tensor([item.top_p for item in decodings], dtype=torch.float64, device=device)[:, None]
        self._min_p_B1 = torch.tensor([item.min_p for item in decodings], dtype=torch.float64, device=device)[:, None]
        top_k = [min(item.top_k, 2**31) for item in decodings]
        self._top_k_B1 = torch.tensor(top_k, dtype=torch.long, device=device)[:, None]
        self._widest_top_k = max(top_k)
        seeds = [0 if item.temperature == 0.0 else item.seed for item in decodings]
        self._uniforms_BT = _uniforms(seeds, 1 if self._all_greedy else steps).to(device)

    def keep(self, rows_K: torch.Tensor) -> None:
        """Forget all rows but these."""
        self._greedy_B, self._cuts_B = self._greedy_B[rows_K], self._cuts_B[rows_K]
        self._scale_B1, self._top_p_B1 = self._scale_B1[rows_K], self._top_p_B1[rows_K]
        self._min_p_B1, self._top_k_B1 = self._min_p_B1[rows_K], self._top_k_B1[rows_K]
        self._uniforms_BT = self._uniforms_BT[rows_K]

    def draw(self, logits_BV: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """``(tokens [B], logprobs [B], logprobs of the whole vocabulary [B, V])`` of step ``step``, from 0."""
        logprobs_BV = torch.log_softmax(logits_BV.float() * self._scale_B1, dim=-1)
        if self._all_greedy:
            tokens_B = logits_BV.argmax(dim=-1)
        else:
            tokens_B = self._sample(logprobs_BV, step)
            if not self._none_greedy:
                tokens_B = torch.where(self._greedy_B, logits_BV.argmax(dim=-1), tokens_B)
        return tokens_B, logprobs_BV.gather(1, tokens_B[:, None])[:, 0], logprobs_BV

    def _sample(self, logprobs_BV: torch.Tensor, step: int) -> torch.Tensor:
        uniform_B1 = self._uniforms_BT[:, step : step + 1]
        if self._none_cut:
            return _invert(logprobs_BV.exp().double(), uniform_B1)
        if self._all_cut:
            return self._sample_cut(logprobs_BV, uniform_B1, torch.arange(len(logprobs_BV), device=logprobs_BV.device))
        tokens_B = torch.empty(len(logprobs_BV), dtype=torch.long, device=logprobs_BV.device)
        for cut in (False, True):
            rows = torch.nonzero(self._cuts_B == cut)[:, 0]
            if len(rows) and cut:
                tokens_B[rows] = self._sample_cut(logprobs_BV[rows], uniform_B1[rows], rows)
            elif len(rows):
                tokens_B[rows] = _invert(logprobs_BV[rows].exp().double(), uniform_B1[rows])
        return tokens_B

    def _sample_cut(self, logprobs_RV: torch.Tensor, uniform_R1: torch.Tensor, rows_R: torch.Tensor) -> torch.Tensor:
        """Tokens of these rows, from among the likeliest; wider and wider, for the rows that need it."""
        tokens_R = torch.empty(len(rows_R), dtype=torch.long, device=rows_R.device)
        if self._widest_top_k == 0 and rows_R.device.type == "cpu":
            # A row fits the processor's caches: one after the other they cost what the whole distribution does.
            for row, at in enumerate(rows_R.tolist()):
                kept_V = nucleus(logprobs_RV[row].exp(), float(self._top_p_B1[at]), float(self._min_p_B1[at]))
                tokens_R[row] = _invert(kept_V[None].double(), uniform_R1[row, None])[0]
            return tokens_R
        vocabulary = logprobs_RV.shape[1]
        widths = [width for width in NUCLEUS_WIDTHS if self._widest_top_k < width < vocabulary]
        open_Q = torch.arange(len(rows_R), device=rows_R.device)
        for width in (*widths, vocabulary):
            ids_QK, probs_QK = _likeliest(logprobs_RV if len(open_Q) == len(rows_R) else logprobs_RV[open_Q], width)
            kept_QK = self._kept(probs_QK, rows_R[open_Q])
            if width < vocabulary:
                # A token beyond the K likeliest is as likely as the last of them at most: if all that are kept are
                # likelier, none beyond is kept. (Equally likely ones are kept in the order of their ids.)
                least_Q1 = torch.where(kept_QK, probs_QK, torch.inf).amin(dim=-1)
                whole_Q = least_Q1 > probs_QK[:, -1]
            else:
                whole_Q = torch.ones(len(open_Q), dtype=torch.bool, device=rows_R.device)
            done_D = open_Q[whole_Q]
            if len(done_D):
                kept_DK = torch.where(kept_QK, probs_QK, 0.0)[whole_Q]
                ids_DK, order_DK = ids_QK[whole_Q].sort(dim=-1)
                index_D = _invert(kept_DK.gather(1, order_DK), uniform_R1[done_D])
                tokens_R[done_D] = ids_DK.gather(1, index_D[:, None])[:, 0]
            open_Q = open_Q[~whole_Q]
            if not len(open_Q):
                break
        return tokens_R

    def _kept(self, probs_QK: torch.Tensor, rows_Q: torch.Tensor) -> torch.Tensor:
        """Which of the likeliest tokens, in order, may be drawn: the top k, of them the nucleus, of them min p."""
        top_k_Q1, rank_K = self._top_k_B1[rows_Q], torch.arange(probs_QK.shape[1], device=probs_QK.device)
        first_QK = (rank_K < top_k_Q1) | (top_k_Q1 == 0)
        mass_Q1 = torch.where(first_QK, probs_QK, 0.0).sum(dim=-1, keepdim=True)
        mass_Q1 = torch.where(top_k_Q1 == 0, 1.0, mass_Q1)
        above_QK = probs_QK.cumsum(dim=-1) - probs_QK  # mass of the strictly likelier tokens
        likely_QK = probs_QK >= self._min_p_B1[rows_Q] * probs_QK[:, :1]
        top_p_Q1 = self._top_p_B1[rows_Q]
        return first_QK & likely_QK & ((above_QK < top_p_Q1 * mass_Q1) | (top_p_Q1 >= 1.0))


def nucleus(probs_V: torch.Tensor, top_p: float, min_p: float) -> torch.Tensor:
    """The probabilities, zero outside the nucleus: the likeliest tokens, equally likely ones by their ids, of which
    the likelier have less than ``top_p`` together, and at least ``min_p`` of the likeliest one's probability each.

    No sort of the vocabulary: the probability at its edge lies between that of the likeliest token and
    ``(1 - top_p) / V``, as all tokens below have no more than ``1 - top_p`` together. The range is halved, by the mass
    above its middle, until few tokens are within; these are sorted.
    """
    highest = float(probs_V.max())
    kept_V = probs_V.clone()
    if top_p < 1.0:
        above, below = highest, max((1.0 - top_p) / len(probs_V), 1e-30)
        for _ in range(_HALVINGS if below < above else 0):
            middle = math.sqrt(above * below)
            mass = float(torch.nn.functional.threshold(probs_V, middle, 0.0).sum())
            above, below = (middle, below) if mass < top_p else (above, middle)
        kept_V = _nucleus_between(probs_V, top_p, above, below)
    if min_p > 0.0:
        kept_V[kept_V.double() < min_p * highest] = 0.0
    return kept_V


def _nucleus_between(probs_V: torch.Tensor, top_p: float, above: float, below: float) -> torch.Tensor:
    """The nucleus whose edge is in ``(below, above]``; where rounding has it elsewhere, the whole row is sorted."""
    kept_V = torch.nn.functional.threshold(probs_V, above, 0.0)
    mass = float(kept_V.sum(dtype=torch.float64))
    near_N = torch.nonzero(torch.nn.functional.threshold(probs_V, below, 0.0) - kept_V)[:, 0]
    values_N, order_N = probs_V[near_N].sort(descending=True, stable=True)
    values_N = values_N.double()
    likelier_N = mass + values_N.cumsum(0) - values_N
    whole = below < 0.0
    if not whole and (mass >= top_p or len(near_N) == 0 or float(likelier_N[-1] + values_N[-1]) < top_p):
        return _nucleus_between(probs_V, top_p, math.inf, -1.0)
    inside_N = near_N[order_N[likelier_N < top_p]]
    kept_V[inside_N] = probs_V[inside_N]
    return kept_V


def _likeliest(logprobs_QV: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``(ids, probabilities in float64) [Q, K]`` of the likeliest tokens, equally likely ones by their ids."""
    if width == logprobs_QV.shape[1]:
        probs_QV, ids_QV = logprobs_QV.exp().sort(dim=-1, descending=True, stable=True)
        return ids_QV, probs_QV.double()
    logprobs_QK, ids_QK = logprobs_QV.topk(width, dim=-1)
    ids_QK, by_id_QK = ids_QK.sort(dim=-1)
    probs_QK, order_QK = logprobs_QK.gather(1, by_id_QK).exp().sort(dim=-1, descending=True, stable=True)
    return ids_QK.gather(1, order_QK), probs_QK.double()


def _invert(probs_RV: torch.Tensor, uniform_R1: torch.Tensor) -> torch.Tensor:
    """The column of each row at which the cumulative sum passes the row's uniform number."""
    cumulative_RV = probs_RV.cumsum(dim=-1)
    target_R1 = uniform_R1 * cumulative_RV[:, -1:]
    columns_R = torch.searchsorted(cumulative_RV, target_R1, right=True)[:, 0]
    return columns_R.clamp_(max=probs_RV.shape[1] - 1)


class Adjustments:
    """Penalties, biases and stop tokens not yet allowed, in the logits of rows that ask for them."""

    def __init__(
        self,
        decodings: Sequence[Decoding],
        prompts: Sequence[Sequence[int]],
        stop_ids: Sequence[frozenset[int]],
        vocabulary: int,
        device: torch.device,
    ) -> None:
        """``stop_ids``: the stop tokens of each row."""
        rows = len(decodings)

        def column(values: Sequence[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)[:, None]

        self._penalises = any(
            (item.repetition_penalty, item.frequency_penalty, item.presence_penalty) != (1.0, 0.0, 0.0)
            for item in decodings
        )
        self._delays = any(item.min_tokens > 0 for item in decodings)
        counted, stops = vocabulary if self._penalises else 0, vocabulary if self._delays else 0
        self._repetition_R1 = column([item.repetition_penalty for item in decodings])
        self._frequency_R1 = column([item.frequency_penalty for item in decodings])
        self._presence_R1 = column([item.presence_penalty for item in decodings])
        self._min_tokens_R1 = column([float(item.min_tokens) for item in decodings])
        # No table of the whole vocabulary for what no row asks: with a large one it is as large as the logits.
        self._in_prompt_RV = torch.zeros(rows, counted, dtype=torch.bool, device=device)
        self._stops_RV = torch.zeros(rows, stops, dtype=torch.bool, device=device)
        self._counts_RV = torch.zeros(rows, counted, device=device)
        most = max(len(item.logit_bias) for item in decodings)
        self._biased_RK = torch.zeros(rows, most, dtype=torch.long, device=device)
        self._bias_RK = torch.zeros(rows, most, device=device)
        for row, item in enumerate(decodings):
            if self._penalises:
                self._in_prompt_RV[row, list(prompts[row])] = True
            if self._delays:
                self._stops_RV[row, sorted(stop_ids[row])] = True
            for place, (token, bias) in enumerate(item.logit_bias):
                self._biased_RK[row, place], self._bias_RK[row, place] = token, bias

    def apply(self, logits_RV: torch.Tensor, step: int) -> torch.Tensor:
        """The logits that are drawn from, in float32."""
        logits_RV = self._penalised(logits_RV.float()) if self._penalises else logits_RV.float()
        if self._bias_RK.shape[1]:
            logits_RV = logits_RV.scatter_add(1, self._biased_RK, self._bias_RK)
        if self._delays:
            logits_RV = logits_RV.masked_fill(self._stops_RV & (step < self._min_tokens_R1), -torch.inf)
        return logits_RV

    def _penalised(self, logits_RV: torch.Tensor) -> torch.Tensor:
        drawn_RV = self._counts_RV > 0
        penalised_RV = torch.where(logits_RV > 0, logits_RV / self._repetition_R1, logits_RV * self._repetition_R1)
        logits_RV = torch.where(self._in_prompt_RV | drawn_RV, penalised_RV, logits_RV)
        return logits_RV - self._frequency_R1 * self._counts_RV - self._presence_R1 * drawn_RV

    def note(self, token_R: torch.Tensor) -> None:
        """Count what was drawn."""
        if self._penalises:
            self._counts_RV[torch.arange(len(token_R), device=token_R.device), token_R] += 1.0

    def keep(self, rows_K: torch.Tensor) -> None:
        """Forget all rows but these."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                setattr(self, name, value[rows_K])
