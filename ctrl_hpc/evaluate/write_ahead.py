"""Write-ahead records of a stage, and earlier answers: one that was killed asks nothing again."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self

from ctrl_hpc import jsonl
from ctrl_hpc.flow.steps import continuing
from ctrl_hpc.records import (
    Chat,
    Execution,
    Executor,
    Generation,
    Generator,
    Sampling,
    StoredTests,
    TestCase,
    Verdict,
)


class WriteAheadLog:
    """The answers of one file that have arrived, by step and part; safe to use from several threads."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._known: dict[tuple[str, int], list[Any]] = {}
        self._lock = threading.Lock()
        whole = _whole_lines(file)
        for line in whole.splitlines():
            entry = json.loads(line)
            self._known[entry["step"], entry["part"]] = entry["records"]
        self._out = file.open("ab")
        self._out.truncate(len(whole))  # a line that was being written when the writer was killed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._out.close()

    def once[R](self, step: str, part: int, record: type[R], make: Callable[[], Sequence[R]]) -> list[R]:
        """The records of a step of a part: those written down, else what ``make`` returns, written down first.

        Asked for once in the life of a log, which does not keep them.
        They come back as they are read, so that later steps see the same data after a kill as without one.
        """
        with self._lock:
            known = self._known.pop((step, part), None)
        if known is None:
            known = [jsonl.encode(item) for item in make()]
            line = json.dumps({"step": step, "part": part, "records": known}, separators=(",", ":")) + "\n"
            with self._lock:
                self._out.write(line.encode())
                self._out.flush()
                os.fsync(self._out.fileno())
        return [jsonl.decode(record, item) for item in known]


def _whole_lines(file: Path) -> bytes:
    content = file.read_bytes() if file.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def in_parts[T, R](
    file: Path,
    record: type[R],
    items: Sequence[T],
    make: Callable[[Sequence[T], int, WriteAheadLog], list[R]],
    *,
    size: int,
    at_once: int,
    tell: Callable[[int, int], None] | None = None,
) -> list[R]:
    """The records of a file; when it is not there, ``make(items[i * size : (i + 1) * size], i, log)`` for every i.

    ``at_once`` parts are made at a time, each in a thread. ``make`` goes through the log for whatever it asks.
    ``tell`` hears how many items are done, of how many, after each part.
    """
    place = file.with_name(file.name + ".journal")
    if not file.exists():
        parts = [items[start : start + size] for start in range(0, len(items), size)]
        with WriteAheadLog(place) as log:
            jobs = [_job(make, part, number, log) for number, part in enumerate(parts)]
            made = _concurrently(jobs, at_once, lambda done: tell and tell(min(done * size, len(items)), len(items)))
            jsonl.write(file, (item for part in made for item in part))
            made.clear()  # they are read back below: once in memory, not twice
    place.unlink(missing_ok=True)
    return jsonl.read(record, file)


def _job[T, R](
    make: Callable[[Sequence[T], int, WriteAheadLog], list[R]], part: Sequence[T], number: int, log: WriteAheadLog
) -> Callable[[], list[R]]:
    return lambda: make(part, number, log)


def _concurrently[R](
    jobs: Sequence[Callable[[], R]], at_once: int, tell: Callable[[int], object] = lambda done: None
) -> list[R]:
    """The jobs' results in order; the first failure is raised as soon as it is known. ``tell`` hears how many are done.

    The threads are daemons: who is interrupted does not wait for answers in flight.
    """
    if at_once == 1 or len(jobs) < 2:
        results = []
        for job in jobs:
            results.append(job())
            tell(len(results))
        return results
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(jobs)):
        todo.put(number)
    done: queue.SimpleQueue[Future[R]] = queue.SimpleQueue()
    futures: list[Future[R]] = [Future() for _ in jobs]
    given_up = threading.Event()

    def work() -> None:
        while not given_up.is_set():
            try:
                number = todo.get_nowait()
            except queue.Empty:
                return
            future = futures[number]
            try:
                future.set_result(jobs[number]())
            except BaseException as error:  # noqa: BLE001 (delivered to the caller's thread)
                future.set_exception(error)
            done.put(future)

    for _ in range(min(at_once, len(jobs))):
        threading.Thread(target=work, name="evaluation", daemon=True).start()
    try:
        for number in range(len(jobs)):
            done.get().result()
            tell(number + 1)
    finally:
        given_up.set()
    return [future.result() for future in futures]


class _Answers[K: Hashable, T, R]:
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
        self._answers: _Answers[bytes, Chat, list[Generation]] = _Answers()

    def complete(self, chats: Sequence[Chat], sampling: Sampling) -> list[list[Generation]]:
        """``sampling.n`` completions for each chat, in order."""
        if sampling.temperature > 0.0:
            return self._generator.complete(chats, sampling)
        keys = [_key(chat, sampling) for chat in chats]
        return self._answers.ask(keys, chats, lambda unknown: self._generator.complete(unknown, sampling))

    def extend(
        self,
        chats: Sequence[Chat],
        begun: Sequence[Generation],
        text: str,
        sampling: Sequence[Sampling],
        choices: Sequence[str] = (),
    ) -> list[Generation]:
        """As the generator's own."""
        return continuing(self._generator).extend(chats, begun, text, sampling, choices)


def _key(chat: Chat, sampling: Sampling) -> bytes:
    parts = [f"{sampling.max_tokens} {sampling.n}"]
    parts += [f"{message.role} {len(message.content)} {message.content}" for message in chat]
    return hashlib.sha256("\n".join(parts).encode("utf-8", "surrogatepass")).digest()


class RememberingExecutor:
    """An executor that runs the same program against the same tests once. Environment faults are not remembered."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._answers: _Answers[tuple[str, int | str], Execution, Verdict] = _Answers()
        self._tests: dict[int, Sequence[TestCase]] = {}  # keeps alive the tests whose identity is a key

    def run_many(self, executions: Sequence[Execution]) -> list[Verdict]:
        """A verdict for each execution, in order."""
        keys = [(execution.program, self._name(execution.tests)) for execution in executions]
        verdicts = self._answers.ask(keys, executions, self._executor.run_many)
        faults = [key for key, verdict in zip(keys, verdicts, strict=True) if verdict.status == "sandbox_error"]
        self._answers.forget(faults)
        return verdicts

    def _name(self, tests: Sequence[TestCase]) -> int | str:
        if isinstance(tests, StoredTests):
            return tests.sha256
        self._tests[id(tests)] = tests
        return id(tests)
