"""The tokens of ``linear_policy_loss``: which go through the products, and what the loss takes for each.

Legend: N tokens, M unmasked tokens, B sequences, T steps.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from ctrl_kernels.options import PolicyOptions
from ctrl_kernels.policy_loss import policy_terms
from ctrl_kernels.projection import Rows, take


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyTokens:
    """What the loss takes for each of M unmasked tokens, those with a gradient first, and their ``weights`` in it."""

    rows: Rows
    targets: torch.Tensor
    active: torch.Tensor
    old_logprobs: torch.Tensor
    advantages: torch.Tensor
    weights: torch.Tensor
    extras: dict[str, torch.Tensor | None]
    with_gradient: int

    def terms(
        self, chunk: slice, logprobs: torch.Tensor, entropy: torch.Tensor, options: PolicyOptions, **out: Any
    ) -> torch.Tensor:
        """``policy_terms`` of a chunk of these tokens."""
        return policy_terms(
            logprobs,
            self.old_logprobs[chunk],
            self.advantages[chunk],
            self.active[chunk],
            1.0,
            options,
            entropy=entropy,
            token_weights=self.weights[chunk],
            **{name: None if x is None else x[chunk] for name, x in self.extras.items()},
            **out,
        )


def select_tokens(
    mask: torch.Tensor,
    scalar: float | torch.Tensor,
    options: PolicyOptions,
    host_sync: bool,
    ignore_index: int,
    *,
    targets: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    **extras: torch.Tensor | None,
) -> PolicyTokens:
    """The unmasked tokens of [B, T] tensors; all of them, masked ones with weight 0, where the host may not wait."""
    if isinstance(scalar, torch.Tensor):
        weights = torch.where(scalar > 0, 1 / scalar.float(), 0.0).expand(mask.shape)
    else:
        weights = torch.full_like(mask, 1 / scalar, dtype=torch.float32)
    if options.aggregation == "seq-mean-token-mean":
        weights = weights / mask.sum(1, keepdim=True).clamp_min(1)
    rows, n = None, mask.numel()
    if not host_sync:
        targets = torch.where(mask.flatten(), targets, ignore_index)
    else:
        active = mask
        if options.kl_coef == 0 and options.entropy_coef == 0 and extras.get("drift_weights") is None:
            active = mask & (advantages != 0)
        with_gradient = active.flatten().nonzero().squeeze(1)
        rows = torch.cat((with_gradient, (mask & ~active).flatten().nonzero().squeeze(1)))
        n = len(with_gradient)

    def chosen(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else take(x.detach().flatten(), rows).contiguous()

    given = {"targets": targets, "active": mask, "old_logprobs": old_logprobs, "advantages": advantages}
    picked: dict[str, Any] = {name: chosen(x) for name, x in (given | {"weights": weights}).items()}
    return PolicyTokens(rows=rows, extras={k: chosen(x) for k, x in extras.items()}, with_gradient=n, **picked)


def in_fp16_range(tokens: PolicyTokens) -> tuple[PolicyTokens, torch.Tensor]:
    """The tokens with weights near 1, whose slopes fp16 can hold, and the power of 2 that was taken out of them."""
    largest = torch.where(tokens.active, tokens.weights, 0.0).amax()
    unit = torch.where(largest > 0, torch.exp2(torch.ceil(torch.log2(largest))), 1.0)
    return replace(tokens, weights=tokens.weights / unit), unit
