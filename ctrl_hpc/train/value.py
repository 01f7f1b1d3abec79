"""PPO's value network: the critic's architecture with one number on top instead of a vocabulary.

Called ``value`` everywhere: the critic, here, is the language model that is trained.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ctrl_hpc.train.batch import Batch, MicroBatch
from ctrl_hpc.train.policy import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueHead:
    """The linear map from a hidden state to a value."""

    weight: Tensor
    """[1, D]."""

    def values(self, hidden_ND: Tensor) -> Tensor:
        """fp32 values [N]."""
        return (hidden_ND.float() @ self.weight.float().T)[:, 0]


class Value(Policy):
    """Starts from the critic's weights and the value 0 everywhere."""

    def _extend(self) -> None:
        """Put the value head on the last pipeline stage; an output layer of its own is not trained there."""
        if not self.world.last_stage:
            return
        head = torch.nn.Linear(self.architecture.hidden_size, 1, bias=False)
        torch.nn.init.zeros_(head.weight)
        self.model.value_head = head.to(device=self.world.device, dtype=self.world.dtype)
        if not self.architecture.tied:
            self.model.output_layer.weight.requires_grad_(False)

    def head(self) -> ValueHead:
        """The value head; on the last pipeline stage."""
        return ValueHead(weight=self.model.value_head.weight)

    def values(self, batch: Batch) -> Tensor:
        """The value before each response token is written, fp32 [S, R] on the CPU; on every rank."""

        def score(head: ValueHead, micro: MicroBatch, hidden_ND: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            values_N = head.values(hidden_ND)
            return values_N.sum(), {"values": micro.grid(values_N)}

        return self._score(batch, score, ["values"])[0]
