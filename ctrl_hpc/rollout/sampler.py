"""One sampling step for a batch of requests, each with its own temperature, nucleus and stream of random numbers.

Shapes: B requests (rows), V vocabulary, T steps.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence

import numpy as np
import torch

from ctrl_hpc.records import Sampling


def uniforms(seeds: Sequence[int | None], steps: int) -> torch.Tensor:
    """``[B, T]`` float64 numbers in [0, 1): row b is a Philox stream keyed by seed b, whatever the other rows."""
    out_BT = np.empty((len(seeds), steps))
    for row, seed in enumerate(seeds):
        key = secrets.randbits(62) if seed is None else seed
        out_BT[row] = np.random.Generator(np.random.Philox(key=key)).random(steps)
    return torch.from_numpy(out_BT)


class Sampler:
    """Draws the next token of every row of a batch by inverting the cumulative distribution.

    Log-probabilities are those of the softmax at the row's temperature before the nucleus cut (at temperature 1 for
    greedy rows): what a trainer recomputes from the logits.
    """

    def __init__(self, sampling: Sequence[Sampling], device: torch.device) -> None:
        steps = max(item.max_tokens for item in sampling)
        greedy = [item.temperature == 0.0 for item in sampling]
        self._greedy_B = torch.tensor(greedy, device=device)
        self._all_greedy, self._none_greedy = all(greedy), not any(greedy)
        scale = [1.0 if item.temperature == 0.0 else 1.0 / item.temperature for item in sampling]
        self._scale_B1 = torch.tensor(scale, dtype=torch.float32, device=device)[:, None]
        self._top_p_B1 = torch.tensor([item.top_p for item in sampling], dtype=torch.float64, device=device)[:, None]
        self._nucleus = any(item.top_p < 1.0 for item in sampling)
        seeds = [0 if item.temperature == 0.0 else item.seed for item in sampling]
        self._uniforms_BT = uniforms(seeds, 1 if self._all_greedy else steps).to(device)

    def keep(self, rows_K: torch.Tensor) -> None:
        """Forget all rows but these."""
        self._greedy_B = self._greedy_B[rows_K]
        self._scale_B1, self._top_p_B1 = self._scale_B1[rows_K], self._top_p_B1[rows_K]
        self._uniforms_BT = self._uniforms_BT[rows_K]

    def draw(self, logits_BV: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """``(tokens [B], logprobs [B])`` of step ``step``, counted from 0."""
        logprobs_BV = torch.log_softmax(logits_BV.float() * self._scale_B1, dim=-1)
        if self._all_greedy:
            tokens_B = logits_BV.argmax(dim=-1)
        else:
            tokens_B = self._invert(logprobs_BV, step)
            if not self._none_greedy:
                tokens_B = torch.where(self._greedy_B, logits_BV.argmax(dim=-1), tokens_B)
        return tokens_B, logprobs_BV.gather(1, tokens_B[:, None])[:, 0]

    def _invert(self, logprobs_BV: torch.Tensor, step: int) -> torch.Tensor:
        probs_BV = logprobs_BV.exp().double()
        if self._nucleus:
            sorted_BV, order_BV = probs_BV.sort(dim=-1, descending=True, stable=True)
            above_BV = sorted_BV.cumsum(dim=-1) - sorted_BV  # mass of the strictly likelier tokens
            kept_BV = torch.where(above_BV < self._top_p_B1, sorted_BV, 0.0)
            probs_BV = torch.zeros_like(probs_BV).scatter_(1, order_BV, kept_BV)
        cumulative_BV = probs_BV.cumsum(dim=-1)
        target_B1 = self._uniforms_BT[:, step : step + 1] * cumulative_BV[:, -1:]
        tokens_B = torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0]
        return tokens_B.clamp_(max=probs_BV.shape[1] - 1)
