"""A loss and a reward of one's own: ``rl.loss=objective.py:loss rl.reward=objective.py:reward``."""

from torch import Tensor

from ctrl_hpc.config import RLConfig
from ctrl_hpc.records import Critique, Problem, Revision, Solution


def loss(logprobs_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, options: RLConfig) -> Tensor:
    """A term for each token, [B, T]: REINFORCE that forgets a token whose probability has left its old one too far."""
    near_BT = (logprobs_BT.detach() - old_BT).abs() < options.clip_high
    return -advantages_BT * logprobs_BT * near_BT


def reward(problem: Problem, draft: Solution, critique: Critique, revision: Revision) -> float:
    """1 for a revision that passes, less a little for every word over 50."""
    too_long = max(0, len(critique.text.split()) - 50)
    return float(revision.verdict.accepted) - 0.001 * too_long
