"""The next token of every row of a batch: logits adjusted, the unlikely cut, one drawn by its own random number."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ctrl_hpc.rollout.decoding import Decoding

TOP_K_WIDTHS = (256, 4096)
"""Likeliest tokens among which the top k are looked for, before the whole vocabulary is."""
_PLAIN, _NUCLEUS, _TOP_K = 0, 1, 2
"""How a row is drawn: from all tokens, within ``top_p`` and ``min_p``, within ``top_k`` and these."""
_EDGE = 1e-4
"""Sums in float32 say whether a token is in the nucleus but so near to its edge."""
_BLOCK = 512
"""Tokens of a large vocabulary whose probabilities are summed first."""


def _uniform(key: int, numbers: int, *stream: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """So many numbers in [0, 1): a Philox stream by its key, the first of it, or one far away for each step and try."""
    counter = np.array([0, 0, *(stream or (0, 0))], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).random(numbers)


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
        kinds = [(_TOP_K if item.top_k else _NUCLEUS) if item.cuts else _PLAIN for item in decodings]
        self._kinds, self._kind_B = sorted(set(kinds)), torch.tensor(kinds, device=device)
        self._top_p_B1 = torch.tensor([item.top_p for item in decodings], dtype=torch.float64, device=device)[:, None]
        self._min_p_B1 = torch.tensor([item.min_p for item in decodings], dtype=torch.float64, device=device)[:, None]
        top_k = [min(item.top_k, 2**31) for item in decodings]
        self._top_k_B1 = torch.tensor(top_k, dtype=torch.long, device=device)[:, None]
        self._widest_top_k = max(top_k)
        seeds = [0 if item.temperature == 0.0 else item.seed for item in decodings]
        self._keys = [secrets.randbits(62) if seed is None else seed for seed in seeds]
        numbers = 1 if self._all_greedy else steps
        self._uniforms_BT = torch.from_numpy(np.stack([_uniform(key, numbers) for key in self._keys])).to(device)

    def keep(self, rows_K: torch.Tensor) -> None:
        """Forget all rows but these."""
        self._greedy_B, self._kind_B = self._greedy_B[rows_K], self._kind_B[rows_K]
        self._scale_B1, self._top_p_B1 = self._scale_B1[rows_K], self._top_p_B1[rows_K]
        self._min_p_B1, self._top_k_B1 = self._min_p_B1[rows_K], self._top_k_B1[rows_K]
        self._uniforms_BT = self._uniforms_BT[rows_K]
        self._keys = [self._keys[row] for row in rows_K.tolist()]

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
        everywhere_B = torch.arange(len(logprobs_BV), device=logprobs_BV.device)
        if len(self._kinds) == 1:
            return self._drawn(self._kinds[0], logprobs_BV, everywhere_B, step)
        tokens_B = torch.empty_like(everywhere_B)
        for kind in self._kinds:
            rows_R = torch.nonzero(self._kind_B == kind)[:, 0]
            if len(rows_R):
                tokens_B[rows_R] = self._drawn(kind, logprobs_BV[rows_R], rows_R, step)
        return tokens_B

    def _drawn(self, kind: int, logprobs_RV: torch.Tensor, rows_R: torch.Tensor, step: int) -> torch.Tensor:
        """Tokens of the rows ``rows_R``, which are of one kind."""
        if kind == _NUCLEUS:
            return self._within_nucleus(logprobs_RV.exp(), rows_R, step)
        uniform_R1 = self._uniforms_BT[rows_R, step, None]
        if kind == _TOP_K:
            return self._within_top_k(logprobs_RV, uniform_R1, rows_R)
        return _invert(logprobs_RV.exp(), uniform_R1)

    def _within_nucleus(self, live_QV: torch.Tensor, rows_Q: torch.Tensor, step: int) -> torch.Tensor:
        """By rejection, without a sort (Ye et al. 2025, FlashInfer): a token outside the nucleus is drawn again, from
        those that come before it: the likelier ones, and of the equally likely those of smaller ids."""
        tokens_R = torch.empty_like(rows_Q)
        open_Q = torch.arange(len(rows_Q), device=rows_Q.device)
        id_V = torch.arange(live_QV.shape[1], device=rows_Q.device)
        uniform_Q1 = self._uniforms_BT[rows_Q, step, None]
        most_Q1, first_Q1 = live_QV.max(dim=-1, keepdim=True)
        top_p_Q1, least_Q1 = self._top_p_B1[rows_Q], self._min_p_B1[rows_Q] * most_Q1
        for again in itertools.count(1):
            token_Q1 = _invert(live_QV, uniform_Q1)[:, None]
            prob_Q1 = live_QV.gather(1, token_Q1)
            inside_Q = (_before(live_QV, token_Q1, prob_Q1, top_p_Q1) & (prob_Q1 >= least_Q1))[:, 0]
            # The likeliest always may be drawn; and what is no number has no end.
            inside_Q |= (token_Q1 == first_Q1)[:, 0] | ~torch.isfinite(least_Q1)[:, 0]
            tokens_R[open_Q[inside_Q]] = token_Q1[inside_Q, 0]
            if inside_Q.all():
                break
            open_Q, token_Q1, prob_Q1, live_QV = (one[~inside_Q] for one in (open_Q, token_Q1, prob_Q1, live_QV))
            top_p_Q1, least_Q1, first_Q1 = (one[~inside_Q] for one in (top_p_Q1, least_Q1, first_Q1))
            earlier_QV = (live_QV > prob_Q1) | ((live_QV == prob_Q1) & (id_V < token_Q1))
            live_QV = torch.where(earlier_QV, live_QV, 0.0)
            numbers = np.stack([_uniform(self._keys[row], 1, step + 1, again) for row in rows_Q[open_Q].tolist()])
            uniform_Q1 = torch.from_numpy(numbers).to(live_QV.device)
        return tokens_R

    def _within_top_k(self, logprobs_RV: torch.Tensor, uniform_R1: torch.Tensor, rows_R: torch.Tensor) -> torch.Tensor:
        """From among the likeliest, of which the top k are found; wider and wider, for the rows that need it."""
        tokens_R = torch.empty_like(rows_R)
        vocabulary = logprobs_RV.shape[1]
        widths = [width for width in TOP_K_WIDTHS if self._widest_top_k < width < vocabulary]
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


def _before(
    live_QV: torch.Tensor, token_Q1: torch.Tensor, prob_Q1: torch.Tensor, top_p_Q1: torch.Tensor
) -> torch.Tensor:
    """Whether the tokens that come before each row's token have less than ``top_p`` together: ``[Q, 1]``."""
    at_least_Q1 = torch.where(live_QV >= prob_Q1, live_QV, 0.0).sum(dim=-1, keepdim=True)
    before_Q1 = at_least_Q1 - prob_Q1 + _EDGE < top_p_Q1
    for row in torch.nonzero(~before_Q1[:, 0] & (top_p_Q1[:, 0] < 1.0))[:, 0].tolist():
        live_V, prob, token = live_QV[row], prob_Q1[row, 0], int(token_Q1[row, 0])
        mass = torch.where(live_V > prob, live_V, 0.0).sum(dtype=torch.float64)
        before_Q1[row] = mass + prob.double() * (live_V[:token] == prob).sum() < top_p_Q1[row, 0]
    return before_Q1 | (top_p_Q1 >= 1.0)


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
    """The column of each row at which the cumulative sum, in float64, passes the row's uniform number.

    A large vocabulary is first summed by blocks: a cumulative sum of all of it costs more than its softmax. A column of
    probability 0 is never drawn, however the sums round.
    """
    rows, vocabulary = probs_RV.shape
    if vocabulary <= 2 * _BLOCK:
        cumulative_RV = probs_RV.double().cumsum(dim=-1)
        return _first_above(cumulative_RV, uniform_R1 * cumulative_RV[:, -1:])
    probs_RGK = torch.nn.functional.pad(probs_RV, (0, -vocabulary % _BLOCK)).view(rows, -1, _BLOCK)
    mass_RG = probs_RGK.sum(dim=-1).double()
    ends_RG = mass_RG.cumsum(dim=-1)
    target_R1 = uniform_R1 * ends_RG[:, -1:]
    block_R = _first_above(ends_RG, target_R1)
    row_R = torch.arange(rows, device=probs_RV.device)
    start_R = ends_RG[row_R, block_R] - mass_RG[row_R, block_R]
    within_RK = probs_RGK[row_R, block_R].double().cumsum(dim=-1)
    inside_R = _first_above(within_RK, (target_R1 - start_R[:, None]).clamp_(min=0.0))
    return (block_R * _BLOCK + inside_R).clamp_(max=vocabulary - 1)


def _first_above(cumulative_RK: torch.Tensor, target_R1: torch.Tensor) -> torch.Tensor:
    """The first column of each row above its target; that where the row's last sum is reached, if none is.

    Some column where the sums are no numbers: its log-prob tells.
    """
    above_R1 = torch.searchsorted(cumulative_RK, target_R1, right=True)
    last_R1 = torch.searchsorted(cumulative_RK, cumulative_RK[:, -1:].contiguous())
    found_R1 = torch.minimum(above_R1, last_R1)
    return found_R1[:, 0].clamp_(max=cumulative_RK.shape[1] - 1)  # sums that are no numbers are above nothing


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
