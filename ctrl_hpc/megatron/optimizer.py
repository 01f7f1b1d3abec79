"""AdamW over Megatron's gradient buffers: global gradient norm, clipping, and a loud end for a NaN."""

from __future__ import annotations

import math
from importlib import util
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer

from ctrl_hpc.config import OptimizerConfig, ParallelConfig
from ctrl_hpc.megatron.parallel_state import World


class Optimizer:
    """AdamW with fp32 main gradients and state, for one model on this rank.

    Gradients are sums over micro-batches and data-parallel ranks: the losses carry the global normalisation.
    """

    def __init__(self, model: GPTModel, config: OptimizerConfig, parallel: ParallelConfig, world: World) -> None:
        if parallel.distributed_optimizer and util.find_spec("transformer_engine") is None:
            raise ValueError(
                "parallel.distributed_optimizer=true needs Transformer Engine (its checkpoints load only there)"
            )
        self.config = config
        half = world.dtype == torch.bfloat16
        self.ddp = DistributedDataParallel(
            config=model.config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=parallel.distributed_optimizer,
                overlap_grad_reduce=world.data_size > 1,
                overlap_param_gather=False,
            ),
            module=model,
        )
        self.inner = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=config.lr,
                min_lr=config.min_lr,
                weight_decay=config.weight_decay,
                adam_beta1=config.beta1,
                adam_beta2=config.beta2,
                adam_eps=config.eps,
                clip_grad=config.clip_grad,
                bf16=half,
                params_dtype=world.dtype,
                use_distributed_optimizer=parallel.distributed_optimizer,
            ),
            [self.ddp],
            use_gloo_process_groups=False,
        )
        model.config.finalize_model_grads_func = _finalize
        model.config.no_sync_func = self.ddp.no_sync
        model.config.grad_scale_func = None

    def expect_output_gradient(self, weight: torch.Tensor, hidden_ND: torch.Tensor) -> None:
        """Tell Megatron's overlapped reduction when the output layer's gradient is there.

        The loss kernels add it to ``weight.main_grad`` themselves, out of autograd's sight; it is complete when the
        gradient of their hidden states is. A weight that is this rank's embedding too is reported by its other use.
        """
        output = getattr(self.ddp.module, "output_layer", None)
        if self.ddp.ddp_config.overlap_grad_reduce and output is not None and output.weight is weight:
            ready = self.ddp.param_to_bucket_group[weight].register_grad_ready
            hidden_ND.register_hook(lambda _gradient: ready(weight))

    def zero_grad(self) -> None:
        """Forget the gradients; call before the micro-batches of a step."""
        self.ddp.zero_grad_buffer()
        self.inner.zero_grad()

    def step(self, lr: float) -> dict[str, float]:
        """Clip and apply the gradients; ``grad_norm`` (before clipping, over the whole model) and ``lr``.

        Raises FloatingPointError, before anything changes, when a gradient is NaN or infinite.
        """
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.inner.prepare_grads()
        norm = float(self.inner.get_grad_norm())
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm}; nothing was updated")
        if 0.0 < self.config.clip_grad < norm:
            self._scale_gradients(self.config.clip_grad / (norm + 1e-6))
        if not self.inner.step_with_ready_grads():
            raise RuntimeError("Megatron's optimizer refused the step")
        return {"grad_norm": norm, "lr": lr}

    def _scale_gradients(self, factor: float) -> None:
        gradients = [parameter.grad for parameter in self.inner.get_parameters() if parameter.grad is not None]
        torch._foreach_mul_(gradients, factor)


def _finalize(model: list[Any], _num_tokens: torch.Tensor | None = None, **options: Any) -> None:
    """Megatron's gradient reduction without its division by the token count: the losses are normalised already."""
    finalize_model_grads(model, None, **options)
