"""What a critic's network is: the sizes and variants of a Hugging Face folder that Megatron-core must reproduce."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ctrl_hpc.config import SHARE, ParallelConfig
from ctrl_hpc.rollout.kv_cache import FIXED_ROPES
from ctrl_hpc.rollout.weights import gguf_hint

HUGGINGFACE = "huggingface"
"""Sub-folder of a checkpoint with the critic's configuration and tokenizer."""
KNOWN = SHARE / "configs" / "models.json"
"""Configurations of well-known models by name, for plans where the model's folder is elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A decoder with pre-norm RMSNorm, rotary attention with grouped queries, and a SwiGLU MLP."""

    kind: str
    """``model_type`` of the Hugging Face configuration: a key of ``_FAMILIES``."""
    n_layers: int
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    mlp_size: int
    vocab_size: int
    """Rows of the embedding in the Hugging Face folder: the true vocabulary of the losses."""
    norm_eps: float
    tied: bool
    """Whether the output layer is the embedding."""
    qkv_bias: bool
    qk_norm: bool
    max_positions: int
    inverse_frequencies: tuple[float, ...]
    """Of the rotary embedding, scaling applied; ``head_dim / 2`` of them."""
    rope_amplitude: float
    """Scale of cosine and sine (YaRN), 1 elsewhere."""

    def padded_vocab(self, tensor: int) -> int:
        """Rows of the embedding in Megatron: a multiple of 64 for each tensor-parallel rank."""
        unit = 64 * tensor
        return -(-self.vocab_size // unit) * unit

    @property
    def n_parameters(self) -> int:
        """Parameters, vocabulary padding left out, a tied output layer counted once."""
        attention = self.hidden_size * self.head_dim * 2 * (self.n_heads + self.n_kv_heads)
        extras = 2 * self.hidden_size
        if self.qkv_bias:
            extras += self.head_dim * (self.n_heads + 2 * self.n_kv_heads)
        if self.qk_norm:
            extras += 2 * self.head_dim
        layer = attention + 3 * self.hidden_size * self.mlp_size + extras
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied else 2)
        return self.n_layers * layer + self.hidden_size + embeddings


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """What differs between the architectures and is not a number in the configuration."""

    qkv_bias: bool
    qk_norm: bool


_FAMILIES: dict[str, _Family] = {
    "qwen2": _Family(qkv_bias=True, qk_norm=False),
    "qwen3": _Family(qkv_bias=False, qk_norm=True),
    "llama": _Family(qkv_bias=False, qk_norm=False),
}


def read(folder: str | Path) -> Architecture:
    """The architecture of a Hugging Face folder.

    Raises ValueError when the folder or its configuration is missing, or asks for what is not supported.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder}: not a Hugging Face model folder (no config.json){gguf_hint(folder)}")
    try:
        kind = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error.msg} at line {error.lineno}") from None
    if kind not in _FAMILIES:
        raise ValueError(f"{path}: model_type {kind!r} is not supported; allowed: {', '.join(_FAMILIES)}")
    from transformers import AutoConfig

    return _describe(AutoConfig.from_pretrained(str(folder)), path)


def known(name: str) -> Architecture:
    """The architecture of a well-known model; errors as :func:`known_config`."""
    return _describe(known_config(name), KNOWN)


def known_config(name: str) -> Any:
    """transformers' configuration of a well-known model, by its name on the hub or the last part of its folder's path.

    Raises ValueError when the name is not in the table.
    """
    from transformers import AutoConfig

    table: dict[str, dict[str, Any]] = json.loads(KNOWN.read_text(encoding="utf-8"))
    short = re.sub(r"-(Coder|Instruct|Base)\b", "", Path(name).name)
    if short not in table:
        raise ValueError(f"{name}: neither a Hugging Face model folder (no config.json) nor one of {', '.join(table)}")
    return AutoConfig.for_model(**table[short])


def _describe(hf: Any, path: Path) -> Architecture:
    """What a Hugging Face configuration says; ``path`` is where it came from."""
    _refuse_unsupported(hf, path)
    n_heads = hf.num_attention_heads
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // n_heads
    inverse_frequencies, amplitude = _rope(hf, head_dim, path)
    family = _FAMILIES[hf.model_type]
    return Architecture(
        kind=hf.model_type,
        n_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        n_heads=n_heads,
        n_kv_heads=hf.num_key_value_heads or n_heads,
        head_dim=head_dim,
        mlp_size=hf.intermediate_size,
        vocab_size=hf.vocab_size,
        norm_eps=hf.rms_norm_eps,
        tied=bool(hf.tie_word_embeddings),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        max_positions=hf.max_position_embeddings,
        inverse_frequencies=inverse_frequencies,
        rope_amplitude=amplitude,
    )


def check_layout(architecture: Architecture, parallel: ParallelConfig) -> None:
    """Raise ValueError, in one line naming the key, unless heads, MLP and layers divide over the ranks."""
    divisions = {
        "parallel.tensor": (
            parallel.tensor,
            {"attention heads": architecture.n_heads, "MLP width": architecture.mlp_size},
        ),
        "parallel.pipeline": (parallel.pipeline, {"layers": architecture.n_layers}),
    }
    for key, (ranks, sizes) in divisions.items():
        for what, size in sizes.items():
            if size % ranks:
                raise ValueError(f"{key}={ranks} must divide the critic's {size} {what}")
    few, many = sorted((parallel.tensor, architecture.n_kv_heads))
    if many % few:
        raise ValueError(
            f"parallel.tensor={parallel.tensor} and the critic's {architecture.n_kv_heads} key-value heads: "
            "one must divide the other"
        )


def _refuse_unsupported(hf: Any, path: Path) -> None:
    unsupported = {
        "hidden_act": getattr(hf, "hidden_act", "silu") != "silu",
        "use_sliding_window": bool(getattr(hf, "use_sliding_window", False)),
        "attention_bias": hf.model_type != "qwen2" and bool(getattr(hf, "attention_bias", False)),
        "mlp_bias": bool(getattr(hf, "mlp_bias", False)),
        "attention_dropout": bool(getattr(hf, "attention_dropout", 0.0)),
    }
    for key, wrong in unsupported.items():
        if wrong:
            raise ValueError(f"{path}: {key}={getattr(hf, key)!r} is not supported for {hf.model_type}")


def _rope(hf: Any, head_dim: int, path: Path) -> tuple[tuple[float, ...], float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = hf.rope_parameters
    kind = parameters.get("rope_type", "default")
    if kind not in FIXED_ROPES:
        raise ValueError(f"{path}: rope_type {kind!r} is not supported; allowed: {', '.join(FIXED_ROPES)}")
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        frequencies, amplitude = 1.0 / (parameters["rope_theta"] ** exponents), 1.0
    else:
        frequencies, amplitude = ROPE_INIT_FUNCTIONS[kind](hf, torch.device("cpu"))
    return tuple(frequencies.tolist()), float(amplitude)
