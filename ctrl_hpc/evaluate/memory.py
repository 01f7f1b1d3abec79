"""A generator and an executor that remember: an evaluation asks for the same revision and verdict many times."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future

from ctrl_hpc.protocols import Executor, Generator
from ctrl_hpc.records import Chat, Execution, Generation, Sampling, TestCase, Verdict


class Memory[K: Hashable, T, R]:
    """Answers by key: each is asked for once, whichever of several threads comes first."""

    def __init__(self) -> None:
        self._answers: dict[K, Future[R]] = {}
        self._lock = threading.Lock()

    def ask(self, keys: Sequence[K], items: Sequence[T], make: Callable[[list[T]], list[R]]) -> list[R]:
        """The answer for each item, in order; ``make`` is called for the unknown ones, once each.

        When it fails, they are unknown again, and whoever waits for them gets the failure too.
        """
        mine: dict[K, tuple[T, Future[R]]] = {}
        with self._lock:
            for key, item in zip(keys, items, strict=True):
                if key not in self._answers:
                    future: Future[R] = Future()
                    self._answers[key] = future
                    mine[key] = (item, future)
            wanted = [self._answers[key] for key in keys]
        if mine:
            try:
                answers = make([item for item, _ in mine.values()])
            except BaseException as error:
                self.forget(mine)
                for _, future in mine.values():
                    future.set_exception(error)
                raise
            for (_, future), answer in zip(mine.values(), answers, strict=True):
                future.set_result(answer)
        return [future.result() for future in wanted]

    def forget(self, keys: Iterable[K]) -> None:
        """Ask for these again the next time."""
        with self._lock:
            for key in keys:
                self._answers.pop(key, None)


class RememberingGenerator:
    """A generator whose greedy completions are asked for once. What is sampled is passed on.

    For a model whose weights do not change as long as this object lives.
    """

    def __init__(self, generator: Generator) -> None:
        self._generator = generator
        self._memory: Memory[bytes, Chat, list[Generation]] = Memory()

    def complete(self, chats: Sequence[Chat], sampling: Sampling) -> list[list[Generation]]:
        """``sampling.n`` completions for each chat, in order."""
        if sampling.temperature > 0.0:
            return self._generator.complete(chats, sampling)
        keys = [_key(chat, sampling) for chat in chats]
        return self._memory.ask(keys, chats, lambda unknown: self._generator.complete(unknown, sampling))


def _key(chat: Chat, sampling: Sampling) -> bytes:
    parts = [f"{sampling.max_tokens} {sampling.n}"]
    parts += [f"{message.role} {len(message.content)} {message.content}" for message in chat]
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).digest()


class RememberingExecutor:
    """An executor that runs the same program against the same tests once. Environment faults are not remembered."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._memory: Memory[tuple[str, int], Execution, Verdict] = Memory()
        self._tests: dict[int, tuple[TestCase, ...]] = {}  # keeps alive the tests whose identity is a key

    def run_many(self, executions: Sequence[Execution]) -> list[Verdict]:
        """A verdict for each execution, in order."""
        self._tests.update((id(execution.tests), execution.tests) for execution in executions)
        keys = [(execution.program, id(execution.tests)) for execution in executions]
        verdicts = self._memory.ask(keys, executions, self._executor.run_many)
        faults = [key for key, verdict in zip(keys, verdicts, strict=True) if verdict.status == "sandbox_error"]
        self._memory.forget(faults)
        return verdicts
