"""Batches of token sequences, and their division over data-parallel ranks and micro-batches.

A sequence is a prompt and a response; the losses are over the response's tokens. Shapes: S sequences of a batch, L
longest sequence, R longest response; of a micro-batch: B sequences, T input positions, N response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Sequences padded on the right, on the CPU; the same on every rank."""

    tokens_SL: Tensor
    """int64; what lies beyond ``lengths_S`` is never read."""
    prompt_lengths_S: Tensor
    """int64, each >= 1."""
    lengths_S: Tensor
    """int64: prompt and response."""
    forced_S2: Tensor | None = None
    """int64: slots [start, end) of the response that the policy did not write, no token of any loss; None: none."""

    def __post_init__(self) -> None:
        assert bool((self.prompt_lengths_S >= 1).all()) and bool((self.lengths_S > self.prompt_lengths_S).all())

    def __len__(self) -> int:
        return self.tokens_SL.shape[0]

    @property
    def mask_SR(self) -> Tensor:
        """Whether slot r of sequence s holds a response token of the policy; bool."""
        n_S = self.lengths_S - self.prompt_lengths_S
        slots_R = torch.arange(int(n_S.max()))
        return (slots_R[None, :] < n_S[:, None]) & ~_between(slots_R[None, :], self.forced_S2)

    @property
    def n_tokens(self) -> int:
        """Response tokens of the policy."""
        return int(self.mask_SR.sum())

    def select(self, rows: Sequence[int]) -> Batch:
        """Some of the sequences, in the order given."""
        index = torch.tensor(rows, dtype=torch.int64)
        return Batch(
            tokens_SL=self.tokens_SL[index],
            prompt_lengths_S=self.prompt_lengths_S[index],
            lengths_S=self.lengths_S[index],
            forced_S2=None if self.forced_S2 is None else self.forced_S2[index],
        )


def _between(slots: Tensor, bounds_S2: Tensor | None) -> Tensor:
    """Whether slots, [1, R] or [S, R], lie in the range of their row."""
    if bounds_S2 is None:
        return torch.zeros_like(slots, dtype=torch.bool)
    return (slots >= bounds_S2[:, :1]) & (slots < bounds_S2[:, 1:])


def collate(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    forced: Sequence[tuple[int, int] | None] | None = None,
) -> Batch:
    """A batch of (prompt, response) token ids; both must not be empty.

    ``forced``: of each response, the start and end of what the policy did not write.
    """
    lengths = [len(prompt) + len(response) for prompt, response in sequences]
    tokens_SL = torch.zeros(len(sequences), max(lengths), dtype=torch.int64)
    for row, (prompt, response) in enumerate(sequences):
        tokens_SL[row, : lengths[row]] = torch.tensor([*prompt, *response], dtype=torch.int64)
    return Batch(
        tokens_SL=tokens_SL,
        prompt_lengths_S=torch.tensor([len(prompt) for prompt, _ in sequences]),
        lengths_S=torch.tensor(lengths),
        forced_S2=torch.tensor([bounds or (0, 0) for bounds in forced]) if forced and any(forced) else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Sequences that go through the model together, on its device.

    ``positions_N`` picks, of the hidden states [T, B] flattened, those that predict response tokens; token n is slot
    ``slots_N[n]`` of the response of sequence ``rows_N[n]`` in this micro-batch, which is ``rows_B[rows_N[n]]`` of the
    batch. A data-parallel rank without a sequence gets one of padding, N = 0, so that every rank does the same steps.
    """

    tokens_BT: Tensor
    rows_B: Tensor
    positions_N: Tensor
    targets_N: Tensor
    rows_N: Tensor
    slots_N: Tensor
    n_slots: int
    """R of the responses in this micro-batch, >= 1."""

    def pick(self, values_SR: Tensor) -> Tensor:
        """The values [N] that a grid over the batch's sequences has for these tokens, on the tokens' device."""
        device = self.rows_N.device
        return values_SR.to(device)[self.rows_B.to(device)[self.rows_N], self.slots_N]

    def grid(self, values_N: Tensor) -> Tensor:
        """Values of tokens as [B, R], zero where there is no token; differentiable."""
        grid_BR = values_N.new_zeros(self.tokens_BT.shape[0], self.n_slots)
        return grid_BR.index_put((self.rows_N, self.slots_N), values_N)


def share(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """The sequences of each data-parallel rank: dealt by falling length, back and forth, so that the work is equal."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for turn, row in enumerate(order):
        lap, seat = divmod(turn, ranks)
        shares[seat if lap % 2 == 0 else ranks - 1 - seat].append(row)
    return shares


def pack(rows: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Micro-batches of rows by falling length, as few as fit: longest length x rows <= ``budget`` tokens.

    Raises ValueError when one sequence alone does not fit.
    """
    groups: list[list[int]] = []
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        if lengths[row] > budget:
            raise ValueError(
                f"trainer.micro_batch_tokens={budget}: a sequence of {lengths[row]} tokens does not fit; raise it"
            )
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= budget:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def micro_batches(
    batch: Batch, *, data_rank: int, data_size: int, budget: int, multiple: int, device: torch.device
) -> list[MicroBatch]:
    """This data-parallel rank's part of a batch; at least one micro-batch. T is a multiple of ``multiple``.

    Every data-parallel rank gets the same number of micro-batches, the last ones of padding where it has fewer.
    """
    lengths = [int(length) - 1 for length in batch.lengths_S]  # the last token is a target only
    shares = [pack(rows, lengths, budget) for rows in share(lengths, data_size)]
    mine = shares[data_rank]
    most = max(1, *(len(groups) for groups in shares))
    real = [_micro_batch(batch, rows, multiple, device) for rows in mine]
    return real + [_padding(multiple, device) for _ in range(most - len(real))]


def _micro_batch(batch: Batch, rows: list[int], multiple: int, device: torch.device) -> MicroBatch:
    rows_B = torch.tensor(rows, dtype=torch.int64)
    prompts_B, lengths_B = batch.prompt_lengths_S[rows_B], batch.lengths_S[rows_B]
    longest = int(lengths_B.max())
    width = -(-(longest - 1) // multiple) * multiple
    columns_T = torch.arange(width)
    tokens_BT = torch.zeros(len(rows), width, dtype=torch.int64)
    tokens_BT[:, : longest - 1] = batch.tokens_SL[rows_B, : longest - 1]
    tokens_BT *= columns_T[None, :] < lengths_B[:, None]
    # Input position t predicts token t + 1, so the response's first token is predicted at the prompt's last position.
    predicts_BT = (columns_T[None, :] >= prompts_B[:, None] - 1) & (columns_T[None, :] < lengths_B[:, None] - 1)
    forced_B2 = None if batch.forced_S2 is None else batch.forced_S2[rows_B]
    predicts_BT &= ~_between(columns_T[None, :] - (prompts_B[:, None] - 1), forced_B2)
    rows_N, columns_N = predicts_BT.nonzero(as_tuple=True)
    targets_N = batch.tokens_SL[rows_B[rows_N], columns_N + 1]
    return MicroBatch(
        tokens_BT=tokens_BT.to(device),
        rows_B=rows_B,
        positions_N=(columns_N * len(rows) + rows_N).to(device),
        targets_N=targets_N.to(device),
        rows_N=rows_N.to(device),
        slots_N=(columns_N - (prompts_B[rows_N] - 1)).to(device),
        n_slots=int((lengths_B - prompts_B).max()),
    )


def _padding(multiple: int, device: torch.device) -> MicroBatch:
    none = torch.zeros(0, dtype=torch.int64, device=device)
    return MicroBatch(
        tokens_BT=torch.zeros(1, multiple, dtype=torch.int64, device=device),
        rows_B=torch.zeros(0, dtype=torch.int64),
        positions_N=none,
        targets_N=none,
        rows_N=none,
        slots_N=none,
        n_slots=1,
    )
