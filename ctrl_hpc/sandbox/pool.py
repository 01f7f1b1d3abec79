"""The executor of this machine: a pool of workers, each with its own jails, behind one queue."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path

from ctrl_hpc.records import Execution, Limits, TestCase, Verdict
from ctrl_hpc.sandbox import judge, rootfs
from ctrl_hpc.sandbox.jail import JailFault
from ctrl_hpc.sandbox.worker import Worker

Task = Execution | tuple[str, Sequence[TestCase], Limits]


class Sandbox:
    """Runs untrusted programs against tests. Close it, or use it as a context manager.

    ``workers`` programs run at once. ``fresh`` gives every program a jail of its own instead of a warm one. Raises
    ValueError, with what is missing, where this machine cannot isolate programs.
    """

    def __init__(self, workers: int = 2, *, fresh: bool = False, root_parent: Path | None = None) -> None:
        if workers < 1:
            raise ValueError(f"workers: {workers} is less than 1")
        root = rootfs.ensure(root_parent)
        self.workers = workers
        self._queue: queue.SimpleQueue[tuple[Execution, Future[Verdict]] | None] = queue.SimpleQueue()
        self._closed = False
        first = Worker(root, fresh)
        try:
            first.jail()
        except JailFault as error:
            raise ValueError(f"cannot isolate programs here: {error}") from None
        pool = [first, *(Worker(root, fresh) for _ in range(workers - 1))]
        self._threads = [
            threading.Thread(target=self._serve, args=(worker,), name=f"sandbox-{index}", daemon=True)
            for index, worker in enumerate(pool)
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self, worker: Worker) -> None:
        try:
            while (item := self._queue.get()) is not None:
                execution, future = item
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(worker.execute(execution))
                    except BaseException as error:  # noqa: BLE001 (delivered to whoever waits for the future)
                        future.set_exception(error)
        finally:
            worker.close()

    def submit(self, execution: Execution) -> Future[Verdict]:
        """Queue an execution; its verdict comes with the future."""
        if self._closed:
            raise ValueError("the sandbox is closed")
        judge.comparison(execution.comparison)
        future: Future[Verdict] = Future()
        self._queue.put((execution, future))
        return future

    def run_tests(
        self,
        program: str,
        tests: Sequence[TestCase],
        limits: Limits | None = None,
        *,
        stop_at_first_failure: bool = False,
        comparison: str = "exact",
    ) -> Verdict:
        """Run one program against its tests and judge it."""
        execution = Execution(
            program=program,
            tests=tuple(tests),
            limits=limits or Limits(),
            comparison=comparison,
            stop_at_first_failure=stop_at_first_failure,
        )
        return self.submit(execution).result()

    def run_many(self, executions: Iterable[Task]) -> list[Verdict]:
        """A verdict for each execution, or ``(program, tests, limits)``, in order; all workers are kept busy."""
        futures = [self.submit(_as_execution(task)) for task in executions]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise

    def close(self) -> None:
        """Finish what runs, drop what waits, end the jails."""
        if self._closed:
            return
        self._closed = True
        while not self._queue.empty():
            item = self._queue.get()
            if item is not None:
                item[1].cancel()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()


def _as_execution(task: Task) -> Execution:
    if isinstance(task, Execution):
        return task
    program, tests, limits = task
    return Execution(program=program, tests=tuple(tests), limits=limits)
