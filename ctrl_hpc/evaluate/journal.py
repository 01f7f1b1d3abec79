"""Work in parts, written down answer by answer: who is killed loses the requests in flight and nothing else.

Every answer that arrives is appended to ``FILE.journal`` and synced before the next step uses it. When all parts are
done the records are written to ``FILE`` in order and the journal goes. What is not in the journal is asked for anew,
with the same seeds, so that a run that was killed and one that was not end with the same records.
"""

from __future__ import annotations

import json
import os
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Self

from ctrl_hpc import jsonl


class Journal:
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

        They come back as they are read, so that later steps see the same data after a kill as without one.
        """
        with self._lock:
            known = self._known.get((step, part))
        if known is None:
            known = [jsonl.encode(item) for item in make()]
            line = json.dumps({"step": step, "part": part, "records": known}, separators=(",", ":")) + "\n"
            with self._lock:
                self._out.write(line.encode())
                self._out.flush()
                os.fsync(self._out.fileno())
                self._known[step, part] = known
        return [jsonl.decode(record, item) for item in known]


def _whole_lines(file: Path) -> bytes:
    content = file.read_bytes() if file.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def in_parts[T, R](
    file: Path,
    record: type[R],
    items: Sequence[T],
    make: Callable[[Sequence[T], int, Journal], list[R]],
    *,
    size: int,
    at_once: int,
    tell: Callable[[int, int], None] | None = None,
) -> list[R]:
    """The records of a file; when it is not there, ``make(items[i * size : (i + 1) * size], i, journal)`` for every i.

    ``at_once`` parts are made at a time, each in a thread. ``make`` goes through the journal for whatever it asks.
    ``tell`` hears how many items are done, of how many, after each part.
    """
    place = file.with_name(file.name + ".journal")
    if not file.exists():
        parts = [items[start : start + size] for start in range(0, len(items), size)]
        with Journal(place) as journal:
            jobs = [_job(make, part, number, journal) for number, part in enumerate(parts)]
            made = _concurrently(jobs, at_once, lambda done: tell and tell(min(done * size, len(items)), len(items)))
            jsonl.write(file, [item for part in made for item in part])
    place.unlink(missing_ok=True)
    return jsonl.read(record, file)


def _job[T, R](
    make: Callable[[Sequence[T], int, Journal], list[R]], part: Sequence[T], number: int, journal: Journal
) -> Callable[[], list[R]]:
    return lambda: make(part, number, journal)


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
