"""The arrays of a run as long-lived services: started, watched, started again when they die, ended with the driver."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any, Self

import submitit

from ctrl_hpc.cluster.element import SERVE, leave_request, token
from ctrl_hpc.cluster.job_records import end_recorded
from ctrl_hpc.cluster.jobs import Job, Jobs
from ctrl_hpc.cluster.prefork import Prefork
from ctrl_hpc.cluster.registry import Registration, Registry, Service, new_session
from ctrl_hpc.config import Config, JobConfig
from ctrl_hpc.progress import console
from ctrl_hpc.run import disk, snapshot
from ctrl_hpc.service import access
from ctrl_hpc.store.segments import merge_small

POLL_S = 0.2
"""Seconds between looks while arrays start."""
WATCH_S = 1.0
"""Seconds between looks afterwards."""
LONGEST_WATCH_S = 4.0
"""Of many services a look takes long: the pause after it is longer then, up to this."""
STUCK_S = 45.0
"""An array that has not come up for so long is reported, again and again."""


class Services:
    """The services of one driver; a context manager that leaves no job behind.

    Entering ends what an earlier, killed driver left running. ``await_first`` returns when a role has its first
    element; later ones join as they come. A thread starts elements again that die, at most ``launch.max_restarts``
    times in a row without having served.
    """

    def __init__(self, config: Config, run_dir: str | Path) -> None:
        self.config, self.run_dir = config, Path(run_dir).absolute()
        self.session = new_session()
        launch = config.launch
        self.registry = Registry(self.run_dir, heartbeat_s=launch.heartbeat_s, dead_after_s=launch.dead_after_s)
        self.jobs = Jobs(config, self.run_dir, "services")
        self._arrays: dict[str, list[Job]] = {}
        self._served: set[str] = set()
        self._failures: dict[tuple[str, int], int] = {}
        self._given_up: set[tuple[str, int]] = set()
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._ending: list[threading.Thread] = []
        """Arrays on their way out."""
        self._driver: Registration | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> Self:
        access.make_private(self.run_dir)
        disk.await_space(self.run_dir, self.config.launch.disk_patience_s)
        self.refuse_second_driver()
        end_recorded(self.run_dir)
        self.registry.remove(lambda _: False)
        self.registry.remove_list()
        with contextlib.suppress(OSError):  # verdicts in many small files are verdicts, too
            merge_small(self.run_dir / "verdicts")
        changed = snapshot.begin(self.run_dir, self.config.launch.snapshot)
        if changed:
            console.print(changed, highlight=False, soft_wrap=True)
        token(self.run_dir)
        log = self.run_dir / "logs" / "driver.log"
        self._driver = self.registry.register(
            "driver", "", id="driver", job_id=os.environ.get("SLURM_JOB_ID", ""), log=str(log), session=self.session
        )
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # a background job may ignore SIGINT
                self._handlers[number] = signal.signal(number, _interrupt)
            sys.unraisablehook = _again
        threading.Thread(target=self._watch, name="service-watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._handlers:
            sys.unraisablehook = sys.__unraisablehook__

    def import_ahead(self, roles: Iterable[str]) -> Prefork | None:
        """Let local jobs of these roles be forked from processes that have imported what they need; does not wait.

        None where jobs are Slurm's, or have GPUs, which no process may have touched before it forks, and where this is
        not the main thread, with which they would end.
        """
        launch = self.config.launch
        gpus = {"executor": launch.executor.gpus, "trainer": launch.trainer.gpus}
        wanted = [role for role in roles if not gpus.get(role, launch.rollout.gpus)]
        if self.config.rollout.engine != "builtin":
            wanted = [role for role in wanted if role not in ("critic", "generator")]
        here = launch.engine == "local" and threading.current_thread() is threading.main_thread()
        return self.jobs.begin_prefork(wanted) if here and wanted else None

    def start(self, roles: Iterable[str]) -> None:
        """Start the arrays of these roles, all at once, and wait for the first element of each."""
        wanted = set(roles)
        self.submit(wanted)
        self.await_first(wanted)

    def submit(self, roles: Iterable[str]) -> None:
        """Start the arrays of these roles, all at once; waits for nothing but what forked jobs are forked from.

        Raises ValueError for an unknown role.
        """
        missing = set(roles) - set(self._arrays)
        for role in sorted(missing):
            if role not in SERVE:
                raise ValueError(f"{role!r} is not a service; allowed: {', '.join(SERVE)}")
        forked = [] if self.jobs.prefork is None else [role for role in self.jobs.prefork.roles if role in missing]
        wanted = [*sorted(missing - set(forked)), *forked]
        with self._lock:
            for role in wanted:
                count = self._elements(role)
                self._arrays[role] = self._submit_with_space(role, list(range(count))) if count else []

    def await_first(self, roles: Iterable[str]) -> None:
        """Return once each of these roles has had an element that served.

        Raises RuntimeError (one line, with the log's path) when an array fails.
        """
        self._wait_for_first([role for role in set(roles) - self._served if self._arrays[role]])
        with self._lock, contextlib.suppress(OSError):  # a full disk: the next look tries again
            self.registry.write_list(self.registry.census()[0])

    def keep(self, roles: Iterable[str]) -> None:
        """End the arrays of all other roles, which nothing will ask again; does not wait for their end."""
        with self._lock:
            gone = [job for role in sorted(set(self._arrays) - set(roles)) for job in self._arrays.pop(role)]
            self._served &= set(self._arrays)
            self.registry.remove(lambda service: service.role not in SERVE or service.role in self._arrays)
        if gone:
            thread = threading.Thread(target=self._end, args=(gone,), name="service-end")
            self._ending.append(thread)
            thread.start()

    def stop(self) -> None:
        """End all arrays; returns when no local process of theirs is left."""
        self._ended.set()
        for thread in self._ending:
            thread.join()
        with self._lock:
            jobs = [job for array in self._arrays.values() for job in array]
            self._arrays = {}
            self._end(jobs)
            self.registry.remove(lambda service: service.role == "driver")
            self.registry.remove_list()
        if self.jobs.prefork is not None:
            self.jobs.prefork.close()
            self.jobs.prefork = None
        if self._driver is not None:
            self._driver.close()
            self._driver = None

    def _end(self, jobs: list[Job]) -> None:
        """End jobs. On Slurm they are asked to leave first, for their accounts to say COMPLETED, not CANCELLED."""
        for job in jobs:
            if job.engine == "slurm":
                request = leave_request(self.run_dir, self.session, job.id)
                with contextlib.suppress(OSError):  # on a full disk they are cancelled
                    request.parent.mkdir(exist_ok=True)
                    request.touch()
        self.jobs.end(jobs, asked=True)
        for job in jobs:
            leave_request(self.run_dir, self.session, job.id).unlink(missing_ok=True)

    def refuse_second_driver(self) -> None:
        """Raises ValueError where another driver lives.

        A job that Slurm has started again takes over from its first start, which may live on a lost node.
        """
        own_job = os.environ.get("SLURM_JOB_ID", "")
        for service in self.registry.services():
            again = bool(own_job) and service.job_id == own_job
            if service.role == "driver" and service.pid != os.getpid() and not again:
                where = f"process {service.pid} on {service.host}"
                raise ValueError(f"{self.run_dir}: another driver ({where}) works on this run; stop it first")

    def _elements(self, role: str) -> int:
        rollout = self.config.rollout
        counts = {
            "executor": self.config.executor.elements,
            "critic": 0 if rollout.critic_urls else rollout.critic_elements,
            "generator": rollout.generator_elements,
        }
        return counts[role]

    def _submit(self, role: str, elements: list[int]) -> list[Job]:
        launch = self.config.launch
        resources: JobConfig = launch.executor if role == "executor" else launch.rollout
        threads = 1 if role == "executor" else self.config.rollout.threads
        arguments = [(self.config, str(self.run_dir), element, self.session) for element in elements]
        return self.jobs.submit(role, SERVE[role], arguments, resources, elements=elements, threads=threads)

    def _submit_with_space(self, role: str, elements: list[int]) -> list[Job]:
        while True:
            try:
                return self._submit(role, elements)
            except OSError as error:
                if error.errno not in disk.FULL:
                    raise
                disk.await_space(self.run_dir, self.config.launch.disk_patience_s)

    def _wait_for_first(self, roles: list[str]) -> None:
        began = told = time.monotonic()
        missing = set(roles)
        while missing:
            found = {service.role for service in self._mine()}
            self._served |= found  # also what is lost before the next look
            missing -= found
            for role in sorted(missing):
                self._fail_if_hopeless(role)
            waited = time.monotonic() - began
            if missing and waited > self.config.launch.start_timeout_s:
                role = sorted(missing)[0]
                raise RuntimeError(f"{role}: no element of the array came up in {waited:.0f} s; {self._where(role)}")
            if missing and time.monotonic() - told > STUCK_S:
                told = time.monotonic()
                for role in sorted(missing):
                    states = ", ".join(sorted({self.jobs.state(job) for job in self._arrays[role]}))
                    console.print(f"{role}: still waiting after {waited:.0f} s (jobs: {states}); {self._where(role)}")
            if missing:
                time.sleep(POLL_S)

    def _fail_if_hopeless(self, role: str) -> None:
        """An array all of whose elements ended before any served: say what the last one said."""
        jobs = self._arrays[role]
        if role in self._served or any(self.jobs.state(job) != "ended" for job in jobs):
            return
        if any(service.role == role for service in self._mine()):
            return
        words = f"{role}: the array ended before it served: {jobs[-1].last_words()} ({self._where(role)})"
        starts = self._failures[role, -1] = self._failures.get((role, -1), 0) + 1
        failed = any(outcome[0] == "error" for job in jobs if (outcome := job.result()) is not None)
        if failed or starts > self.config.launch.max_restarts:
            raise RuntimeError(words)
        # none could say why: killed, lost with their nodes, told to leave, or the disk was full
        console.print(f"{words}; starting it again")
        disk.await_space(self.run_dir, self.config.launch.disk_patience_s)
        self.jobs.end(jobs, wait=False)
        self._arrays[role] = self._submit_with_space(role, [job.element for job in jobs])

    def _where(self, role: str) -> str:
        return f"log: {self._arrays[role][0].log()}"

    def _mine(self) -> list[Service]:
        return [service for service in self.registry.services() if service.session == self.session]

    def _watch(self) -> None:
        """Start dead elements again, until the end."""
        told, pause_s = 0.0, WATCH_S
        while not self._ended.wait(pause_s):
            began = time.monotonic()
            try:
                self._look()
            except (OSError, subprocess.SubprocessError, submitit.core.utils.FailedJobError) as error:
                # a full disk, or a Slurm that does not answer: the next look tries again
                if time.monotonic() - told > STUCK_S:
                    told = time.monotonic()
                    reason = " ".join(str(error).split())[:300]
                    console.print(
                        f"services: lost elements cannot be started again now: {reason} ({self.jobs.log_dir})"
                    )
            pause_s = max(WATCH_S, min(LONGEST_WATCH_S, 5 * (time.monotonic() - began)))

    def _look(self) -> None:
        living, dead = self.registry.census()
        alive = {(service.role, service.job_id) for service in living if service.session == self.session}
        silent = {(service.role, service.job_id) for service in dead} - alive
        with self._lock:
            if self._ended.is_set():
                return
            self.registry.write_list(living)
            for role, jobs in self._arrays.items():
                for job in list(jobs):
                    if (role, job.id) in alive:
                        self._served.add(role)
                        self._failures.pop((role, job.element), None)
                    elif role in self._served and self._is_lost(job, (role, job.id) in silent):
                        self._restart(role, job)

    def _is_lost(self, job: Job, silent: bool) -> bool:
        """Whether an element ended, or hangs: it runs and has registered, but its heartbeats have stopped."""
        state = self.jobs.state(job)
        return state == "ended" or (silent and state == "running")

    def _restart(self, role: str, job: Job) -> None:
        key = (role, job.element)
        if key in self._given_up:
            return
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        if failures > self.config.launch.max_restarts:
            self._given_up.add(key)
            console.print(f"{role} element {job.element}: given up after {failures - 1} restarts; log: {job.log()}")
            return
        why = f"{self.jobs.reason(job)}{job.last_words()[:200]}"
        console.print(f"{role} element {job.element} is lost ({why}); starting it again (log: {job.log()})")
        self.jobs.end([job], wait=False)
        self.registry.remove(lambda service: not (service.role == role and service.job_id == job.id))
        jobs = self._arrays[role]
        jobs[jobs.index(job)] = self._submit(role, [job.element])[0]


def _interrupt(number: int, _: FrameType | None) -> None:
    print(f"ctrl-hpc: {signal.Signals(number).name}: stopping", file=sys.stderr)
    raise KeyboardInterrupt


def _again(lost: sys.UnraisableHookArgs) -> None:
    """An interruption that met Python in a callback (a weak reference's, say, while modules are imported), where no
    exception goes further, comes again a moment later."""
    if not issubclass(lost.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(lost)
        return
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
