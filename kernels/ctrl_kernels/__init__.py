"""Log-probs, advantages and the policy loss of reinforcement learning on language models, fused in Triton.

Every function takes ``backend="auto" | "triton" | "torch"``: auto is Triton on CUDA tensors and plain PyTorch
elsewhere.
"""

from ctrl_kernels.advantages import group_advantages
from ctrl_kernels.backend import resolve_backend
from ctrl_kernels.generalized_advantage import gae
from ctrl_kernels.linear_logprobs import linear_token_logprobs
from ctrl_kernels.linear_loss import linear_policy_loss
from ctrl_kernels.logprobs import token_logprobs
from ctrl_kernels.loss import policy_loss

__all__ = [
    "gae",
    "group_advantages",
    "linear_policy_loss",
    "linear_token_logprobs",
    "policy_loss",
    "resolve_backend",
    "token_logprobs",
]
