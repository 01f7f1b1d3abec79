"""What a request may ask: prompts a model has room for, and sampling within its ranges."""

from __future__ import annotations

from collections.abc import Sequence

from ctrl_hpc.records import Sampling


def check_prompts(prompts: Sequence[Sequence[int]], max_positions: int, vocabulary: int) -> None:
    """Raise ValueError for a prompt that is empty, too long, or holds an id outside the vocabulary."""
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} is empty")
        if len(prompt) >= max_positions:
            raise ValueError(f"prompt {number} has {len(prompt)} tokens; the model has {max_positions} positions")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise ValueError(f"prompt {number} holds a token id outside the vocabulary of {vocabulary}")


def check_sampling(sampling: Sampling) -> None:
    """Raise ValueError for a value outside its range."""
    if sampling.temperature < 0:
        raise ValueError(f"temperature={sampling.temperature}: must be >= 0")
    if not 0 < sampling.top_p <= 1:
        raise ValueError(f"top_p={sampling.top_p}: must be in (0, 1]")
    if sampling.max_tokens < 1:
        raise ValueError(f"max_new_tokens={sampling.max_tokens}: must be >= 1")
    if sampling.n < 1:
        raise ValueError(f"n={sampling.n}: must be >= 1")
    if sampling.seed is not None and sampling.seed < 0:
        raise ValueError(f"seed={sampling.seed}: must be >= 0")
