"""What a server is asked beyond ``Sampling``, what it gives back beyond ``Generation``, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Protocol

from ctrl_hpc.records import Generation, Sampling

GREEDY_BELOW = 1e-6
"""A temperature below is greedy decoding, as with SGLang: its inverse would leave float32."""
_MAX_TOP_LOGPROBS = 128
"""Most log-probs of other tokens that a position is given with."""
_MAX_N = 4096
"""Most completions of one prompt in a request."""

TopLogprobs = tuple[tuple[int, float], ...]
"""The likeliest tokens of a position with their log-probs, likeliest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding(Sampling):
    """Sampling parameters of the field's servers; the defaults change nothing."""

    top_k: int = 0
    """Only the k likeliest tokens are drawn, >= 1; 0: all."""
    min_p: float = 0.0
    """Only tokens of at least this share of the likeliest one's probability are drawn, in [0, 1]."""
    repetition_penalty: float = 1.0
    """Logits of tokens of the prompt and the completion are divided by it where positive, multiplied else; > 0."""
    frequency_penalty: float = 0.0
    """Taken off a token's logit for every time it is in the completion, in [-2, 2]."""
    presence_penalty: float = 0.0
    """Taken off the logits of the tokens in the completion, in [-2, 2]."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Added to the logits of these tokens, in [-100, 100]."""
    min_tokens: int = 0
    """A completion does not end by a stop token or a stop string before it has as many; >= 0."""
    ignore_eos: bool = False
    """The model's own stop tokens do not end the completion."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the completion, beside the model's own."""
    top_logprobs: int = 0
    """Log-probs of that many likeliest tokens are given at every position, >= 0."""
    prompt_logprobs: bool = False
    """Whether the prompt's log-probs are given too."""

    @classmethod
    def of(cls, sampling: Sampling) -> Decoding:
        """A ``Sampling`` with nothing else asked."""
        if isinstance(sampling, Decoding):
            return sampling
        return cls(**{field.name: getattr(sampling, field.name) for field in fields(Sampling)})

    @property
    def adjusts_logits(self) -> bool:
        """Whether the logits are changed before anything is drawn."""
        return (
            self.repetition_penalty != 1.0
            or self.frequency_penalty != 0.0
            or self.presence_penalty != 0.0
            or bool(self.logit_bias)
            or self.min_tokens > 0
        )

    @property
    def cuts(self) -> bool:
        """Whether unlikely tokens are never drawn."""
        return self.temperature > 0.0 and (self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0)

    def stop_ids(self, of_model: frozenset[int]) -> frozenset[int]:
        """The tokens that end the completion."""
        return (frozenset() if self.ignore_eos else of_model) | frozenset(self.stop_token_ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion(Generation):
    """A ``Generation`` with what ``Decoding`` may ask for."""

    top_logprobs: tuple[TopLogprobs, ...] = ()
    """For each token of the completion."""
    prompt_logprobs: tuple[float, ...] = ()
    """For each token of the prompt but the first, given those before it, at temperature 1."""
    prompt_top_logprobs: tuple[TopLogprobs, ...] = ()
    """For each token of the prompt but the first."""
    matched: str | int | None = None
    """The stop string or stop token that ended it."""


class Follower:
    """Goes along with one completion while it is decoded, from another thread: ends it, or sees its tokens come."""

    __slots__ = ("aborted", "rid", "watches")

    def __init__(self, rid: str = "", *, watches: bool = False) -> None:
        """``rid``: the request's id; ``watches``: ``token`` is to be called."""
        self.rid, self.watches = rid, watches
        self.aborted = False
        """Set by any thread: the completion ends with what it has."""

    def token(self, token: int, logprob: float, top: TopLogprobs) -> bool:
        """Called for each token as it comes; True ends the completion."""
        return False

    def restart(self) -> None:
        """The tokens come anew, the same ones: a batch mate's fault ended the decoding."""


class Engine(Protocol):
    """A model behind the rollout server: token ids in, token ids and log-probs out."""

    version: int
    max_positions: int
    """Longest prompt and completion together, in tokens."""
    vocabulary: int
    """Token ids are below it."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[Sampling],
        followers: Sequence[Follower] | None = None,
    ) -> list[Completion]:
        """One completion for each prompt (``n`` and per-request seeds are resolved by the caller)."""
        ...

    def load_weights(self, folder: str, version: int) -> None:
        """Replace the weights by those of a Hugging Face folder of the same architecture."""
        ...


def check_prompts(prompts: Sequence[Sequence[int]], max_positions: int, vocabulary: int) -> None:
    """Raise ValueError for a prompt that is empty, too long, or holds an id outside the vocabulary."""
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} is empty")
        if len(prompt) >= max_positions:
            raise ValueError(f"prompt {number} has {len(prompt)} tokens; the model has {max_positions} positions")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise ValueError(f"prompt {number} holds a token id outside the vocabulary of {vocabulary}")


def check_decoding(decoding: Decoding, vocabulary: int) -> None:
    """Raise ValueError for a value outside its range."""
    _within("temperature", decoding.temperature, 0.0, 1e6)
    if not 0 < decoding.top_p <= 1:
        raise ValueError(f"top_p={decoding.top_p}: must be in (0, 1]")
    _within("min_p", decoding.min_p, 0.0, 1.0)
    if not 1e-6 <= decoding.repetition_penalty <= 1e6:
        raise ValueError(f"repetition_penalty={decoding.repetition_penalty}: must be in [1e-06, 1e+06]")
    _within("frequency_penalty", decoding.frequency_penalty, -2.0, 2.0)
    _within("presence_penalty", decoding.presence_penalty, -2.0, 2.0)
    _within("max_new_tokens", decoding.max_tokens, 0, None)
    _within("min_tokens", decoding.min_tokens, 0, None)
    _within("n", decoding.n, 1, _MAX_N)
    _within("top_k", decoding.top_k, 0, None)
    _within("top_logprobs", decoding.top_logprobs, 0, min(_MAX_TOP_LOGPROBS, vocabulary))
    if decoding.seed is not None:
        _within("seed", decoding.seed, 0, 2**63 - 1)
    for token, bias in decoding.logit_bias:
        _within(f"logit_bias of token {token}", bias, -100.0, 100.0)
    for name, ids in (("logit_bias", [token for token, _ in decoding.logit_bias]), ("stop", decoding.stop_token_ids)):
        for token in ids:
            if not 0 <= token < vocabulary:
                raise ValueError(f"{name}: token {token} is outside the vocabulary of {vocabulary}")


def _within(name: str, value: float, low: float, high: float | None) -> None:
    if not (math.isfinite(value) and low <= value and (high is None or value <= high)):
        allowed = f">= {low:g}" if high is None or (high >= 1e6 and low >= 0) else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name}={value}: must be {allowed}")
