"""Log-probs, advantages and the losses of reinforcement learning on language models, fused in Triton.

Every function takes ``backend="auto" | "triton" | "torch"``: auto is Triton on CUDA tensors and plain PyTorch
elsewhere. The choices of its options are here as types (``Estimator``) and as tuples (``ESTIMATORS``).
"""

from ctrl_kernels.advantages import gae, group_advantages
from ctrl_kernels.linear_logprobs import linear_token_logprobs
from ctrl_kernels.linear_policy_loss import linear_policy_loss
from ctrl_kernels.options import (
    AGGREGATIONS,
    BACKENDS,
    ESTIMATORS,
    KL_ESTIMATORS,
    OBJECTIVES,
    RATIOS,
    Aggregation,
    Backend,
    Estimator,
    KlEstimator,
    Objective,
    PolicyOptions,
    Ratio,
    SoftmaxOptions,
    resolve_backend,
)
from ctrl_kernels.policy_loss import covariance_tokens, policy_loss
from ctrl_kernels.token_logprobs import token_logprobs
from ctrl_kernels.value_loss import value_loss

__version__ = "0.2.0"

__all__ = [
    "AGGREGATIONS",
    "BACKENDS",
    "ESTIMATORS",
    "KL_ESTIMATORS",
    "OBJECTIVES",
    "RATIOS",
    "Aggregation",
    "Backend",
    "Estimator",
    "KlEstimator",
    "Objective",
    "PolicyOptions",
    "Ratio",
    "SoftmaxOptions",
    "covariance_tokens",
    "gae",
    "group_advantages",
    "linear_policy_loss",
    "linear_token_logprobs",
    "policy_loss",
    "resolve_backend",
    "token_logprobs",
    "value_loss",
]
