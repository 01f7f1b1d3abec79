"""Prompts of a batch before decoding: what they begin with in common is computed once, as SGLang's prefix tree does."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ctrl_hpc.rollout.kv_cache import KVCache

_MOST = 64
"""Prompts of a group at most: their rests are one batch."""
_FORWARD = 32
"""Tokens that a forward pass of its own is worth: the weights are read again."""


@dataclass(frozen=True, slots=True)
class Group:
    """Prompts with a common beginning."""

    members: tuple[int, ...]
    """By their numbers."""
    prefix: int
    """Tokens of the beginning, fewer than any of them has; 0: computed apart."""


def common(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens at the beginning of both, the last of either left out."""
    most = min(len(first), len(second)) - 1
    return next((at for at in range(most) if first[at] != second[at]), max(0, most))


def groups(prompts: Sequence[Sequence[int]]) -> list[Group]:
    """The division of distinct prompts that costs the fewest tokens, padding of the rests included.

    Of groups of neighbours in lexicographic order, by dynamic programming.
    """
    order = sorted(range(len(prompts)), key=lambda number: tuple(prompts[number]))
    shared = [common(prompts[one], prompts[other]) for one, other in itertools.pairwise(order)]
    costs, begins = [0] + [0] * len(order), [0] * (len(order) + 1)
    for end in range(1, len(order) + 1):
        longest = len(prompts[order[end - 1]])
        costs[end], begins[end] = costs[end - 1] + longest + _FORWARD, end - 1
        prefix = longest
        for begin in range(end - 2, max(-1, end - 1 - _MOST), -1):
            prefix, longest = min(prefix, shared[begin]), max(longest, len(prompts[order[begin]]))
            if prefix == 0:
                break
            cost = costs[begin] + prefix + (end - begin) * (longest - prefix) + 2 * _FORWARD
            if cost < costs[end]:
                costs[end], begins[end] = cost, begin
    found, end = [], len(order)
    while end:
        begin = begins[end]
        prefix = min(shared[begin : end - 1], default=0)
        found.append(Group(members=tuple(order[begin:end]), prefix=prefix))
        end = begin
    return found[::-1]


Forward = Callable[[KVCache, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Of new token ids ``[B, Q]``, their positions ``[B, Q]``, and which of the S positions of the cache and their own each
may see ``[B, Q, S]``: what the logits at the last of them are made of, ``[B, ...]``. It adds them to the cache."""


def padded(
    forward: Forward, layers: int, prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[KVCache, torch.Tensor, torch.Tensor]:
    """The cache of all prompts as one left-padded batch, what the logits after each are made of, and which columns of
    the cache are a prompt's: ``[B, P]``."""
    cache = KVCache(layers)
    return cache, forward(cache, *_block(prompts, 0, device)), _real(prompts, max(map(len, prompts)), device)


def apart(
    forward: Forward, layers: int, prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[KVCache, torch.Tensor, torch.Tensor]:
    """The same of distinct prompts, group after group: common beginnings once, and no padding between groups.

    For a model that a single prompt keeps busy.
    """
    found = groups(prompts)
    ends = [max(len(prompts[member]) for member in group.members) for group in found]
    cache, real_BP = KVCache(layers), torch.zeros(len(prompts), max(ends), dtype=torch.bool, device=device)
    last: list[torch.Tensor] = []
    for group, end in zip(found, ends, strict=True):
        one, rows_M = KVCache(layers), torch.tensor(group.members, device=device)
        if group.prefix:
            forward(one, *_block([prompts[group.members[0]][: group.prefix]], 0, device))
            one.keep(torch.zeros_like(rows_M))
        rests = [prompts[member][group.prefix :] for member in group.members]
        last.append(forward(one, *_block(rests, group.prefix, device)))
        cache.place(one, rows_M, len(prompts), max(ends))
        real_BP[rows_M, -end:] = torch.cat(
            [real_BP.new_ones(len(rests), group.prefix), _real(rests, end - group.prefix, device)], dim=1
        )
    order_B = torch.tensor([member for group in found for member in group.members], device=device).argsort()
    return cache, torch.cat(last)[order_B], real_BP


def _real(texts: Sequence[Sequence[int]], width: int, device: torch.device) -> torch.Tensor:
    pad_M = torch.tensor([width - len(text) for text in texts], device=device)
    return torch.arange(width, device=device) >= pad_M[:, None]


def _block(
    texts: Sequence[Sequence[int]], before: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids ``[M, S]``, left-padded, their positions, and what they may see, after so many that all have."""
    width = max(map(len, texts))
    ids_MS = torch.tensor([[0] * (width - len(text)) + list(text) for text in texts], device=device)
    real_MS, column_S = _real(texts, width, device), torch.arange(width, device=device)
    positions_MS = before + (real_MS.cumsum(dim=1) - 1).clamp_(min=0)
    allowed_MSS = real_MS[:, None, :] & (column_S[None, :, None] >= column_S)
    seen_MSB = allowed_MSS.new_ones(len(texts), width, before)
    return ids_MS, positions_MS, torch.cat([seen_MSB, allowed_MSS], dim=2)
