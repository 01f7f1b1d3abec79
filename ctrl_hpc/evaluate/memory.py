"""A generator and an executor that remember: an evaluation asks for the same revision and verdict many times."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from ctrl_hpc.protocols import Executor, Generator
from ctrl_hpc.records import Chat, Execution, Generation, Sampling, TestCase, Verdict


class RememberingGenerator:
    """A generator whose greedy completions are asked for once. What is sampled is passed on.

    For a model whose weights do not change as long as this object lives.
    """

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._answers: dict[bytes, list[Generation]] = {}

    def complete(self, chats: Sequence[Chat], sampling: Sampling) -> list[list[Generation]]:
        """``sampling.n`` completions for each chat, in order."""
        if sampling.temperature > 0.0:
            return self._generator.complete(chats, sampling)
        keys = [_key(chat, sampling) for chat in chats]
        unknown = {key: chat for key, chat in zip(keys, chats, strict=True) if key not in self._answers}
        if unknown:
            answers = self._generator.complete(list(unknown.values()), sampling)
            self._answers.update(zip(unknown, answers, strict=True))
        return [self._answers[key] for key in keys]


def _key(chat: Chat, sampling: Sampling) -> bytes:
    parts = [f"{sampling.max_tokens} {sampling.n}"]
    parts += [f"{message.role} {len(message.content)} {message.content}" for message in chat]
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).digest()


class RememberingExecutor:
    """An executor that runs the same program against the same tests once. Environment faults are not remembered."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._verdicts: dict[tuple[str, int], Verdict] = {}
        self._tests: list[tuple[TestCase, ...]] = []  # keeps alive the tests whose identity is a key

    def run_many(self, executions: Sequence[Execution]) -> list[Verdict]:
        """A verdict for each execution, in order."""
        keys = [(execution.program, id(execution.tests)) for execution in executions]
        unknown = {key: item for key, item in zip(keys, executions, strict=True) if key not in self._verdicts}
        fresh = dict(zip(unknown, self._executor.run_many(list(unknown.values())), strict=True)) if unknown else {}
        out = [self._verdicts[key] if key in self._verdicts else fresh[key] for key in keys]
        for key, verdict in fresh.items():
            if verdict.status != "sandbox_error":
                self._verdicts[key] = verdict
                self._tests.append(unknown[key].tests)
        return out
