"""How much a step of RL computes and asks for, from the configuration alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ctrl_hpc.config import Config
from ctrl_hpc.config.objectives import LOSSES, at_step


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Of a rollout step at most: an episode may end before its last turn, a group may have nothing to learn from."""

    critiques: int
    revisions: float
    """Critiques that are revised and executed, in the mean over the steps: all but those of ``verdict_only_share``."""
    tokens: int
    """Through the trainer in one pass."""
    attended: float
    """Sum over these tokens of the positions that each attends to."""
    learnt: int
    """Of these tokens, those of critiques: the output layer computes no others."""
    passes: float
    """Forward passes' worth of work: an update's, and those for log-probabilities alone."""


def work(config: Config, data_size: int) -> Work:
    """A step's, with ``data_size`` data-parallel ranks."""
    rl, prompt, critique = config.rl, config.plan.prompt_tokens, critique_tokens(config)
    critiques = rl.prompts_per_step * rl.group_size * rl.turns
    # Later turns' drafts are the revisions: each has a critique of its own.
    prompts = rl.prompts_per_step * (
        math.ceil(rl.group_size / sharing(config, data_size)) + (rl.turns - 1) * rl.group_size
    )
    judged_alone = [round(rl.prompts_per_step * at_step(rl.verdict_only_share, step)) for step in range(rl.steps)]
    return Work(
        critiques=critiques,
        revisions=critiques * (1 - sum(judged_alone) / (rl.steps * rl.prompts_per_step)),
        tokens=prompts * prompt + critiques * critique,
        attended=prompts * prompt * prompt / 2 + critiques * critique * (prompt + critique / 2),
        learnt=critiques * critique,
        passes=_passes(config),
    )


def critique_tokens(config: Config) -> int:
    """Longest critique, with the thought before it."""
    return config.rl.max_tokens + config.critic.thought_room


def sharing(config: Config, data_size: int) -> int:
    """How many critiques of a draft stand behind one copy of their prompt in the trainer; 1: each has its own."""
    rl = config.rl
    if not config.trainer.shared_prefix:
        return 1
    room = (config.trainer.micro_batch_tokens - config.plan.prompt_tokens) // critique_tokens(config)
    of_a_rank = math.ceil(rl.prompts_per_step * rl.group_size * rl.turns / rl.minibatches / data_size)
    return max(1, min(rl.group_size, room, of_a_rank))


def update_passes(config: Config) -> int:
    """Forward passes' worth of an update: a backward pass is two of them, by the activations and by the weights, of
    which adapters want the first alone; with ``parallel.recompute=full`` the forward pass comes again."""
    return 2 + (0 if config.lora.rank else 1) + (1 if config.parallel.recompute == "full" else 0)


def _passes(config: Config) -> float:
    """Of a step.

    The old policy's log-probs are known for the first minibatch from its own update, but for a loss that has to choose
    tokens by them before; the reference's are a pass; a value network is asked for its values, and is updated.
    """
    rl, update = config.rl, update_passes(config)
    before = rl.loss in LOSSES and LOSSES[rl.loss].covariance
    old = 1.0 if before else 1 - 1 / rl.minibatches
    return update + old + (1 if rl.kl_coef else 0) + (1 + update if rl.estimator == "gae" else 0)
