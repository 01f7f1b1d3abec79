"""The three seams of the system, where one implementation can take another's place by configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ctrl_hpc.records import Chat, Execution, Generation, Sampling, Verdict

EVALUATION = 10**12
"""Weight versions from here on are evaluation's, milliseconds since 1970: newer than whatever a server holds."""


class Generator(Protocol):
    """Answers chats: the rollout array, an OpenAI-compatible endpoint, or the oracle."""

    def complete(self, chats: Sequence[Chat], sampling: Sampling) -> list[list[Generation]]:
        """``sampling.n`` completions for each chat, in order."""
        ...


class Executor(Protocol):
    """Runs programs against tests: a local ``Sandbox``, or the executor array over HTTP."""

    def run_many(self, executions: Sequence[Execution]) -> list[Verdict]:
        """A verdict for each execution, in order; an environment fault that persists is ``sandbox_error``."""
        ...


class Engine(Protocol):
    """A model behind the rollout server: token ids in, token ids and log-probs out."""

    version: int
    max_positions: int
    """Longest prompt and completion together, in tokens."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sequence[Sampling]) -> list[Generation]:
        """One completion for each prompt (``n`` and per-request seeds are resolved by the caller)."""
        ...

    def load_weights(self, folder: str, version: int) -> None:
        """Replace the weights by those of a Hugging Face folder of the same architecture."""
        ...
