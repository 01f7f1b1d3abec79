"""How much memory a rank of the trainer needs, by kind, from the architecture and the layout alone.

Counted as the modules of this package allocate it: Megatron's local layers with ``SDPAttention``, or Transformer
Engine's. What a process holds before a model is built (imports, CUDA context, NCCL) is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from ctrl_kernels import reference
from ctrl_kernels.projection import WORKSPACE_MB

from ctrl_hpc.config import LoraConfig, ParallelConfig
from ctrl_hpc.megatron.architecture import Architecture

FP32 = 4
_LOSS_WORKSPACE_BYTES = WORKSPACE_MB << 20
"""Of the fused output layer on a GPU, beyond its results, at most (a fortieth of a smaller card)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on the fullest rank."""

    weights: int
    reference: int
    """The frozen reference critic, where it is a copy."""
    value: int
    """PPO's value network: its weights, gradients and optimizer."""
    gradients: int
    """Megatron's fp32 main gradients."""
    optimizer: int
    """Adam's two moments, and fp32 master weights beside bf16 ones."""
    activations: int
    """Kept for the backward pass of the largest micro-batch, for every micro-batch in flight in the pipeline."""
    transient: int
    """What the backward pass of one layer, the embedding's gradient or the optimizer step need at their time beyond
    what ``loss``, and for the last two also ``activations``, have given back."""
    loss: int
    """Logits and gradients in the fused output layer: hidden states and their gradient, a chunk of logits, and on a CPU
    the weight in float32 and its gradient."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))


def parameters_of_rank(architecture: Architecture, parallel: ParallelConfig, stage: int) -> int:
    """Parameters that a rank of pipeline stage ``stage`` holds, vocabulary padding included."""
    a, t = architecture, parallel.tensor
    queries, keys = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
    qkv = (queries + 2 * keys) // t
    layer = qkv * a.hidden_size + queries // t * a.hidden_size + 3 * a.hidden_size * a.mlp_size // t
    layer += 2 * a.hidden_size + (qkv if a.qkv_bias else 0) + (2 * a.head_dim if a.qk_norm else 0)
    total = a.n_layers // parallel.pipeline * layer
    vocabulary = a.padded_vocab(t) // t * a.hidden_size
    last = stage == parallel.pipeline - 1
    if stage == 0:
        total += vocabulary
    if last:
        total += a.hidden_size
        if not (a.tied and stage == 0):
            total += vocabulary
    return total


def adapter_parameters_of_rank(architecture: Architecture, parallel: ParallelConfig, lora: LoraConfig) -> int:
    """Parameters of the adapters that a rank of any pipeline stage holds; 0 without."""
    a, t = architecture, parallel.tensor
    queries, keys = a.n_heads * a.head_dim, a.n_kv_heads * a.head_dim
    fused = {  # inputs and outputs of a rank, and what is fused in them
        ("q_proj", "k_proj", "v_proj"): (a.hidden_size, (queries + 2 * keys) // t),
        ("o_proj",): (queries // t, a.hidden_size),
        ("gate_proj", "up_proj"): (a.hidden_size, 2 * a.mlp_size // t),
        ("down_proj",): (a.mlp_size // t, a.hidden_size),
    }
    layer = 0
    for modules, (inputs, outputs) in fused.items():
        n = sum(module in lora.targets for module in modules)
        layer += lora.rank * (n * inputs + (outputs if n else 0))
    return a.n_layers // parallel.pipeline * layer


def _layer_activations(architecture: Architecture, parallel: ParallelConfig, width: int, *, fused: bool) -> int:
    """Bytes a token that one layer keeps for its backward pass; ``width`` bytes an element.

    ``fused``: norms and the MLP's activation keep only their input (GPU).
    """
    a, t = architecture, parallel.tensor
    queries, keys = a.n_heads * a.head_dim / t, a.n_kv_heads * a.head_dim / t
    sequence = t if parallel.sequence else 1
    # Each norm's input, its output, which is the input of a projection, and unfused what it is before its weight.
    norms = (4 if fused else 6) * a.hidden_size / sequence
    # The whole qkv projection (for the values), rotated queries and keys, the context and its copy in row order.
    attention = (queries + 2 * keys) + (queries + keys) + 2 * queries
    # Gate and up projection and their product; unfused also the gate's activation and a copy of the up projection.
    mlp = (3 if fused else 5) * a.mlp_size / t
    statistics = FP32 * a.n_heads / t
    kept = width * (norms + attention + mlp) + statistics
    if parallel.recompute == "selective":
        kept -= width * queries + statistics
    if parallel.recompute == "full":
        kept = width * a.hidden_size / sequence
    return round(kept)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a rank does with the critic, as far as it takes memory."""

    data_size: int
    """Data-parallel ranks."""
    tokens: int
    """Of the largest micro-batch, padding included."""
    response_tokens: int
    """Those of them that the loss is over."""
    on_gpu: bool
    half: bool
    """Weights and activations of 2 bytes a number, with a master copy of the weights beside them; else of 4."""
    reference_copy: bool = False
    value_network: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)
    """Adapters, where they alone are trained."""


def estimate(architecture: Architecture, parallel: ParallelConfig, work: Workload) -> tuple[Memory, ...]:
    """Memory of a rank of each pipeline stage."""
    return tuple(_stage(architecture, parallel, stage, work) for stage in range(parallel.pipeline))


def _loss_on_cpu(a: Architecture, parallel: ParallelConfig, work: Workload, *, learnt: bool) -> int:
    """Three buffers of a chunk's logits, the output layer's weight in float32 and, where it is ``learnt``, its gradient
    before it is added to the main one."""
    columns = a.padded_vocab(parallel.tensor) // parallel.tensor
    chunk = min(max(reference.CHUNK_ELEMENTS, reference.PRODUCT_ROWS * columns), work.response_tokens * columns)
    return FP32 * (3 * chunk + columns * a.hidden_size * (int(learnt) + int(work.half)))


def _stage(a: Architecture, parallel: ParallelConfig, stage: int, work: Workload) -> Memory:
    width = 2 if work.half else FP32
    n = parameters_of_rank(a, parallel, stage)
    last = stage == parallel.pipeline - 1
    shards = work.data_size if parallel.distributed_optimizer else 1
    in_flight = parallel.pipeline - stage  # micro-batches whose activations a stage keeps (1F1B)
    kept = _layer_activations(a, parallel, width, fused=work.on_gpu) * (a.n_layers // parallel.pipeline)
    sequence = parallel.tensor if parallel.sequence else 1
    activations = work.tokens * kept * in_flight
    if last:
        activations += work.tokens * width * 2 * a.hidden_size // sequence  # the final norm's input and output
    # Backward through one layer: gradients of the MLP's widest tensors and of the residual stream, unfused of every
    # step between; when the layer is recomputed, its activations are there again.
    wide, narrow = (3, 2) if work.on_gpu else (6, 4)
    working = width * (wide * a.mlp_size // parallel.tensor + narrow * a.hidden_size)
    if parallel.recompute == "full":
        unsaved = ParallelConfig(tensor=parallel.tensor, sequence=parallel.sequence)
        working += _layer_activations(a, unsaved, width, fused=work.on_gpu)
    vocabulary = a.padded_vocab(parallel.tensor) // parallel.tensor * a.hidden_size
    embedding = vocabulary * width if stage == 0 else 0
    adapters = adapter_parameters_of_rank(a, parallel, work.lora)
    trained = adapters or n
    loss = 0
    if last:
        loss = work.response_tokens * a.hidden_size * (2 * width + FP32)
        loss += _LOSS_WORKSPACE_BYTES if work.on_gpu else _loss_on_cpu(a, parallel, work, learnt=not adapters)
    step = trained * FP32 // shards if work.on_gpu else 0  # torch's AdamW on a GPU updates all parameters at once
    optimizer = trained * FP32 * (3 if work.half else 2) // shards
    return Memory(
        weights=(n + adapters) * width,
        reference=n * width if work.reference_copy else 0,
        value=(n + adapters) * width + trained * FP32 + optimizer if work.value_network else 0,
        gradients=trained * FP32,
        optimizer=optimizer,
        activations=activations,
        transient=max(0, work.tokens * working - loss, max(embedding, step) - activations - loss),
        loss=loss,
    )
