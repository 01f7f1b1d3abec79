"""Keys and values of the positions that a batch has been through."""

from __future__ import annotations

from typing import Any

import torch

_GROWTH = 64
"""Least room, in positions, made when a buffer is full; long ones grow by half."""


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

    def keep(self, rows_K: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may be named several times."""
        for store in (self._keys, self._values):
            for layer, tensor in enumerate(store):
                assert tensor is not None
                chosen = tensor.new_zeros(len(rows_K), tensor.shape[1], self.length + _GROWTH, tensor.shape[3])
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
