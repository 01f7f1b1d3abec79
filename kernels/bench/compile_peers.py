"""Peers' kernels as ``compile.py --peers`` compiles them: with the types, blocks and warps of their own launches.

A peer that is not installed is left out. Of the kernels around ``tl.dot`` (cut cross-entropy, verl) no instructions are
counted: one of theirs multiplies a tile, so that a count an element says nothing beside ours, whose products are
cuBLAS's. Liger's CuTe path and quack are no Triton: their compiler needs the card.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from triton.runtime.jit import JITFunction

VOCABULARY = 152_064


def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def peer_configurations(make: Any) -> Iterator[Any]:
    """Configurations, by ``make``, of whatever is installed."""
    for configurations in (_trl_logits, _trl_linear, _liger, _cut_cross_entropy, _verl):
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


def _kernel(tuned: Any) -> JITFunction:
    """The kernel inside heuristics and autotuning."""
    return tuned if isinstance(tuned, JITFunction) else _kernel(tuned.fn)


def _cut_cross_entropy(make: Any) -> Iterator[Any]:
    forward, backward, tune = (
        _module(f"cut_cross_entropy.{name}") for name in ("cce_lse_forward", "cce_backward", "tl_autotune")
    )
    if forward is None or backward is None or tune is None:
        return
    types = dict.fromkeys(("E", "C", "dE", "dC"), "*bf16") | {"LSE": "*fp32", "dOut": "*fp32", "Targets": "*i64"}
    types |= {"Locks": "*u32", "dELocks": "*i32", "dCLocks": "*i32", "grad_scale": "fp32", "filter_eps": "fp32"}
    absent = {"Valids": None, "softcap": None, "HAS_VALIDS": False, "HAS_SOFTCAP": False, "GROUP_B": 8, "EVEN_D": True}
    dense = dict.fromkeys(("stride_ed", "stride_cd", "stride_vb"), 1)
    of_backward = {"VocabOrdering": None, "HAS_VOCAB_ORDERING": False, "FILTER_GRAD": True, "HAS_TARGETS": True}
    of_backward |= {"ITEM_DO": False, "SHIFT": False, "REQUIRES_GRAD": True, "MM_BACK_EVEN_D": True}
    of_forward = {"LA": None, "HAS_LA": False, "DOT_PRECISION": "ieee", "stride_lse_b": 1}
    for name, kernel, best, constants in (
        ("forward", forward._cce_lse_forward_kernel, tune._cce_forward_best_config(), of_forward),
        ("backward", backward._cce_backward_kernel, tune._cce_backward_best_config(), of_backward),
    ):
        blocks = dict(best.kwargs)
        if name == "backward":
            blocks["MM_BACK_BLOCK_D"] = 2 * blocks["BLOCK_D"]
        yield make(
            name=f"CCE {name}",
            kernel=_kernel(kernel),
            types=types,
            constants=absent | dense | constants | blocks,
            warps=best.num_warps,
            stages=best.num_stages,
            odd=frozenset({"B_BIN", "num_locks", *(f"n_d{x}_locks_{i}" for x in "ec" for i in "01")}),
        )


def _verl_kernels() -> ModuleType | None:
    """The file with verl's kernels alone: it asks the rest of verl for nothing but the device at hand."""
    package = importlib.util.find_spec("verl")
    if package is None or not package.submodule_search_locations:
        return None
    file = Path(package.submodule_search_locations[0], "utils", "kernel", "kernels.py")
    device = ModuleType("verl.utils.device")
    for name in ("get_device_capability", "get_device_name", "get_torch_device"):
        setattr(device, name, None)
    device.is_cuda_available = False  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("verl_kernels", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[device.__name__] = sys.modules["verl_kernels"] = device
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[device.__name__]
    sys.modules["verl_kernels"] = module
    return module


def _verl(make: Any) -> Iterator[Any]:
    module = _verl_kernels()
    if module is None:
        return
    vectors = ("max", "accu", "entropy_b", "global_logprobs", "global_logprobs_scalar", "maximum", "d_entropy")
    types = {f"{name}_ptr": "*fp32" for name in (*vectors, "d_logprobs")} | {"labels_ptr": "*i64"}
    types |= {f"{name}_ptr": "*bf16" for name in ("hidden", "weight", "d_logits")} | {"rcp_temperature": "fp32"}
    last = ("hidden_k", "weight_k")
    lines = ("labels", "maximum", "accu", "d_entropy", "d_logprobs", "entropy_b", "d_logits_n")
    for name, tuned, dense, more in (
        (
            "forward",
            module.efficient_entropy_kernel_general_mainloop,
            (*last, "max_n", "accu_n", "entropy_b_n", "global_logprobs"),
            {},
        ),
        (
            "backward, logits' gradient",
            module.efficient_entropy_backward_kernel_general_d_logits_split_N,
            (*last, *lines),
            {"reduction": 0},
        ),
    ):
        kernel, best = _kernel(tuned), tuned.configs[0]
        ones = {f"stride_{x}": 1 for x in dense}
        yield make(
            name=f"verl {name}",
            kernel=kernel,
            types=types | {x: "i64" for x in kernel.arg_names if x.startswith("stride_") and x not in ones},
            constants=ones | more | dict(best.kwargs) | {"USE_TMA": True},
            warps=best.num_warps,
            stages=best.num_stages,
            odd=frozenset({"rank", "split_idx"}),
        )
