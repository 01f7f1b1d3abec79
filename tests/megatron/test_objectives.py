"""Every objective's gradient is that of its formula, written down here in plain torch over transformers' model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron_jobs import sequences, spawn
from objectives import ADAMW, CASES, GROUPS, REWARDS, STEPS
from torch import Tensor

from ctrl_hpc.config import RLConfig

pytestmark = pytest.mark.slow
ALL = [(name, old) for name in CASES for old in ("known", "current")]


@pytest.fixture(scope="module")
def found(workplace: Path) -> dict[int, dict[str, Any]]:
    """What the trainer computed, by its number of tensor-parallel ranks."""
    for ranks in (1, 2):
        spawn("objectives", "check", workplace, ranks)
    return {ranks: torch.load(workplace / f"objectives-{ranks}.pt") for ranks in (1, 2)}


@pytest.fixture(scope="module")
def model(workplace: Path) -> Any:
    """The same critic in transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(workplace / "models" / "qwen2-tied", dtype=torch.float32)


def pairs_of(model: Any) -> list[tuple[list[int], list[int]]]:
    return sequences(model.config.vocab_size, len(REWARDS), prompt=None)


def scored(model: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Log-probabilities and entropies of each response's tokens, one sequence at a time, without padding."""
    for prompt, response in pairs_of(model):
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        distribution = logits.log_softmax(-1)
        picked = distribution[torch.arange(len(response)), torch.tensor(response)]
        yield picked, -(distribution.exp() * distribution).sum(-1)


def group_advantage(options: RLConfig, row: int) -> float:
    """By the estimators' definitions, one critique at a time."""
    mine = [float(REWARDS[other]) for other in range(len(REWARDS)) if GROUPS[other] == GROUPS[row]]
    reward, mean, n = float(REWARDS[row]), sum(mine) / len(mine), len(mine)
    if options.estimator == "grpo":
        return (reward - mean) / ((sum((r - mean) ** 2 for r in mine) / (n - 1)) ** 0.5 + 1e-6)
    if options.estimator == "dr_grpo":
        return reward - mean
    return reward - (sum(mine) - reward) / (n - 1)  # against the mean of the others


def gae(values: Tensor, lengths: list[int], lam: float) -> tuple[list[list[float]], list[list[float]]]:
    """Advantages, whitened over all tokens, and returns; the reward comes with the last token, without discount."""
    raw: list[list[float]] = []
    for row, n in enumerate(lengths):
        carried, advantages = 0.0, [0.0] * n
        for t in reversed(range(n)):
            value = float(values[row, t])
            delta = (float(values[row, t + 1]) if t + 1 < n else float(REWARDS[row])) - value
            carried = delta + lam * carried
            advantages[t] = carried
        raw.append(advantages)
    returns = [[a + float(values[row, t]) for t, a in enumerate(advantages)] for row, advantages in enumerate(raw)]
    flat = torch.tensor([a for advantages in raw for a in advantages])
    return [[(a - float(flat.mean())) / float(flat.std()) for a in advantages] for advantages in raw], returns


def objective(model: Any, options: RLConfig, given: dict[str, Tensor], old: str) -> Tensor:
    """The loss, from its formula."""
    lengths = [len(response) for _, response in pairs_of(model)]
    whitened = gae(given["values"], lengths, options.gae_lambda)[0]
    sequence_losses, total = [], torch.zeros(())
    for row, (logprobs, entropy) in enumerate(scored(model)):
        n = lengths[row]
        old_t = given["old"][row, :n] if old == "known" else logprobs.detach()
        log_ratio = logprobs - old_t
        ratio = log_ratio.exp() if options.ratio == "token" else log_ratio.mean().exp().expand(n)
        a = torch.tensor(whitened[row]) if options.estimator == "gae" else group_advantage(options, row)
        surrogate = torch.minimum(ratio * a, ratio.clamp(1 - options.clip_low, 1 + options.clip_high) * a)
        if options.dual_clip is not None and group_advantage(options, row) < 0:
            surrogate = torch.maximum(surrogate, torch.tensor(options.dual_clip * group_advantage(options, row)))
        if options.importance_cap is not None:
            surrogate = surrogate * (old_t - given["rollout"][row, :n]).exp().clamp(max=options.importance_cap)
        gap = logprobs - given["reference"][row, :n]
        kl = {"k2": 0.5 * gap**2, "k3": (-gap).exp() + gap - 1}[options.kl_estimator]
        losses = -surrogate + options.kl_coef * kl - options.entropy_coef * entropy
        total = total + losses.sum()
        sequence_losses.append(losses.mean() if options.aggregation == "seq-mean-token-mean" else losses.sum())
    if options.aggregation == "token-mean":
        return total / sum(lengths)
    return torch.stack(sequence_losses).mean()


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(("name", "old"), ALL)
def test_the_gradient_of_an_objective_is_that_of_its_formula(
    found: dict[int, dict[str, Any]], model: Any, name: str, old: str, ranks: int
) -> None:
    ours = found[ranks]
    model.zero_grad()
    loss = objective(model, CASES[name], ours["given"], old)
    loss.backward()
    assert ours["losses"][name, old] == pytest.approx(float(loss), rel=1e-4, abs=1e-5)
    for parameter, value in model.named_parameters():
        assert error(ours["gradients"][name, old][parameter], value.grad) <= 1e-4, parameter


@pytest.mark.parametrize("name", CASES)
def test_the_cases_clip_something(found: dict[int, dict[str, Any]], name: str) -> None:
    assert found[1]["logged"][name, "known"]["clip_fraction"] > 0.05
    assert found[1]["logged"][name, "current"]["clip_fraction"] == 0


def test_the_value_network_learns_by_the_clipped_squared_error(found: dict[int, dict[str, Any]], model: Any) -> None:
    ours = found[1]
    head = ours["value_head"].clone().requires_grad_()
    old = ours["given"]["values"]
    lengths = [len(response) for _, response in pairs_of(model)]
    returns = gae(old, lengths, CASES["ppo"].gae_lambda)[1]
    model.zero_grad()
    total = torch.zeros(())
    for row, (prompt, response) in enumerate(pairs_of(model)):
        hidden = model.model(torch.tensor([[*prompt, *response]])).last_hidden_state[0, len(prompt) - 1 : -1]
        values, before = (hidden @ head.T)[:, 0], old[row, : lengths[row]]
        wanted = torch.tensor(returns[row])
        clipped = torch.maximum(torch.minimum(values, before + 0.2), before - 0.2)
        total = total + 0.5 * torch.maximum((values - wanted) ** 2, (clipped - wanted) ** 2).sum()
    loss = total / sum(lengths)
    loss.backward()
    assert ours["value_loss"] == pytest.approx(float(loss), rel=1e-4)
    expected = dict(model.named_parameters())
    vocabulary = model.config.vocab_size
    for name, gradient in ours["value_gradients"].items():
        plain = head.grad if name == "head" else expected[name].grad
        assert error(gradient[:vocabulary] if "embed" in name else gradient, plain) <= 1e-4, name


def test_steps_of_the_optimizer_are_those_of_adamw_with_clipped_gradients(
    found: dict[int, dict[str, Any]], workplace: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(workplace / "models" / "qwen2-tied", dtype=torch.float32)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    decayed = [value for value in model.parameters() if value.dim() > 1]
    kept = [value for value in model.parameters() if value.dim() == 1]  # biases and norms do not decay
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": ADAMW.weight_decay}, {"params": kept, "weight_decay": 0.0}],
        lr=ADAMW.lr,
        betas=(ADAMW.beta1, ADAMW.beta2),
        eps=ADAMW.eps,
    )
    norms = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses = [-logprobs.sum() for logprobs, _ in scored(model)]
        (torch.stack(losses).sum() / sum(len(response) for _, response in pairs_of(model))).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), ADAMW.clip_grad)))
        optimizer.step()
    assert norms[0] > ADAMW.clip_grad, "something is clipped"
    assert found[1]["norms"] == pytest.approx(norms, rel=1e-4)
    for name, value in model.named_parameters():
        assert error(found[1]["weights"][name] - before[name], value.detach() - before[name]) <= 1e-3, name
