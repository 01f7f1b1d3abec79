"""Other people's implementations, behind one interface. Each imports what it needs when it is made.

An ImportError there means that the peer is not installed: it is named as skipped. None of them is a dependency of the
project; ``pip install liger-kernel[cutedsl] quack-kernels cut-cross-entropy trl`` beside it brings them. verl, whose
transformers must be older than this project's, takes an environment of its own and ``--contenders verl``. Shards are
simulated: a peer sees a vocabulary of a shard's width, and no process group, or one of a single rank.

Legend: N tokens, V columns of a shard, D hidden width.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from cases import Call, Contender, Inputs, _policy_loss, eager


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    found = {}
    for name in ("liger-kernel", "quack-kernels", "cut-cross-entropy", "trl", "verl", "megatron-core"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def contenders() -> list[Contender]:
    """All of them."""
    bf16 = (torch.bfloat16,)
    return [
        Contender(name="torch.compile", families=("logits",), results="logprobs and entropy", make=_compiled_logits),
        Contender(
            name="torch.compile",
            families=("linear",),
            results="logprobs and entropy",
            make=_compiled_linear,
            products=(2, 4),
        ),
        Contender(
            name="torch.compile", families=("policy loss",), results="loss", make=_compiled_policy_loss, captured=True
        ),
        Contender(name="torch linear_cross_entropy", families=("linear",), results="logprobs", make=_torch_linear),
        Contender(
            name="Megatron-core fused cross entropy",
            families=("logits",),
            results="logprobs",
            make=_megatron,
            dtypes=bf16,
        ),
        Contender(name="Liger vocabulary-parallel CE", families=("logits",), results="logprobs", make=_liger_logits),
        Contender(name="Liger fused linear CE", families=("linear",), results="sum", make=_liger_linear("triton")),
        Contender(
            name="Liger fused linear CE, CuTe",
            families=("linear",),
            results="sum",
            make=_liger_linear("cutedsl"),
            dtypes=bf16,
        ),
        Contender(name="quack", families=("linear",), results="sum", make=_quack, dtypes=bf16),
        Contender(
            name="cut-cross-entropy, exact",
            families=("linear",),
            results="logprobs",
            make=_cut(exact=True),
            dtypes=bf16,
        ),
        Contender(
            name="cut-cross-entropy, filtered",
            families=("linear",),
            results="logprobs",
            make=_cut(exact=False),
            dtypes=bf16,
        ),
        Contender(name="TRL", families=("logits",), results="logprobs and entropy", make=_trl_logits),
        Contender(name="TRL", families=("linear",), results="logprobs and entropy", make=_trl_linear, products=(2, 6)),
        Contender(
            name="verl",
            families=("linear",),
            results="logprobs and entropy",
            make=_verl_linear,
            products=(2, 6),
            dtypes=bf16,
        ),
        Contender(name="verl", families=("group advantages",), results="values", make=_verl_grpo, slow=True),
        Contender(name="verl", families=("gae",), results="values", make=_verl_gae, slow=True),
    ]


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def _compiled_logits(x: Inputs) -> Call:
    function = _compiled(eager)
    return lambda: function(x["logits"], x["targets"])


def _compiled_linear(x: Inputs) -> Call:
    function = _compiled(lambda hidden, weight, targets: eager(hidden @ weight.T, targets))
    return lambda: function(x["hidden"], x["weight"], x["targets"])


def _compiled_policy_loss(x: Inputs) -> Call:
    function = _compiled(lambda: _policy_loss(x, "torch"))
    return function


def _torch_linear(x: Inputs) -> Call:
    from torch.nn import functional

    if not hasattr(functional, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy")
    chunked = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    options = {"reduction": "none"} | ({"options": chunked()} if chunked else {})

    def call() -> tuple[torch.Tensor, ...]:
        loss = functional.linear_cross_entropy(x["hidden"], x["weight"], x["targets"], **options)
        return (-loss.float(),)

    return call


def _megatron(x: Inputs) -> Call:
    import torch.distributed as dist
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    if not dist.is_initialized():
        backend = "nccl" if x["logits"].is_cuda else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD

    def call() -> tuple[torch.Tensor, ...]:
        loss = fused_vocab_parallel_cross_entropy(x["logits"][:, None], x["targets"][:, None], group)
        return (-loss[:, 0],)

    return call


def _liger_logits(x: Inputs) -> Call:
    from liger_kernel.transformers.vocab_parallel_cross_entropy import LigerVocabParallelCrossEntropy

    module = LigerVocabParallelCrossEntropy()
    return lambda: (-module(x["logits"][:, None], x["targets"][:, None])[:, 0],)


def _liger_linear(implementation: str) -> Callable[[Inputs], Call]:
    """Its Triton path, or the CuTe one, which its users choose by an environment variable before the import."""

    def make(x: Inputs) -> Call:
        from liger_kernel.ops import fused_linear_cross_entropy as triton_path

        module = triton_path
        if implementation != "triton":
            module = importlib.import_module(f"liger_kernel.ops.{implementation}.ops")
        function = module.LigerFusedLinearCrossEntropyFunction
        arguments = (None, None, -100, 0.0, 0.0, "sum", None, False, torch.float32)
        return lambda: (-function.apply(x["hidden"], x["weight"], x["targets"], *arguments)[0],)

    return make


def _quack(x: Inputs) -> Call:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda: (-chunked_linear_cross_entropy(x["hidden"], x["weight"], x["targets"], reduction="sum").float(),)


def _cut(*, exact: bool) -> Callable[[Inputs], Call]:
    """Cut cross-entropy with the filter that its release chooses by itself, or without, and then all in fp32."""

    def make(x: Inputs) -> Call:
        from cut_cross_entropy import linear_cross_entropy

        options: dict[str, Any] = {"reduction": "none"}
        if exact:
            known = inspect.signature(linear_cross_entropy).parameters
            options |= {"filter_eps": None}
            options |= {name: True for name in ("accum_e_fp32", "accum_c_fp32") if name in known}
        return lambda: (-linear_cross_entropy(x["hidden"], x["weight"], x["targets"], **options).float(),)

    return make


def _trl_logits(x: Inputs) -> Call:
    from trl.kernels import selective_log_softmax_and_entropy

    def call() -> tuple[torch.Tensor, ...]:
        logprobs, entropy = selective_log_softmax_and_entropy(x["logits"][None], x["targets"][None])
        return logprobs[0].float(), entropy[0].float()

    return call


def _trl_linear(x: Inputs) -> Call:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    def call() -> tuple[torch.Tensor, ...]:
        outputs = ChunkedLogProbFunction.apply(
            x["hidden"], x["weight"], None, x["targets"], 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("entropy",)
        )
        return outputs[0], outputs[1]

    return call


def _verl_linear(x: Inputs) -> Call:
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    return lambda: linear_cross_entropy(x["hidden"], x["weight"], x["targets"], 1.0, "none", None)


def _verl_grpo(x: Inputs) -> Call:
    from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage

    rewards, mask, groups = x["rewards"][:, None], torch.ones_like(x["rewards"])[:, None], x["groups"].cpu().numpy()
    return lambda: (compute_grpo_outcome_advantage(rewards, mask, groups)[0][:, 0],)


def _verl_gae(x: Inputs) -> Call:
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return

    mask = x["mask"].float()
    return lambda: compute_gae_advantage_return(x["rewards"], x["values"], mask, 0.99, 0.95)
