"""Local jobs as forks of one parent that has imported what they need: they start at once, and imports are paid once.

A chain of processes, a :class:`Generation` each: the first imports the executor's modules, its child those of the
rollout servers, too, and that one's child those of the trainer, so that no job has more in it than it would import by
itself. They have one thread each, have touched no GPU, and end with the driver, whose end of a pipe they wait on. A
job's processes are what they are without them: submitit's controller, its tasks its children.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import psutil
from submitit import LocalExecutor
from submitit.core.submission import process_job
from submitit.core.utils import JobPaths
from submitit.local.local import Controller, LocalJob

from ctrl_hpc.cluster import processes
from ctrl_hpc.progress import console

_PICKLE_S = 10.0
"""The driver names a job's file by the controller's process id, at most so long after that one was forked."""
_POLL_S = 0.01
_IMPORTS_S, _LOOK_S = 120.0, 0.1
"""How long a process of the chain may import before jobs are started without it; how often it is asked."""
_ANSWER_S = 10.0
"""One that has not forked in that time is not asked again."""
TASK_NAME = re.compile(r"task-(\d+)")
"""What a task's process is called: the environment that it was given cannot be seen from outside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """One process of the chain."""

    roles: tuple[str, ...]
    """Whose jobs are forked from it."""
    modules: tuple[str, ...]
    """What it imports beside what the one before it has."""


GENERATIONS = (
    Generation(roles=("executor",), modules=("ctrl_hpc.sandbox.server",)),
    Generation(
        roles=("critic", "generator"),
        modules=(
            "ctrl_hpc.rollout.server",
            "ctrl_hpc.rollout.engine",
            "transformers.models.auto.tokenization_auto",
            "transformers.models.auto.modeling_auto",
            "transformers.modeling_utils",
        ),
    ),
    Generation(roles=("trainer",), modules=("ctrl_hpc.train.sft", "ctrl_hpc.train.rl")),
)


class Prefork:
    """The driver's hold on the chain."""

    def __init__(self, python: str, roles: Sequence[str]) -> None:
        """Start it, for jobs of these roles; ``python`` is the command that starts Python in a job."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SUBMITIT_")}
        wanted = max((number for number, one in enumerate(GENERATIONS) if set(one.roles) & set(roles)), default=-1)
        chain = GENERATIONS[: wanted + 1]
        pipes = [Pipe() for _ in chain]
        told = json.dumps(
            [{**asdict(one), "pipe": there.fileno()} for one, (_, there) in zip(chain, pipes, strict=True)]
        )
        # Of all in the chain: one whose pipe were closed would end.
        self._ends = {role: here for one, (here, _) in zip(chain, pipes, strict=True) for role in one.roles}
        self._ready: set[Connection] = set()
        self._lock = threading.Lock()
        self._first = subprocess.Popen(
            [*shlex.split(python), "-m", "ctrl_hpc.cluster.prefork", told],
            stdin=subprocess.DEVNULL,
            env={**environment, "CUDA_VISIBLE_DEVICES": ""},  # no library may look for a GPU before the fork
            pass_fds=[there.fileno() for _, there in pipes],
        )
        for _, there in pipes:
            there.close()

    def await_ready(self, role: str) -> None:
        """Return once the process that jobs of this role are forked from has imported all, or will not.

        Nothing has been asked of it yet: Ctrl-C may end the wait.
        """
        deadline = time.monotonic() + _IMPORTS_S
        while True:
            with self._lock:
                end = self._ends.get(role)
                if end is None or end in self._ready:
                    return
                try:
                    if end.poll(_LOOK_S):
                        end.recv()
                        self._ready.add(end)
                    elif time.monotonic() > deadline:
                        self._give_up(role, end, f"its imports take longer than {_IMPORTS_S:.0f} s")
                except (OSError, EOFError):
                    self._give_up(role, end, "it is gone")

    def fork(self, role: str, folder: Path, environment: Mapping[str, str]) -> Forked | None:
        """A job's controller; None where that process is not ready, or, told once, is gone or may not fork."""
        with self._lock:
            end = self._ends.get(role)
            if end is None or end not in self._ready:
                return None
            try:
                end.send((str(folder), dict(environment)))
                found: tuple[int, str] = end.recv() if end.poll(_ANSWER_S) else (0, "it does not answer")
            except (OSError, EOFError):
                found = (0, "it is gone")
            pid, problem = found
            if not pid:
                self._give_up(role, end, problem)
                return None
            return Forked(pid)

    def _give_up(self, role: str, end: Connection, problem: str) -> None:
        console.print(f"{role}: not forked from a process that is ready, but started: {problem}")
        self._drop(end)

    def _drop(self, end: Connection) -> None:
        self._ends = {role: one for role, one in self._ends.items() if one is not end}
        end.close()

    def close(self) -> None:
        """End the chain; jobs that were forked from it go on."""
        with self._lock:
            for end in set(self._ends.values()):
                self._drop(end)
        try:
            self._first.wait(timeout=2.0)
        except subprocess.TimeoutExpired:  # those after it in the chain see their own pipe's end
            self._first.kill()
            self._first.wait()


class Forked:
    """A controller that is no child of this process, with what is asked of a ``subprocess.Popen``."""

    def __init__(self, pid: int) -> None:
        self.pid, self._started = pid, processes.started(pid)

    def poll(self) -> int | None:
        """None while it runs; how it ended is not known."""
        return None if self._started is not None and processes.is_running(self.pid, self._started) else 0

    def wait(self) -> int:
        """Returns when it has ended."""
        while self.poll() is None:
            with contextlib.suppress(psutil.Error):
                psutil.Process(self.pid).wait(timeout=0.1)
        return 0

    def send_signal(self, number: int) -> None:
        """As ``os.kill``, where it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)


class PreforkExecutor(LocalExecutor):
    """submitit's local executor, its controllers forked from the chain as long as that lives."""

    def __init__(self, folder: Path, python: str, prefork: Prefork, role: str) -> None:
        super().__init__(folder, python=python)
        self._prefork, self._role = prefork, role

    def _submit_command(self, command: str) -> LocalJob[Any]:
        tasks = self.parameters.get("tasks_per_node", 1)
        environment = {
            **os.environ,
            "SUBMITIT_LOCAL_NTASKS": str(tasks),
            "SUBMITIT_LOCAL_COMMAND": command,
            "SUBMITIT_LOCAL_TIMEOUT_S": str(int(60 * self.parameters.get("timeout_min", 2.0))),
            "SUBMITIT_LOCAL_SIGNAL_DELAY_S": str(int(self.parameters.get("signal_delay_s", 30))),
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_STDERR_TO_STDOUT": "1",
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_WITH_SHELL": "",
            "CUDA_VISIBLE_DEVICES": "",
        }
        process: Any = self._prefork.fork(self._role, self.folder, environment)
        if process is None:
            return super()._submit_command(command)
        return LocalJob(folder=self.folder, job_id=str(process.pid), process=process, tasks=list(range(tasks)))


class _Controller(Controller):
    """submitit's controller of a local job; its tasks are forks of it instead of new programs."""

    def start_tasks(self) -> None:
        paths = [JobPaths(self.folder, self.pid, task) for task in range(self.ntasks)]
        deadline = time.monotonic() + _PICKLE_S
        while not paths[0].submitted_pickle.exists() and time.monotonic() < deadline:
            time.sleep(_POLL_S)  # submitit's task would look once a second
        if not paths[0].submitted_pickle.exists():
            raise RuntimeError(f"{paths[0].submitted_pickle} is not there: the driver has ended")
        for task, path in enumerate(paths):
            self.tasks.append(_Task(self.folder, self.pid, task, path.stdout))  # type: ignore[arg-type]


class _Task:
    """A task of a job: a child of this process, with what is asked of a ``subprocess.Popen``."""

    def __init__(self, folder: Path, job: str, task: int, log: Path) -> None:
        own = {"SUBMITIT_LOCAL_LOCALID": str(task), "SUBMITIT_LOCAL_GLOBALID": str(task), "SUBMITIT_LOCAL_JOB_ID": job}

        def work() -> None:
            with open(log, "ab") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.environ.update(own)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not the controller's
            processes.name_this(f"task-{task}")
            process_job(folder)

        self.pid = _fork(work)
        self._ended: int | None = None

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        if self._ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._ended = os.waitstatus_to_exitcode(status) if pid else None
        return self._ended

    def send_signal(self, number: int) -> None:
        """As ``os.kill``, where it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)


def _fork(work: Callable[[], None]) -> int:
    """The id of a child that does the work and ends as a program would."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        work()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:  # noqa: BLE001 (told, as the interpreter does)
        traceback.print_exc()
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # as the interpreter does: waits for threads, then
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _control(folder: str, environment: Mapping[str, str], initial: Mapping[str, str]) -> None:
    """A job: its environment, beside what the imports have set, and its controller."""
    for name in set(initial) - set(environment):
        os.environ.pop(name, None)
    os.environ.update(environment)
    if "PYTHONPATH" in initial:  # the run's copy of the code, which the driver itself has not
        os.environ["PYTHONPATH"] = initial["PYTHONPATH"]
    sys.argv = ["submitit.core._submit", folder]
    _Controller(Path(folder)).run()


def _serve(end: Connection, initial: Mapping[str, str]) -> None:
    """Fork a job for every message, until the driver has closed its end, which hears first that all is ready."""
    signal.signal(signal.SIGCHLD, _reap)
    try:
        end.send("ready")
    except OSError:
        return
    while True:
        try:
            folder, environment = end.recv()
        except (EOFError, OSError):
            return
        threads = len(os.listdir("/proc/self/task"))
        if threads > 1:  # a lock that another thread holds would stay locked
            end.send((0, f"its imports have started {threads - 1} threads"))
            continue

        def job(folder: str = folder, environment: Mapping[str, str] = environment) -> None:
            end.close()
            _control(folder, environment, initial)

        pid = _fork(job)
        try:
            end.send((pid, ""))
        except OSError:  # nobody waits for it any more: its driver has started the job otherwise
            os.kill(pid, signal.SIGKILL)
            return


def _reap(*_: object) -> None:
    """No zombies: the driver asks whether a controller runs."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def main() -> None:
    """Import, fork the next generation, serve; in each process of the chain."""
    initial, told = dict(os.environ), json.loads(sys.argv[1])
    ends = [Connection(one["pipe"]) for one in told]
    for number, one in enumerate(told):
        try:
            for module in one["modules"]:
                importlib.import_module(module)
        except (Exception, SystemExit):  # noqa: BLE001 (a job that needs it will say so in its own log)
            traceback.print_exc()
        gc.collect()
        gc.freeze()
        child = 0 if number + 1 == len(told) else os.fork()
        if child or number + 1 == len(told):
            for later in ends[number + 1 :]:
                later.close()
            _serve(ends[number], initial)
            with contextlib.suppress(ChildProcessError):  # it ends with this one, unless it was the first to see it
                if child:
                    os.waitpid(child, 0)
            os._exit(0)
        ends[number].close()


if __name__ == "__main__":
    main()
