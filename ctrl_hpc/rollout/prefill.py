"""Prompts of a batch before decoding: what they begin with in common is computed once, as SGLang's prefix tree does."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ctrl_hpc.rollout.kv_cache import KVCache, Recent

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
    cache, real_BP = KVCache(layers), _real(prompts, max(map(len, prompts)), device)
    nothing_BX = real_BP.new_zeros(len(prompts), 0)
    return cache, forward(cache, *_block(prompts, nothing_BX, device)), real_BP


def apart(
    forward: Forward, layers: int, prompts: Sequence[Sequence[int]], device: torch.device, recent: Recent
) -> tuple[KVCache, torch.Tensor, torch.Tensor]:
    """The same of distinct prompts, group after group: common beginnings once, and no padding between groups; those
    that go on from a ``recent`` row first, together.

    For a model that a single prompt keeps busy.
    """
    known = {number: found for number, prompt in enumerate(prompts) if (found := recent.longest(prompt)) is not None}
    fresh = [number for number in range(len(prompts)) if number not in known]
    width = max(map(len, prompts))
    if known:
        rest = max(len(prompts[number]) - found.length for number, found in known.items())
        width = max(width, rest + max(found.length for found in known.values()))

    def parts() -> Iterator[tuple[list[int], tuple[KVCache, torch.Tensor, torch.Tensor]]]:
        if known:
            texts = [prompts[number] for number in known]
            yield list(known), _going_on(forward, layers, texts, list(known.values()), device)
        for group in groups([prompts[number] for number in fresh]):
            members = [fresh[member] for member in group.members]
            texts = [prompts[number] for number in members]
            yield members, _together(forward, layers, texts, group.prefix, device)

    cache, real_BP = KVCache(layers), torch.zeros(len(prompts), width, dtype=torch.bool, device=device)
    order: list[int] = []
    last: list[torch.Tensor] = []
    for numbers, (one, last_M, real_MP) in parts():
        rows_M = torch.tensor(numbers, device=device)
        cache.place(one, rows_M, len(prompts), width)  # part by part: keys and values are hardly held twice
        real_BP[rows_M, -one.length :] = real_MP
        order += numbers
        last.append(last_M)
    return cache, torch.cat(last)[torch.tensor(order, device=device).argsort()], real_BP


def _together(
    forward: Forward, layers: int, prompts: Sequence[Sequence[int]], prefix: int, device: torch.device
) -> tuple[KVCache, torch.Tensor, torch.Tensor]:
    """As :func:`padded`, of prompts with so many tokens in common."""
    one, rests = KVCache(layers), [prompt[prefix:] for prompt in prompts]
    prefix_MX = torch.ones(len(prompts), prefix, dtype=torch.bool, device=device)
    if prefix:
        forward(one, *_block([prompts[0][:prefix]], prefix_MX[:1, :0], device))
        one.keep(torch.zeros(len(prompts), dtype=torch.long, device=device), room=max(map(len, rests)))
    last_M = forward(one, *_block(rests, prefix_MX, device))
    return one, last_M, torch.cat([prefix_MX, _real(rests, one.length - prefix, device)], dim=1)


def _going_on(
    forward: Forward, layers: int, prompts: Sequence[Sequence[int]], known: Sequence[KVCache], device: torch.device
) -> tuple[KVCache, torch.Tensor, torch.Tensor]:
    """As :func:`padded`, of prompts whose beginnings have been computed."""
    one, width = KVCache(layers), max(found.length for found in known)
    for row, found in enumerate(known):
        one.place(found, torch.tensor([row], device=device), len(known), width)
    begun_MX = _real([range(found.length) for found in known], width, device)
    rests = [prompt[found.length :] for prompt, found in zip(prompts, known, strict=True)]
    last_M = forward(one, *_block(rests, begun_MX, device))
    return one, last_M, torch.cat([begun_MX, _real(rests, one.length - width, device)], dim=1)


def _real(texts: Sequence[Sequence[int]], width: int, device: torch.device) -> torch.Tensor:
    pad_M = torch.tensor([width - len(text) for text in texts], device=device)
    return torch.arange(width, device=device) >= pad_M[:, None]


def _block(
    texts: Sequence[Sequence[int]], begun_MX: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids ``[M, S]``, left-padded, their positions, and what they may see ``[M, S, X + S]``, where of X columns
    of the cache those are each text's beginning."""
    width = max(map(len, texts))
    ids_MS = torch.tensor([[0] * (width - len(text)) + list(text) for text in texts], device=device)
    real_MS, column_S = _real(texts, width, device), torch.arange(width, device=device)
    positions_MS = begun_MX.sum(dim=1, keepdim=True) + (real_MS.cumsum(dim=1) - 1).clamp_(min=0)
    allowed_MSS = real_MS[:, None, :] & (column_S[None, :, None] >= column_S)
    seen_MSX = begun_MX[:, None, :].expand(-1, width, -1)
    return ids_MS, positions_MS, torch.cat([seen_MSX, allowed_MSS], dim=2)
