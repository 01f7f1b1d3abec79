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
    segments: Tensor | None = None
    """int64 [G, 1 + K], on the CPU: of each group of a packed row (B of the tokens is 1) the input tokens of the prompt
    that its sequences share, then of each response; 0 where there is none. None: a sequence a row."""
    positions_T: Tensor | None = None
    """Where each token of a packed row stands in its own sequence."""

    def pick(self, values_SR: Tensor) -> Tensor:
        """The values [N] that a grid over the batch's sequences has for these tokens, on the tokens' device."""
        device = self.rows_N.device
        return values_SR.to(device)[self.rows_B.to(device)[self.rows_N], self.slots_N]

    def grid(self, values_N: Tensor) -> Tensor:
        """Values of tokens as [B, R], zero where there is no token; differentiable."""
        grid_BR = values_N.new_zeros(max(1, len(self.rows_B)), self.n_slots)
        return grid_BR.index_put((self.rows_N, self.slots_N), values_N)


def share(lengths: Sequence[int], ranks: int) -> list[list[int]]:
    """The sequences of each data-parallel rank: dealt by falling length, back and forth, so that the work is equal."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    shares: list[list[int]] = [[] for _ in range(ranks)]
    for turn, row in enumerate(order):
        lap, seat = divmod(turn, ranks)
        shares[seat if lap % 2 == 0 else ranks - 1 - seat].append(row)
    return shares


def _too_long(budget: int, length: int) -> str:
    return f"trainer.micro_batch_tokens={budget}: a sequence of {length} tokens does not fit; raise it"


def pack(rows: Sequence[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Micro-batches of rows by falling length, as few as fit: longest length x rows <= ``budget`` tokens.

    Raises ValueError when one sequence alone does not fit.
    """
    groups: list[list[int]] = []
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        if lengths[row] > budget:
            raise ValueError(_too_long(budget, lengths[row]))
        if groups and lengths[groups[-1][0]] * (len(groups[-1]) + 1) <= budget:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def groups(batch: Batch, budget: int, most: int) -> list[list[int]]:
    """Rows that share their prompt, in the order of the batch; at most ``most``, and ``budget`` tokens, in a group."""
    open_groups: dict[tuple[int, ...], list[int]] = {}
    sizes: dict[tuple[int, ...], int] = {}
    out: list[list[int]] = []
    for row, (n_prompt, n) in enumerate(zip(batch.prompt_lengths_S.tolist(), batch.lengths_S.tolist(), strict=True)):
        prompt = tuple(batch.tokens_SL[row, :n_prompt].tolist())
        more = n - 1 - n_prompt
        group = open_groups.get(prompt)
        if group is not None and len(group) < most and sizes[prompt] + more <= budget:
            group.append(row)
            sizes[prompt] += more
        else:
            open_groups[prompt], sizes[prompt] = [row], n - 1
            out.append(open_groups[prompt])
    return out


def packed_micro_batches(
    batch: Batch, *, data_rank: int, data_size: int, budget: int, multiple: int, device: torch.device
) -> list[MicroBatch]:
    """As :func:`micro_batches`, of one row each, in which every prompt that responses share stands once.

    A row has at most ``budget`` tokens. Where no prompt is shared, it is :func:`micro_batches`.
    """
    arguments = {"data_rank": data_rank, "data_size": data_size, "budget": budget, "multiple": multiple}
    found = groups(batch, budget, -(-len(batch) // data_size))
    if len(found) == len(batch):
        return micro_batches(batch, device=device, **arguments)
    inputs = batch.lengths_S - 1
    sizes = [
        int(batch.prompt_lengths_S[rows[0]] + (inputs - batch.prompt_lengths_S)[torch.tensor(rows)].sum())
        for rows in found
    ]
    shares = [_fill(places, sizes, budget) for places in share(sizes, data_size)]
    most = max(1, *(len(rows) for rows in shares))
    real = [_packed(batch, [found[place] for place in places], multiple, device) for places in shares[data_rank]]
    return real + [_padding(multiple, device) for _ in range(most - len(real))]


def _fill(places: Sequence[int], sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Rows of groups, each into the first row with room, by falling size; ValueError when one alone does not fit."""
    rows: list[list[int]] = []
    left: list[int] = []
    for place in sorted(places, key=lambda place: (-sizes[place], place)):
        if sizes[place] > budget:
            raise ValueError(_too_long(budget, sizes[place]))
        at = next((at for at, room in enumerate(left) if sizes[place] <= room), len(rows))
        if at == len(rows):
            rows.append([])
            left.append(budget)
        rows[at].append(place)
        left[at] -= sizes[place]
    return rows


def _packed(batch: Batch, found: list[list[int]], multiple: int, device: torch.device) -> MicroBatch:
    """One row: of each group the prompt, then the inputs of each response; the prompt's end predicts the first ones."""
    tokens: list[Tensor] = []
    positions: list[Tensor] = []
    columns: list[Tensor] = []
    rows_B = torch.tensor([row for rows in found for row in rows])
    mask_SR = batch.mask_SR
    segments = torch.zeros(len(found), 1 + max(map(len, found)), dtype=torch.int64)
    at = 0
    for number, rows in enumerate(found):
        n_prompt = int(batch.prompt_lengths_S[rows[0]])
        tokens.append(batch.tokens_SL[rows[0], :n_prompt])
        positions.append(torch.arange(n_prompt))
        segments[number, 0] = n_prompt
        end_of_prompt = at + n_prompt - 1
        at += n_prompt
        for place, row in enumerate(rows):
            n = int(batch.lengths_S[row])
            tokens.append(batch.tokens_SL[row, n_prompt : n - 1])
            positions.append(torch.arange(n_prompt, n - 1))
            own = torch.arange(at - 1, at + n - 1 - n_prompt)
            own[0] = end_of_prompt
            columns.append(own)
            segments[number, 1 + place] = n - 1 - n_prompt
            at += n - 1 - n_prompt
    slots = [mask_SR[row, : len(own)].nonzero()[:, 0] for row, own in zip(rows_B.tolist(), columns, strict=True)]
    counts = torch.tensor([len(found) for found in slots])
    starts = batch.prompt_lengths_S[rows_B].repeat_interleave(counts)
    rows_N, slots_N = torch.arange(len(rows_B)).repeat_interleave(counts), torch.cat(slots)
    padding = -at % multiple
    nothing = torch.zeros(padding, dtype=torch.int64)
    return MicroBatch(
        tokens_BT=torch.cat([*tokens, nothing])[None].to(device),
        rows_B=rows_B,
        positions_N=torch.cat([own[kept] for own, kept in zip(columns, slots, strict=True)]).to(device),
        targets_N=batch.tokens_SL[rows_B[rows_N], starts + slots_N].to(device),
        rows_N=rows_N.to(device),
        slots_N=slots_N.to(device),
        n_slots=max(len(own) for own in columns),
        segments=segments,
        positions_T=torch.cat([*positions, nothing]).to(device),
    )


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
