"""Attention and norm modules for Megatron's layer specification where Transformer Engine is absent.

Shapes: T positions, B sequences, H query heads of this rank, G key-value heads of this rank, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class SDPAttention(torch.nn.Module):
    """Causal attention by ``scaled_dot_product_attention``: memory linear in the length, on a CPU and on a GPU.

    Takes the place of Megatron's ``DotProductAttention``, which holds all T x T scores. Sequences are padded on the
    right, so that the causal mask alone keeps padding out of every real position.
    """

    def __init__(self, config: Any, *, softmax_scale: float | None = None, **_unused: Any) -> None:
        super().__init__()
        assert config.context_parallel_size == 1, "context parallelism is not offered"
        self.scale = softmax_scale if softmax_scale is not None else config.kv_channels**-0.5

    def forward(
        self,
        query_TBHD: Tensor,
        key_TBGD: Tensor,
        value_TBGD: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """The context of each position, [T, B, H * D]."""
        assert attention_mask is None and attention_bias is None and packed_seq_params is None
        query_BHTD, key_BGTD, value_BGTD = (x.permute(1, 2, 0, 3) for x in (query_TBHD, key_TBGD, value_TBGD))
        context_BHTD = functional.scaled_dot_product_attention(
            query_BHTD,
            key_BGTD,
            value_BGTD,
            is_causal=True,
            scale=self.scale,
            enable_gqa=query_BHTD.shape[1] != key_BGTD.shape[1],
        )
        return context_BHTD.permute(2, 0, 1, 3).flatten(2)


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm by torch; marks its weight so that sequence parallelism sums its gradient over the tensor group."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_unused: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
