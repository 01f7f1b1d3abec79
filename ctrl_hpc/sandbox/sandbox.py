"""The executor of this machine: a pool of workers, each with its own jails, behind one queue."""

from __future__ import annotations

import contextlib
import hashlib
import queue
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ctrl_hpc.records import Execution, Limits, StoredTests, TestCase, TestResult, Verdict
from ctrl_hpc.records.verdicts import answered, fault
from ctrl_hpc.sandbox import judge, languages, memory, probe, rootfs
from ctrl_hpc.sandbox.cache import VerdictCache, lasting
from ctrl_hpc.sandbox.course import Course
from ctrl_hpc.sandbox.inside import files as inside_files
from ctrl_hpc.sandbox.jail import JailFault, check_open_files
from ctrl_hpc.sandbox.languages import Binaries
from ctrl_hpc.sandbox.memory import Watchdog
from ctrl_hpc.sandbox.worker import Worker
from ctrl_hpc.store.segments import Tolerant
from ctrl_hpc.store.tests import TestStore

_Item = tuple[Callable[[Worker], Any], Future[Any]]
Task = Execution | tuple[str, Sequence[TestCase], Limits]


class Sandbox:
    """Runs untrusted programs against tests. Close it, or use it as a context manager.

    ``workers`` programs run at once; the tests of one are spread over workers that have nothing else to do. ``fresh``
    gives every program a jail of its own instead of a warm one. With a ``cache_dir`` verdicts are kept there, and
    identical programs that are in flight together run once. The memory of a program's processes together is bounded by
    a cgroup where one can be made (unless ``use_cgroup`` is false), and by a watchdog elsewhere. ``judges`` are special
    judges by name, see ``ctrl_hpc.sandbox.judge``. Programs run with the interpreter ``python`` ("": this one) and may
    import ``packages`` of its, see ``ctrl_hpc.sandbox.interpreter``.
    ``tests`` has those that executions only name; it is closed by whoever made it. ``testlib`` is the ``testlib.h``
    that checkers include.

    Raises ValueError, with what is missing, where this machine cannot isolate programs.
    """

    def __init__(
        self,
        workers: int = 2,
        *,
        fresh: bool = False,
        cache_dir: str | Path | None = None,
        cache_mb: int = 1024,
        use_cgroup: bool = True,
        root_parent: Path | None = None,
        judges: Mapping[str, judge.Comparison] | None = None,
        python: str = "",
        packages: Sequence[str] = rootfs.DEFAULT_PACKAGES,
        tests: TestStore | None = None,
        testlib: str | Path = "",
    ) -> None:
        if workers < 1:
            raise ValueError(f"workers: {workers} is less than 1")
        check_open_files(workers)
        contents = rootfs.contents(python, packages)
        root = rootfs.ensure(root_parent, contents)
        self.workers = workers
        self.counts: Counter[str] = Counter()
        """Executions and tests run, cache hits, and executions that joined one in flight."""
        self.tests = tests or TestStore()
        self._judges = dict(judges or {})
        self._testlib = languages.testlib(testlib)
        self._cache: VerdictCache | None = None
        self._unless_disk_fails = Tolerant("verdict cache")
        if cache_dir is not None:
            special = judge.digest(self._judges) + hashlib.sha256(self._testlib.encode()).hexdigest()
            self._cache = VerdictCache(Path(cache_dir), cache_mb, special, contents.identity())
        self._queue: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._in_flight: dict[str, Future[Verdict]] = {}
        self._unfinished = self._idle = 0
        self._closed = False
        hierarchy = memory.memory_groups() if use_cgroup else None
        self.binaries = Binaries((root_parent or rootfs.default_parent()) / "binaries")
        """Compiled programs."""
        self._watchdog = Watchdog()
        pool = [
            Worker(root, self._watchdog, hierarchy, fresh, self._judges, self.binaries, self._testlib)
            for _ in range(workers)
        ]
        try:
            pool[0].start()
        except JailFault as error:
            for worker in pool:
                worker.close()
            self._watchdog.close()
            found = probe.complaint(probe.probe(root_parent)) or str(error)
            raise ValueError(f"cannot isolate programs here: {found}") from None
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

    @property
    def alive(self) -> bool:
        """Whether all that is submitted will be answered: every worker's thread and the watchdog run."""
        return self._watchdog.alive and all(thread.is_alive() for thread in self._threads)

    @property
    def unfinished(self) -> int:
        """Executions that wait or run."""
        return self._unfinished

    def _next_item(self) -> _Item | None:
        with self._lock:
            self._idle += 1
        item = self._queue.get()
        with self._lock:
            self._idle -= 1
        return item

    def _recruit(self, course: Course) -> None:
        """Let a worker that has nothing else to do help with a program's tests."""
        if self._idle > self._queue.qsize():
            self._queue.put((lambda worker: worker.help(course), Future()))

    def _serve(self, worker: Worker) -> None:
        try:
            while (item := self._next_item()) is not None:
                job, future = item
                if future.set_running_or_notify_cancel():
                    try:
                        future.set_result(job(worker))
                    except BaseException as error:  # noqa: BLE001 (delivered to whoever waits for the future)
                        future.set_exception(error)
        finally:
            worker.close()

    def _verdict(self, execution: Execution, key: str, worker: Worker) -> Verdict:
        if self._cache is not None:
            known = self._unless_disk_fails(partial(self._cache.get, key))
            if known is not None:
                self._count(cache_hits=1)
                return known
        if isinstance(execution.tests, StoredTests):
            try:
                here = execution.tests.read() if execution.tests.store else self.tests.load(execution.tests.sha256)
            except (ValueError, OSError) as error:
                return fault(execution, str(error))
            execution = replace(execution, tests=here)
        whole = worker.execute(execution, self._recruit)
        self._count(executions=1, tests=sum(test.status != "not_run" for test in whole.tests))
        verdict = answered(execution, whole)
        if self._cache is not None and lasting(execution, whole):
            self._unless_disk_fails(partial(self._cache.put, key, verdict))
        return verdict

    def _count(self, **amounts: int) -> None:
        with self._lock:
            self.counts.update(amounts)

    def check(self, execution: Execution) -> None:
        """ValueError names the comparison or language that there is not, or the limit that is out of range."""
        languages.language(execution.language)
        languages.check_checker(execution.checker, self._testlib)
        judge.check(execution, self._judges)

    def submit(self, execution: Execution) -> Future[Verdict]:
        """Queue an execution; its verdict comes with the future. Raises ValueError as :meth:`check` does."""
        self.check(execution)
        key = self._cache.key(execution) if self._cache is not None else ""
        future: Future[Verdict] = Future()
        with self._lock:
            leader = self._in_flight.get(key) if key else None
            if leader is not None:
                self.counts["joined"] += 1
            else:
                leader = self._enqueue(partial(self._verdict, execution, key), key)
                if key:
                    self._in_flight[key] = leader
        leader.add_done_callback(lambda done: _pass_on(done, future))
        return future

    def submit_program(
        self,
        program: str,
        stdin: str,
        limits: Limits,
        files: dict[str, str],
        fetch: Sequence[str],
        *,
        language: str | None = None,
        compile_timeout_s: float | None = None,
    ) -> Future[tuple[TestResult, dict[str, str]]]:
        """Queue a program that runs among files (base64 by path) and whose files are fetched; never cached.

        Raises ValueError for a path that leads out of the working folder, and as :meth:`check` does.
        """
        fetch = list(dict.fromkeys(fetch))
        inside_files.check(files, fetch)
        execution = Execution(
            program=program, tests=(), limits=limits, language=language, compile_timeout_s=compile_timeout_s
        )
        self.check(execution)
        with self._lock:
            return self._enqueue(lambda worker: worker.run_program(execution, stdin, files, fetch), "")

    def _enqueue[R](self, job: Callable[[Worker], R], key: str) -> Future[R]:
        """Queue a job; call with the lock held."""
        if self._closed:
            raise ValueError("the sandbox is closed")
        future: Future[R] = Future()
        future.add_done_callback(lambda _: self._finished(key))
        self._unfinished += 1
        self._queue.put((job, future))
        return future

    def _finished(self, key: str) -> None:
        with self._lock:
            self._unfinished -= 1
            self._in_flight.pop(key, None)

    def run_tests(
        self,
        program: str,
        tests: Sequence[TestCase],
        limits: Limits | None = None,
        *,
        stop_at_first_failure: bool = False,
        comparison: str = "exact",
        preamble: str = "",
        language: str | None = None,
    ) -> Verdict:
        """Run one program against its tests and judge it."""
        execution = Execution(
            program=program,
            tests=tuple(tests),
            limits=limits or Limits(),
            comparison=comparison,
            preamble=preamble,
            language=language,
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
        with self._lock:
            self._closed = True
        with contextlib.suppress(queue.Empty):
            while (item := self._queue.get_nowait()) is not None:
                item[1].cancel()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._watchdog.close()
        if self._cache is not None:
            self._unless_disk_fails(self._cache.close)


def _pass_on(done: Future[Verdict], future: Future[Verdict]) -> None:
    """Give a leader's outcome to a future that waits for it, unless that was cancelled meanwhile."""
    if done.cancelled():
        future.cancel()
        future.set_running_or_notify_cancel()
    elif future.set_running_or_notify_cancel():
        error = done.exception()
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(done.result())


def _as_execution(task: Task) -> Execution:
    if isinstance(task, Execution):
        return task
    program, tests, limits = task
    return Execution(program=program, tests=tuple(tests), limits=limits)
