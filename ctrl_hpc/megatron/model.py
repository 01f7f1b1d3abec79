"""The critic as a Megatron-core GPTModel, with its attention and rotary embeddings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import util
from typing import Any

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from ctrl_hpc.config import ParallelConfig
from ctrl_hpc.megatron.architecture import Architecture, check_layout
from ctrl_hpc.megatron.parallel_state import World


class _Rotate(torch.autograd.Function):
    """Rotation of the pairs (x[i], x[i + D/2]) by the angle of their position; its gradient rotates back."""

    @staticmethod
    def forward(ctx: Any, x_TBHD: Tensor, angles_T11D: Tensor) -> Tensor:
        """Rotate by the angles."""
        half = angles_T11D[..., : x_TBHD.shape[-1] // 2]
        cos, sin = half.cos().to(x_TBHD.dtype), half.sin().to(x_TBHD.dtype)
        ctx.save_for_backward(cos, sin)
        return _rotate(x_TBHD, cos, sin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Rotate the gradient by the opposite angles."""
        cos, sin = ctx.saved_tensors
        return _rotate(gradients[0], cos, -sin), None


def _rotate(x_TBHD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out_TBHD = torch.empty_like(x_TBHD, memory_format=torch.contiguous_format)
    (a, b), (rotated_a, rotated_b) = x_TBHD.chunk(2, -1), out_TBHD.chunk(2, -1)
    torch.mul(a, cos, out=rotated_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=rotated_b).addcmul_(a, sin)
    return out_TBHD


def rotate(x_TBHD: Tensor, angles_T11D: Tensor, *, interleaved: bool = False, **_unused: Any) -> Tensor:
    """What Megatron calls for ``apply_rope_fusion``: rotary embedding over the whole head dimension."""
    assert not interleaved and angles_T11D.shape[-1] == x_TBHD.shape[-1]
    return _Rotate.apply(x_TBHD, angles_T11D)


def install() -> None:
    """Make this Megatron's fused rotary embedding unless Transformer Engine has one."""
    if rope_utils.fused_apply_rotary_pos_emb is None:
        rope_utils.fused_apply_rotary_pos_emb = rotate


class Rotary(torch.nn.Module):
    """Megatron's rotary embedding, where asked for at positions that are not 0, 1, 2, ..."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self.positions_T: Tensor | None = None

    def get_rotary_seq_len(self, *arguments: Any, **options: Any) -> int:
        """As the inner one's."""
        return self.inner.get_rotary_seq_len(*arguments, **options)

    def forward(self, length: int, **options: Any) -> Tensor:
        """Angles [T, 1, 1, D]."""
        if self.positions_T is None:
            return self.inner(length, **options)
        return self.inner(int(self.positions_T.max()) + 1, **options)[self.positions_T]


class SDPAttention(torch.nn.Module):
    """Causal attention by ``scaled_dot_product_attention``: memory linear in the length, on a CPU and on a GPU.

    Takes the place of Megatron's ``DotProductAttention``, which holds all T x T scores. Sequences are padded on the
    right, so that the causal mask alone keeps padding out of every real position.

    With an ``attention_mask``, which is ``MicroBatch.segments`` then, one row holds groups of sequences: a prefix, and
    behind it what continues it, each attending to the prefix and to itself.
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
        assert attention_bias is None and packed_seq_params is None
        if attention_mask is not None:
            rows = (query_TBHD[:, 0], key_TBGD[:, 0], value_TBGD[:, 0])
            return self._packed(*rows, attention_mask.tolist())[:, None].flatten(2)
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

    def _packed(
        self, query_THD: Tensor, key_TGD: Tensor, value_TGD: Tensor, segments: Sequence[Sequence[int]]
    ) -> Tensor:
        """The context [T, H, D] of groups that lie one behind the other; zero beyond the last."""
        contexts: list[Tensor] = []
        at = 0
        for prefix, *lengths in segments:
            q, k, v = (x[at : at + prefix] for x in (query_THD, key_TGD, value_TGD))
            contexts.append(self._attend(q[None], k[None], v[None], causal=True)[0])
            at += prefix
            own = [length for length in lengths if length]
            if not own:
                continue
            end = at + sum(own)
            q_KRHD, k_KRGD, v_KRGD = (
                pad_sequence(list(x[at:end].split(own)), batch_first=True) for x in (query_THD, key_TGD, value_TGD)
            )
            keys, values = (
                torch.cat([shared.expand(len(own), *shared.shape), x], 1) for shared, x in ((k, k_KRGD), (v, v_KRGD))
            )
            context_KRHD = self._attend(q_KRHD, keys, values, causal=False, prefix=prefix)
            contexts += [context_RHD[:length] for context_RHD, length in zip(context_KRHD, own, strict=True)]
            at = end
        contexts.append(torch.zeros_like(query_THD[at:]))
        return torch.cat(contexts)

    def _attend(
        self, query_BTHD: Tensor, key_BSGD: Tensor, value_BSGD: Tensor, *, causal: bool, prefix: int = 0
    ) -> Tensor:
        """The context [B, T, H, D]: position t attends to the first ``prefix`` + t + 1 keys."""
        n_queries, n_keys = query_BTHD.shape[1], key_BSGD.shape[1]
        repeats = query_BTHD.shape[2] // key_BSGD.shape[2]
        if not causal and query_BTHD.is_cuda and repeats > 1:
            # of CUDA's kernels with memory linear in the length, none takes a mask and fewer key heads at once
            key_BSGD, value_BSGD = (x.repeat_interleave(repeats, dim=2) for x in (key_BSGD, value_BSGD))
        mask = None
        if not causal:
            mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=query_BTHD.device).tril(prefix)
        context_BHTD = functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (query_BTHD, key_BSGD, value_BSGD)),
            attn_mask=mask,
            is_causal=causal,
            scale=self.scale,
            enable_gqa=query_BTHD.shape[2] != key_BSGD.shape[2],
        )
        return context_BHTD.transpose(1, 2)


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm by torch; marks its weight so that sequence parallelism sums its gradient over the tensor group."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)  # Megatron saves weights of one type
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed; it is used on a GPU wherever it is."""
    return util.find_spec("transformer_engine") is not None


def _transformer_config(architecture: Architecture, parallel: ParallelConfig, world: World) -> TransformerConfig:
    """Megatron's configuration of an architecture; no dropout, no bias but Qwen2's, no random initialisation.

    Raises ValueError when heads, layers or groups do not divide.
    """
    check_layout(architecture, parallel)
    on_gpu = world.device.type == "cuda"
    install()
    scale = architecture.rope_amplitude**2 * architecture.head_dim**-0.5
    recompute: Any = {
        "none": {},
        "selective": {"recompute_granularity": "selective"},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }[parallel.recompute]
    return TransformerConfig(
        num_layers=architecture.n_layers,
        hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.n_heads,
        num_query_groups=architecture.n_kv_heads,
        kv_channels=architecture.head_dim,
        ffn_hidden_size=architecture.mlp_size,
        softmax_scale=scale,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_eps,
        qk_layernorm=architecture.qk_norm,
        add_qkv_bias=architecture.qkv_bias,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=functional.silu,
        bias_activation_fusion=on_gpu,
        apply_rope_fusion=True,
        gradient_accumulation_fusion=on_gpu and util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=world.dtype,
        pipeline_dtype=world.dtype,
        bf16=world.dtype == torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        sequence_parallel=parallel.sequence,
        variable_seq_lengths=parallel.pipeline > 1,
        moe_token_dispatcher_type="alltoall",  # unused; the default refuses variable lengths
        perform_initialization=False,
        use_cpu_initialization=not on_gpu,
        calculate_per_token_loss=True,
        **recompute,
    )


def build(
    architecture: Architecture, parallel: ParallelConfig, world: World, *, adapted: bool = False, packed: bool = False
) -> GPTModel:
    """This rank's part of the critic, its weights not yet set (see ``weights.load``).

    ``adapted``: it is to have adapters, for which each linear layer must be a module of its own. ``packed``: it is to
    take micro-batches with ``segments``.
    """
    config = _transformer_config(architecture, parallel, world)
    model = GPTModel(
        config=config,
        transformer_layer_spec=_layer_spec(config, world, adapted=adapted, packed=packed),
        vocab_size=architecture.padded_vocab(parallel.tensor),
        max_sequence_length=architecture.max_positions,
        pre_process=world.first_stage,
        post_process=world.last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=architecture.tied,
        position_embedding_type="rope",
        rotary_base=10000,
    )
    frequencies = torch.tensor(architecture.inverse_frequencies, dtype=torch.float32, device=world.device)
    assert model.rotary_pos_emb.inv_freq.shape == frequencies.shape
    model.rotary_pos_emb.inv_freq = frequencies
    model.rotary_pos_emb = Rotary(model.rotary_pos_emb)
    return model.to(world.device)


def hidden_states(
    model: Any,
    tokens_BT: Tensor,
    select: Callable[[Tensor], Tensor],
    *,
    positions_T: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """Run the model (or this stage of it), on sequences that begin at position 0 or as a micro-batch is packed.

    On the last pipeline stage ``select`` takes the final hidden states [T, B, D], whole on every tensor-parallel rank,
    and returns those the loss needs, [N, D]. Elsewhere the stage's output goes to the next stage untouched. The
    gradient that flows back must be complete on every tensor-parallel rank: the loss kernels all-reduce it once.
    """

    def process(*, hidden_states: Tensor, config: Any, **_unused: Any) -> Tensor:
        if config.sequence_parallel:
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=False)
        return select(hidden_states)

    get_attr_wrapped_model(model, "rotary_pos_emb").positions_T = positions_T
    positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
    return model(tokens_BT, positions_BT, segments, output_processor=process)


def output_weight(model: GPTModel) -> Tensor:
    """This rank's rows [V, D] of the output layer: the embedding's, where the two are tied."""
    weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    return weight if weight is not None else model.output_layer.weight


def _layer_spec(config: TransformerConfig, world: World, *, adapted: bool, packed: bool) -> Any:
    if world.device.type == "cuda" and has_transformer_engine() and not adapted:
        fused = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
        if packed:
            fused.submodules.self_attention.submodules.core_attention = SDPAttention
        return fused
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.core_attention = SDPAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    n_local = config.num_layers // config.pipeline_model_parallel_size
    return TransformerBlockSubmodules(layer_specs=[layer] * n_local, layer_norm=RMSNorm)
