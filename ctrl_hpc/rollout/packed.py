"""Weights laid out once for the processor, and logits in float32.

torch's linear layers hand oneDNN the weights as they are stored, which it lays out anew for its matrix instructions in
every call: at a token a row that costs up to as much as the product. Packed weights are held twice.
"""

from __future__ import annotations

from typing import Any

import torch

_PLAIN_HEADS = frozenset({"qwen2", "qwen3", "llama", "mistral"})
"""Architectures whose logits are the last hidden state times the output embedding, and nothing else."""
_ROWS = 32
"""Tokens of a step for which a layout is chosen; others are right, too."""


def can_pack(model: Any) -> bool:
    """Whether packing pays: a model in bfloat16 on a CPU, with oneDNN. One in float32 stays as it is, to the bit."""
    weight = next(model.parameters())
    ops = torch.ops.mkldnn
    known = hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and known
    )


class PackedLinears:
    """The linear layers of a model but its head, computed with packed weights."""

    def __init__(self, model: Any) -> None:
        self._layers = [module for module in model.base_model.modules() if type(module) is torch.nn.Linear]
        self._packed: list[torch.Tensor] = []
        self.update()
        for number, layer in enumerate(self._layers):
            layer.forward = self._forward(number, layer)

    def update(self) -> None:
        """After a change of the weights: pack them anew."""
        self._packed[:] = [pack(layer.weight.detach()) for layer in self._layers]

    def _forward(self, number: int, layer: torch.nn.Linear) -> Any:
        def forward(x: torch.Tensor) -> torch.Tensor:
            return apply(x, self._packed[number], layer.bias)

        return forward


class FloatHead:
    """The output embedding in float32 for a model of fewer bits: logits as a trainer computes them."""

    def __init__(self, model: Any, *, packed: bool) -> None:
        self._model, self._is_packed = model, packed
        self.update()

    def update(self) -> None:
        """After a change of the weights."""
        head_VD = self._model.get_output_embeddings().weight.detach().float()
        self._weight = pack(head_VD) if self._is_packed else head_VD

    def __call__(self, hidden_ND: torch.Tensor) -> torch.Tensor:
        """Logits ``[N, V]`` in float32."""
        hidden_ND = hidden_ND.float()
        return apply(hidden_ND, self._weight, None) if self._is_packed else hidden_ND @ self._weight.T


def float_head(model: Any, *, packed: bool) -> FloatHead | None:
    """None where the model computes in float32 itself, or its logits are more than a product."""
    if model.dtype == torch.float32 or model.config.model_type not in _PLAIN_HEADS:
        return None
    return FloatHead(model, packed=packed)


def pack(weight_NK: torch.Tensor) -> torch.Tensor:
    """A weight as oneDNN lays it out, only for :func:`apply`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_NK, _ROWS)


def apply(x: torch.Tensor, packed: torch.Tensor, bias_N: torch.Tensor | None) -> torch.Tensor:
    """``x @ weight.T + bias`` of a packed weight."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias_N, "none", [], "")
