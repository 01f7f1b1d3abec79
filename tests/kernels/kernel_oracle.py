"""Independent definitions in float64: dense, slow, and differentiated by autograd, with none of the package's code."""

import math

import torch


def dense_logprobs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    *,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of valid targets; 0 where the target is -100."""
    scores = logits[:, :vocab_size]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    logp = torch.log_softmax(scores / temperature, 1)
    kept = targets != -100
    chosen = logp.gather(1, torch.where(kept, targets.long(), 0)[:, None])[:, 0]
    finite = torch.where(logp == -math.inf, 0.0, logp)
    entropy = -(logp.exp() * finite).sum(1)
    return torch.where(kept, chosen, 0.0), torch.where(kept, entropy, 0.0)


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b| of whole tensors, in float64."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return ((a - b).norm() / b.norm().clamp_min(1e-300)).item()


def loop_gae(
    rewards: list[float], values: list[float], mask: list[int], gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """One sequence, step by step, as verl writes it."""
    advantages = [0.0] * len(rewards)
    next_value = carried = 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + gamma * next_value - values[t]
        advantage = delta + gamma * lam * carried
        next_value = values[t] if mask[t] else next_value
        carried = advantage if mask[t] else carried
        advantages[t] = carried
    return advantages, [a + v for a, v in zip(advantages, values, strict=True)]


def loop_group_advantages(rewards: list[float], groups: list[int], estimator: str, eps: float = 1e-6) -> list[float]:
    """Row by row."""
    out = []
    for reward, group in zip(rewards, groups, strict=True):
        members = [r for r, g in zip(rewards, groups, strict=True) if g == group]
        n = len(members)
        mean = math.fsum(members) / n
        if n == 1:
            out.append(0.0)
        elif estimator == "dr_grpo":
            out.append(reward - mean)
        elif estimator == "rloo":
            out.append(reward - (math.fsum(members) - reward) / (n - 1))
        else:
            deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in members) / (n - 1))
            out.append((reward - mean) / (deviation + eps))
    return out
