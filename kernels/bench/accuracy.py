"""Errors of every contender against float64, at a small shape, before anything is timed.

Ours must stay within 5e-6 (1 + the largest logit) for log-probs and entropies, from half-precision inputs too, and
their gradients, rounded to the inputs' type, must be no worse than those of PyTorch in that type.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import cases
import torch
from cases import Case, Contender, Inputs

import ctrl_kernels

FAMILIES = ("logits", "linear", "one pass")


def check(
    everyone: list[Contender],
    device: torch.device,
    *,
    smoke: bool,
    failures: tuple[type[Exception], ...],
    reason: Callable[[BaseException], str],
) -> list[dict[str, Any]]:
    """A row for each contender that runs: errors, and whether it passed."""
    rows, columns, width = (8, 320, 16) if smoke else (256, 4096, 256)
    found = []
    for family in FAMILIES:
        case = Case(family=family, rows=rows, columns=columns, width=0 if family == "logits" else width)  # type: ignore[arg-type]
        yardstick: dict[str, float] = {}
        for contender in sorted(everyone, key=lambda c: c.name != "torch eager"):  # the yardstick first
            if family not in contender.families:
                continue
            # The interpreter does not round to half precision as a GPU does.
            dtype = torch.float32 if smoke and torch.float32 in contender.dtypes else torch.bfloat16
            inputs = cases.inputs(case, device, dtype)
            row = {"family": family, "contender": contender.name, "ours": contender.ours}
            try:
                errors = compare(contender, inputs)
            except ImportError:
                continue
            except failures as error:
                found.append(row | {"failed": reason(error), "passed": False})
                continue
            if contender.name == "torch eager":
                yardstick = errors
            found.append(row | errors | {"passed": passed(errors, yardstick)})
    return found


def passed(errors: dict[str, float], yardstick: dict[str, float]) -> bool:
    """Whether errors are within the limits above; gradients have 10 % of slack, or 1e-5."""
    gradients = ("d_logits", "d_hidden", "d_weight")
    worse = [errors[n] > max(1.1 * yardstick[n], 1e-5) for n in gradients if n in errors and n in yardstick]
    return errors.get("values", 0.0) <= 1.0 and not any(worse)


def exact_outputs(contender: Contender, inputs: Inputs, leaves: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """What the contender should return, from float64 leaves."""
    logits = leaves["logits"] if "logits" in leaves else leaves["hidden"] @ leaves["weight"].T
    logp = torch.log_softmax(logits, 1)
    logprobs, entropy = logp.gather(1, inputs["targets"][:, None])[:, 0], -(logp.exp() * logp).sum(1)
    if contender.results == "loss":
        rows = cases._rows(inputs)
        loss, _ = ctrl_kernels.policy_loss(logprobs[None], **rows, entropy=entropy[None], backend="torch")
        return (loss,)
    outputs = {"logprobs": (logprobs,), "logprobs and entropy": (logprobs, entropy), "sum": (logprobs.sum(),)}
    return outputs[contender.results]


def compare(contender: Contender, inputs: Inputs) -> dict[str, float]:
    """``values``: the largest error of an output in units of 5e-6 (1 + largest logit); relative errors of gradients."""
    names = [name for name in ("logits", "hidden", "weight") if name in inputs.tensors]
    leaves = [inputs[name].detach().clone().requires_grad_() for name in names]
    copied = replace(inputs, tensors=inputs.tensors | dict(zip(names, leaves, strict=True)), leaves=tuple(leaves))
    outputs = contender.make(copied)()
    exact_leaves = {name: inputs[name].detach().double().requires_grad_() for name in names}
    exact = exact_outputs(contender, inputs, exact_leaves)
    scale = 1.0 if contender.results in ("logprobs", "logprobs and entropy") else float(len(inputs["targets"]))
    with torch.no_grad():
        logits = exact_leaves["logits"] if "logits" in names else exact_leaves["hidden"] @ exact_leaves["weight"].T
        unit = 5e-6 * (1 + logits.abs().max().item()) * scale
    values = max((a.double() - b).abs().max().item() for a, b in zip(outputs, exact, strict=True)) / unit
    upstream = [torch.ones_like(o) if o.dim() == 0 else u for o, u in zip(outputs, _upstream(inputs), strict=False)]
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    expected = torch.autograd.grad(exact, list(exact_leaves.values()), [u.double() for u in upstream])
    errors = {
        f"d_{name}": ((a.double() - b).norm() / b.norm()).item()
        for name, a, b in zip(names, gradients, expected, strict=True)
    }
    return {"values": values} | errors


def _upstream(inputs: Inputs) -> tuple[torch.Tensor, ...]:
    return inputs.upstream or (torch.ones((), device=inputs["targets"].device),)
