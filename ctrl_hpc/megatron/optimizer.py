"""AdamW over Megatron's gradient buffers: global gradient norm, clipping, and a loud end for a NaN."""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides

from ctrl_hpc.config import OptimizerConfig, ParallelConfig
from ctrl_hpc.megatron.parallel_state import World

_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}
"""How a distributed optimizer's state lies in a checkpoint: readable under any TP x PP x DP."""


class Optimizer:
    """AdamW with fp32 main gradients and state, for one model on this rank.

    Gradients are sums over micro-batches and data-parallel ranks: the losses carry the global normalisation.
    """

    def __init__(self, model: GPTModel, config: OptimizerConfig, parallel: ParallelConfig, world: World) -> None:
        self.config = config
        half = world.dtype == torch.bfloat16
        self.ddp = DistributedDataParallel(
            config=model.config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=parallel.distributed_optimizer,
                # a value network's last stage holds an output layer that never has a gradient to wait for
                overlap_grad_reduce=world.data_size > 1 and not hasattr(model, "value_head"),
                overlap_param_gather=False,
            ),
            module=model,
        )
        options = MegatronOptimizerConfig(
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
        )
        self.inner = get_megatron_optimizer(
            options,
            [self.ddp],
            config_overrides=get_standard_config_overrides(options),  # biases and norms do not decay
            use_gloo_process_groups=False,
        )
        self._complete_state()
        if parallel.distributed_optimizer:
            _skip_step(self.inner.chained_optimizers[0])
        model.config.finalize_model_grads_func = _finalize
        model.config.no_sync_func = self.ddp.no_sync
        model.config.grad_scale_func = None

    def expect_output_gradient(self, weight: torch.Tensor) -> None:
        """Before a backward pass: the loss kernels add the output layer's gradient to its ``main_grad`` themselves.

        Megatron's overlapped reduction wants to see a gradient before it counts a parameter as ready; as with fused
        weight gradients it gets one that holds nothing. A weight that is this rank's embedding too has another use
        that counts, with a gradient of its own.
        """
        output = getattr(self.ddp.module, "output_layer", None)
        if (
            weight.requires_grad
            and self.ddp.ddp_config.overlap_grad_reduce
            and output is not None
            and output.weight is weight
        ):
            weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
            weight.grad = weight.new_zeros(1).expand_as(weight)

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
            group["weight_decay"] = self.config.weight_decay * group["wd_mult"]
        self.inner.prepare_grads()
        norm = float(self.inner.get_grad_norm())
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient norm is {norm}{self._culprit()}; nothing was updated")
        if 0.0 < self.config.clip_grad < norm:
            self._scale_gradients(self.config.clip_grad / (norm + 1e-6))
        if not self.inner.step_with_ready_grads():
            raise RuntimeError("Megatron's optimizer refused the step")
        return {"grad_norm": norm, "lr": lr}

    def sharded_state_dict(self, weights: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
        """The state as Megatron's checkpoints take it; ``weights`` is the model's part of the same checkpoint."""
        return self.inner.sharded_state_dict(weights, is_loading=is_loading, metadata=_SHARDING)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what a checkpoint holds under :meth:`sharded_state_dict`."""
        moments = state.get("optimizer", state).get("state", {})
        if moments and self._is_torch():  # Megatron leaves out a common step that is 0
            moments.setdefault("common_step", torch.tensor(0.0))
        self.inner.load_state_dict(state)
        self._complete_state()

    def _complete_state(self) -> None:
        """Give torch's AdamW the state of step 0 where it has none: checkpoints need it, whoever took no step yet."""
        if not self._is_torch():
            return  # Transformer Engine's keeps its steps elsewhere
        for group in self.inner.optimizer.param_groups:
            for parameter in group["params"]:
                state = self.inner.optimizer.state[parameter]
                # Cloned, for Megatron loads one tensor for all parameters, which each would then count up.
                state["step"] = state["step"].clone() if "step" in state else torch.tensor(0.0)
                for moment in ("exp_avg", "exp_avg_sq"):
                    if moment not in state:
                        state[moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format)

    def _culprit(self) -> str:
        """The first parameter of this rank whose gradient is not finite; none where only the norm overflows."""
        for name, parameter in self.ddp.module.named_parameters():
            if parameter.requires_grad and not bool(parameter.main_grad.isfinite().all()):
                return f" ({name} first)"
        return ""

    def _is_torch(self) -> bool:
        return type(self.inner.optimizer).__module__.split(".")[0] == "torch"

    def _scale_gradients(self, factor: float) -> None:
        gradients = [parameter.grad for parameter in self.inner.get_parameters() if parameter.grad is not None]
        torch._foreach_mul_(gradients, factor)


def _skip_step(optimizer: Any) -> None:
    """Let Megatron's distributed optimizer load torch's AdamW: it looks for the step among the sharded moments."""
    restore = optimizer._set_main_param_and_optimizer_states
    optimizer._set_main_param_and_optimizer_states = lambda parameter, tensors: restore(
        parameter, {"step": None, **tensors}
    )


def _finalize(model: list[Any], _num_tokens: torch.Tensor | None = None, **options: Any) -> None:
    """Megatron's gradient reduction without its division by the token count: the losses are normalised already."""
    finalize_model_grads(model, None, **options)
