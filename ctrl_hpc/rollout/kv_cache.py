"""Keys and values of the positions that a batch has been through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_GROWTH = 64
"""Least room, in positions, made when a buffer is full; long ones grow by half."""
FILLS_A_CPU = 50_000_000
"""Numbers of a model that one prompt keeps a CPU busy with: what was computed is remembered then."""
FIXED_ROPES = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on the length of the sequence: with others, what was computed of a
beginning is not what the whole computes of it."""
REMEMBERED_BATCHES = 2
"""Largest batches whose rows are remembered: requests that belong together may be more than one."""


class KVCache:
    """What transformers' attention layers need of a cache: ``update``; plus ``keep`` and ``place`` for the batch."""

    def __init__(self, layers: int) -> None:
        self.length = 0
        """Positions filled in every row."""
        self._keys: list[torch.Tensor | None] = [None] * layers
        self._values: list[torch.Tensor | None] = [None] * layers

    def update(
        self, keys_BHSK: torch.Tensor, values_BHSK: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append new positions of a layer and return all of its keys and values; ``advance`` ends the step."""
        end = self.length + keys_BHSK.shape[2]
        all_keys = self._store(self._keys, keys_BHSK, layer, end)
        all_values = self._store(self._values, values_BHSK, layer, end)
        return all_keys, all_values

    def _store(self, store: list[torch.Tensor | None], new_BHSK: torch.Tensor, layer: int, end: int) -> torch.Tensor:
        old = store[layer]
        if old is None:
            store[layer] = new_BHSK
            return new_BHSK
        if end > old.shape[2]:
            grown = old.new_zeros(old.shape[0], old.shape[1], end + max(_GROWTH, end // 2), old.shape[3])
            grown[:, :, : self.length] = old[:, :, : self.length]
            store[layer] = old = grown
        old[:, :, self.length : end] = new_BHSK
        return old[:, :, :end]

    def advance(self, positions: int) -> None:
        """Every layer has appended this many positions."""
        self.length += positions

    def get_seq_length(self, *_: Any) -> int:
        """Positions filled (transformers' name)."""
        return self.length

    def keep(self, rows_K: torch.Tensor, room: int = _GROWTH) -> None:
        """Keep these rows, in this order; a row may be named several times. There is room for more positions then."""
        for store in (self._keys, self._values):
            for layer, tensor in enumerate(store):
                assert tensor is not None
                chosen = tensor.new_zeros(len(rows_K), tensor.shape[1], self.length + room, tensor.shape[3])
                chosen[:, :, : self.length] = tensor[rows_K, :, : self.length]
                store[layer] = chosen

    def place(self, other: KVCache, rows_M: torch.Tensor, rows: int, length: int) -> None:
        """Take over the rows of another as these of ``rows``, filled to ``length``: theirs end where all end."""
        begin = length - other.length
        for mine, theirs in ((self._keys, other._keys), (self._values, other._values)):
            for layer, tensor in enumerate(theirs):
                assert tensor is not None and begin >= 0
                whole = mine[layer]
                if whole is None:
                    whole = tensor.new_zeros(rows, tensor.shape[1], length + _GROWTH, tensor.shape[3])
                    mine[layer] = whole
                whole[rows_M, :, begin:length] = tensor[:, :, : other.length]
        self.length = length

    def row(self, row: int, columns_N: torch.Tensor) -> KVCache:
        """A copy of these columns of one row, as a cache of its own."""
        one = KVCache(len(self._keys))
        for mine, new in ((self._keys, one._keys), (self._values, one._values)):
            new[:] = [None if tensor is None else tensor[row, None][:, :, columns_N] for tensor in mine]
        one.length = len(columns_N)
        return one


class Recent:
    """Caches of rows that were decoded last, by their tokens: a text that goes on from there is not computed again."""

    def __init__(self, most_tokens: int) -> None:
        """Of so many tokens together at most, the oldest forgotten first."""
        self.most_tokens = most_tokens
        self._rows: dict[tuple[int, ...], KVCache] = {}

    def note(self, tokens: Sequence[int], cache: KVCache) -> None:
        """Remember the cache of these tokens."""
        self._rows.pop(tuple(tokens), None)
        self._rows[tuple(tokens)] = cache
        room = self.most_tokens - sum(map(len, self._rows))
        while room < 0:
            room += len(oldest := next(iter(self._rows)))
            del self._rows[oldest]

    def longest(self, prompt: Sequence[int]) -> KVCache | None:
        """That of the most tokens with which the prompt begins, and which are not all of it."""
        whole = tuple(prompt)
        for length in sorted({len(tokens) for tokens in self._rows if len(tokens) < len(whole)}, reverse=True):
            if (found := self._rows.get(whole[:length])) is not None:
                return found
        return None
