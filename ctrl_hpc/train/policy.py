"""The critic in training: log-probabilities, one optimizer step of a loss, weights in and out.

Shapes: N response tokens of a micro-batch, B its sequences, R response slots, S sequences of a batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import ctrl_kernels
import torch
import torch.distributed as dist
from ctrl_kernels import Backend, resolve_backend
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from ctrl_hpc.config import Config, OptimizerConfig
from ctrl_hpc.megatron import architecture as architectures
from ctrl_hpc.megatron import export, lora, model, weights
from ctrl_hpc.megatron.optimizer import Optimizer
from ctrl_hpc.megatron.parallel_state import World
from ctrl_hpc.train.batch import Batch, MicroBatch, micro_batches, packed_micro_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The output layer as the loss kernels take it: this rank's rows of its weight, and where they lie."""

    weight: Tensor
    main_grad: Tensor | None
    """Megatron's fp32 gradient of the weight, to which the kernels add it without rounding; None: nothing to add to."""
    group: dist.ProcessGroup | None
    vocab_start: int
    vocab_size: int
    backend: Backend

    def options(self, temperature: float) -> dict[str, Any]:
        """Keyword arguments of the kernels that take hidden states."""
        return {
            "temperature": temperature,
            "group": self.group,
            "vocab_start": self.vocab_start,
            "vocab_size": self.vocab_size,
            "main_grad": self.main_grad,
            "backend": self.backend,
        }

    def logprobs(self, hidden_ND: Tensor, targets_N: Tensor, temperature: float) -> Tensor:
        """Log-probability [N] of each target."""
        options = self.options(temperature)
        return ctrl_kernels.linear_token_logprobs(hidden_ND, self.weight, targets_N, **options)

    def logprobs_and_entropy(self, hidden_ND: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of the distribution, both [N]."""
        options = self.options(temperature)
        return ctrl_kernels.linear_token_logprobs(hidden_ND, self.weight, targets_N, return_entropy=True, **options)


class Loss(Protocol):
    """A loss of one micro-batch: its part of the batch's loss (a scalar), and what to log.

    The parts of all micro-batches and data-parallel ranks add up to the loss of the batch: the denominator is global.
    The logged values add up likewise.
    """

    def __call__(self, head: Any, micro: MicroBatch, hidden_ND: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's part; ``head`` is what the model has on top: a policy's :class:`Head`."""
        ...


class Policy:
    """A critic over the ranks of the job. Every method is called by all ranks, with the same arguments."""

    def __init__(
        self,
        config: Config,
        world: World,
        folder: str | Path,
        *,
        optimizer: OptimizerConfig | None = None,
    ) -> None:
        """Load a Hugging Face folder; without ``optimizer`` the critic is frozen (a reference).

        Raises ValueError for a missing or unfitting folder, or an impossible combination of settings.
        """
        self.config, self.world, self.folder = config, world, Path(folder)
        self.architecture = architectures.read(folder)
        adapted = config.lora.rank > 0
        packed = config.trainer.shared_prefix
        self.model = model.build(self.architecture, config.parallel, world, adapted=adapted, packed=packed)
        weights.load(self.model, folder, self.architecture, world)
        if adapted and optimizer is not None:
            lora.attach(self.model, config.lora, self.architecture, world, seed=config.seed)
        self._extend()
        self.optimizer: Optimizer | None = None
        if optimizer is not None:
            self.optimizer = Optimizer(self.model, optimizer, config.parallel, world)
        else:
            self.model.requires_grad_(False)

    def _extend(self) -> None:
        """Where a subclass adds to the model what the folder does not hold."""

    def logprobs(self, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """Log-probability of each response token, fp32 [S, R] on the CPU, zero beyond a response; on every rank."""

        def score(head: Head, micro: MicroBatch, hidden_ND: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            logprobs_N = head.logprobs(hidden_ND, micro.targets_N, temperature)
            return logprobs_N.sum(), {"logprobs": micro.grid(logprobs_N)}

        return self._score(batch, score, ["logprobs"])[0]

    def logprobs_and_entropy(self, batch: Batch, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
        """As :meth:`logprobs`, with the entropy [S, R] of the distribution each token was drawn from."""

        def score(head: Head, micro: MicroBatch, hidden_ND: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            logprobs_N, entropy_N = head.logprobs_and_entropy(hidden_ND, micro.targets_N, temperature)
            return logprobs_N.sum(), {"logprobs": micro.grid(logprobs_N), "entropy": micro.grid(entropy_N)}

        logprobs_SR, entropy_SR = self._score(batch, score, ["logprobs", "entropy"])
        return logprobs_SR, entropy_SR

    def update(self, batch: Batch, loss: Loss, lr: float) -> dict[str, float]:
        """One optimizer step on a batch; what the loss logged, summed, with ``loss``, ``grad_norm`` and ``lr``.

        Raises FloatingPointError, before anything changes, when the gradient is not finite.
        """
        assert self.optimizer is not None, "a frozen critic is not updated"
        logged = self.gradients(batch, loss)
        return logged | self.optimizer.step(lr)

    def gradients(self, batch: Batch, loss: Loss) -> dict[str, float]:
        """The gradient of the loss of a batch, left in Megatron's buffers; what the loss logged."""
        assert self.optimizer is not None, "a frozen critic has no gradient"
        self.optimizer.zero_grad()
        results = self._run(self._micro_batches(batch), loss, forward_only=False)
        return self._sum_logged(results)

    def export(self, folder: str | Path, *, source: str | Path, link: bool = False) -> None:
        """Write a Hugging Face folder, whole or not at all, with the tokenizer and configuration of ``source``.

        ``link`` shares those files with ``source`` where the file system can, for folders that live one step.
        """
        export.export(self.model, self.architecture, self.world, folder, source=source, link=link)

    def export_adapters(self, folder: Path) -> None:
        """Write the adapters in PEFT's format, for the folder that the critic was loaded from; whole or not at all."""
        lora.export(self.model, self.config.lora, self.architecture, self.world, folder, base=self.folder)

    @property
    def kernels(self) -> str:
        """The backend of the loss kernels that is used: ``triton`` or ``torch``."""
        return resolve_backend(self.config.trainer.kernels, next(self.model.parameters()))

    @property
    def _has_fused_layers(self) -> bool:
        return self.world.device.type == "cuda" and model.has_transformer_engine() and not self.config.lora.rank

    def engine(self) -> dict[str, str]:
        """What computes, in words: the kernels' backend, the layers, the numbers, the device, the layout."""
        world = self.world
        on_gpu = world.device.type == "cuda"
        return {
            "kernels": self.kernels,
            "layers": "transformer_engine" if self._has_fused_layers else "torch",
            "dtype": str(world.dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(world.device) if on_gpu else "cpu",
            "layout": f"tensor {world.tensor_size} x pipeline {world.pipeline_size} x data {world.data_size}",
        }

    def head(self) -> Any:
        """The output layer, a :class:`Head`; on the last pipeline stage."""
        weight = model.output_weight(self.model)
        backend = self.config.trainer.kernels
        return Head(
            weight=weight,
            main_grad=None if self.optimizer is None or not weight.requires_grad else weight.main_grad,
            group=self.world.tensor_group if self.world.tensor_size > 1 else None,
            vocab_start=self.world.tensor_rank * weight.shape[0],
            vocab_size=self.architecture.vocab_size,
            backend=backend,
        )

    def _micro_batches(self, batch: Batch) -> list[MicroBatch]:
        divide = packed_micro_batches if self.config.trainer.shared_prefix else micro_batches
        return divide(
            batch,
            data_rank=self.world.data_rank,
            data_size=self.world.data_size,
            budget=self.config.trainer.micro_batch_tokens,
            multiple=self.world.tensor_size if self.config.parallel.sequence else 1,
            device=self.world.device,
        )

    def _score(self, batch: Batch, score: Loss, names: list[str]) -> list[Tensor]:
        """The grids that ``score`` logs, put together from micro-batches and data-parallel ranks."""
        parts = self._micro_batches(batch)
        with torch.no_grad():
            scored = self._run(parts, score, forward_only=True)
        values = torch.zeros(len(names), *batch.mask_SR.shape, dtype=torch.float32)
        for micro, grids in zip(parts, scored, strict=False):
            if len(micro.rows_B):
                for index, name in enumerate(names):
                    values[index, micro.rows_B, : micro.n_slots] = grids[name].float().cpu()
        return list(self._from_all_shares(values))

    def _run(self, parts: Sequence[MicroBatch], loss: Loss, *, forward_only: bool) -> list[dict[str, Tensor]]:
        """Forward (and backward) through the pipeline; what the loss logged for each micro-batch, on the last stage."""

        def forward_step(micros: Iterator[MicroBatch], stage: Any) -> tuple[Tensor, Callable[..., Any]]:
            micro = next(micros)
            output = model.hidden_states(
                stage,
                micro.tokens_BT,
                lambda hidden_TBD: hidden_TBD.flatten(0, 1).index_select(0, micro.positions_N),
                positions_T=micro.positions_T,
                segments=micro.segments,
            )
            return output, partial(self._loss, loss, micro)

        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(parts),
            model=[self.model if self.optimizer is None else self.optimizer.ddp],
            num_microbatches=len(parts),
            seq_length=parts[0].tokens_BT.shape[1],
            micro_batch_size=parts[0].tokens_BT.shape[0],
            forward_only=forward_only,
        )

    def _loss(self, loss: Loss, micro: MicroBatch, hidden_ND: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        head = self.head()
        value, logged = loss(head, micro, hidden_ND)
        if hidden_ND.requires_grad and self.optimizer is not None:
            self.optimizer.expect_output_gradient(head.weight)
        tokens = torch.tensor(len(micro.targets_N), dtype=torch.int, device=hidden_ND.device)
        return value, tokens, {"loss": value.detach(), **logged}

    def _from_all_shares(self, values: Tensor) -> Tensor:
        """Sum over data-parallel ranks, then from the last pipeline stage to all; small CPU tensors."""
        if self.world.data_size > 1 or self.world.pipeline_size > 1:
            contributes = self.world.last_stage and self.world.tensor_rank == 0
            values = values if contributes else torch.zeros_like(values)
            dist.all_reduce(values)
        return values

    def _sum_logged(self, results: list[dict[str, Tensor]]) -> dict[str, float]:
        mine: dict[str, float] = {}
        for result in results:
            for name, value in result.items():
                mine[name] = mine.get(name, 0.0) + float(value)
        if self.world.data_size == 1 and self.world.pipeline_size == 1:
            return mine
        everyone: list[Any] = [None] * self.world.size
        dist.all_gather_object(everyone, mine if self.world.last_stage and self.world.tensor_rank == 0 else {})
        names = sorted({name for logged in everyone for name in logged})
        return {name: sum(logged.get(name, 0.0) for logged in everyone) for name in names}


class Reference(Protocol):
    """The frozen critic that the KL term holds on to."""

    def logprobs(self, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """As :meth:`Policy.logprobs`."""
        ...


class SwappedReference:
    """The reference's weights in host memory, put into the policy for the length of a call."""

    def __init__(self, policy: Policy) -> None:
        """Remember the policy's weights as they are now."""
        self._policy = policy
        self._weights = [parameter.detach().cpu().clone() for parameter in policy.model.parameters()]

    @torch.no_grad()
    def logprobs(self, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """As :meth:`Policy.logprobs`, with the remembered weights; the policy's come back to the bit."""
        parameters = list(self._policy.model.parameters())
        current = [parameter.detach().cpu().clone() for parameter in parameters]
        try:
            _copy(self._weights, parameters)
            return self._policy.logprobs(batch, temperature=temperature)
        finally:
            _copy(current, parameters)


@torch.no_grad()
def _copy(values: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
    for value, parameter in zip(values, parameters, strict=True):
        parameter.copy_(value)


@dataclass(frozen=True, slots=True)
class AdaptersOff:
    """The reference of a policy that trains adapters: the same weights without them."""

    policy: Policy

    def logprobs(self, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """As :meth:`Policy.logprobs`, of what the policy was loaded from."""
        with lora.disabled(self.policy.model):
            return self.policy.logprobs(batch, temperature=temperature)


def make_reference(policy: Policy, folder: Path, kind: str) -> Reference:
    """The reference critic of ``folder``, which ``policy`` has just been loaded from: a ``copy``, or by ``swap``.

    With adapters neither is needed.
    """
    if policy.config.lora.rank:
        return AdaptersOff(policy)
    if kind == "swap":
        return SwappedReference(policy)
    return Policy(policy.config, policy.world, folder)


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
