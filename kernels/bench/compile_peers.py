"""Peers' kernels as ``compile.py --peers`` compiles them: with the types, blocks and warps of their own launches.

A peer that is not installed is left out. Kernels around ``tl.dot`` (CCE, verl) are not here: an instruction of theirs
multiplies a tile, so that a count an element says nothing beside ours, whose products are cuBLAS's.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

VOCABULARY = 152_064


def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def peer_configurations(make: Any) -> Iterator[Any]:
    """Configurations, by ``make``, of whatever is installed."""
    for configurations in (_trl_logits, _trl_linear, _liger):
        yield from configurations(make)


def _trl_logits(make: Any) -> Iterator[Any]:
    module = _module("trl.kernels.logprob_entropy")
    if module is None:
        return
    vectors = ("logprobs", "entropy", "log_z", "expected_logit", "grad_logprobs", "grad_entropy")
    types = {f"{name}_ptr": "*fp32" for name in vectors}
    types |= {"logits_ptr": "*bf16", "grad_logits_ptr": "*bf16", "index_ptr": "*i64", "row_mask_ptr": "*u8"}
    constants = {"n_cols": VOCABULARY, "TEMPERATURE": 1.0, "HAS_MASK": False, "BLOCK_SIZE": module._BLOCK_SIZE}
    gradients = {"HAS_LOGPROB_GRAD": True, "HAS_ENTROPY_GRAD": True}
    for name, kernel, more in (("", module._forward_kernel, {}), (" backward", module._backward_kernel, gradients)):
        yield make(
            name=f"TRL logits{name}",
            kernel=kernel,
            types=types,
            constants=constants | more,
            warps=4,
            elements=module._BLOCK_SIZE,
            odd=frozenset({"rows_per_batch", "index_batch_stride", "index_row_stride", "mask_row_stride"}),
        )


def _trl_linear(make: Any) -> Iterator[Any]:
    module = _module("trl.kernels.chunked_logprob")
    if module is None:
        return
    vectors = ("max", "sum_exp", "x_sum_exp", "sq_sum_exp", "z_sum", "max_before_target", "target_logit", "log_z")
    vectors = (*vectors, "entropy", "grad_logprobs", "grad_entropy")
    types = {f"{name}_ptr": "*fp32" for name in vectors} | {"mm_ptr": "*bf16", "targets_ptr": "*i64"}
    types |= dict.fromkeys(("logit_scale", "softcap", "inv_t"), "fp32")
    flags = ("HAS_SOFTCAP", "HAS_LOG_SUM_SQ_PROBS", "HAS_MEAN_LOGITS", "HAS_IS_TOP1")
    forward = dict.fromkeys(flags, False) | {"HAS_ENTROPY": True}
    backward = {"HAS_SOFTCAP": False, "HAS_LOGPROB_GRAD": True, "HAS_ENTROPY_GRAD": True}
    for name, kernel, constants in (
        ("", module._forward_kernel, forward),
        (" backward", module._backward_kernel, backward),
    ):
        yield make(
            name=f"TRL chunked linear, its statistics{name}",
            kernel=kernel,
            types=types,
            constants=constants | {"BLOCK_SIZE": module._BLOCK_SIZE},
            warps=4,
            elements=module._BLOCK_SIZE,
            odd=frozenset({"vocab_start"}),
        )


def _liger(make: Any) -> Iterator[Any]:
    module = _module("liger_kernel.ops.cross_entropy")
    if module is None:
        return
    block = 32_768
    types = {f"{name}_ptr": "*fp32" for name in ("loss", "z_loss", "weight", "token_accuracy", "predicted_tokens")}
    types |= {"X_ptr": "*bf16", "Y_ptr": "*i64", "softcap": "fp32", "sum_non_ignore_weight": "fp32"}
    flags = ("RETURN_Z_LOSS", "RETURN_TOKEN_ACCURACY", "RETURN_PREDICTED_TOKENS", "HAS_WEIGHT", "HAS_SOFTCAPPING")
    numbers = {"lse_square_scale": 0.0, "label_smoothing": 0.0, "reduction": "none", "BLOCK_SIZE": block}
    yield make(
        name="Liger cross entropy, its longer loop",
        kernel=module.liger_cross_entropy_kernel,
        types=types | {"weight_sum": "fp32"},
        constants=dict.fromkeys(flags, False) | {"HAS_GRADIENTS": True} | numbers,
        warps=32,
        elements=block,
        odd=frozenset({"ignore_index", "Y_stride", "loss_stride", "n_non_ignore"}),
    )
