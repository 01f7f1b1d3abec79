"""Local jobs as forks of one parent that has imported what they need: they start at once, and imports are paid once.

A chain of processes, a :class:`Generation` each: the first imports the executor's modules, its child those of the
rollout servers, too, and that one's child those of the trainer, so that no job has more in it than it would import by
itself. They have one thread each, have touched no GPU, and each ends with the process that forked it, the first with
the driver. A job's processes are what they are without them: submitit's controller, its tasks its children.
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
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import numpy as np
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
        """Start it, for jobs of these roles; ``python`` is the command that starts Python in a job.

        It ends with the thread that calls this. Raises OSError where it cannot be started.
        """
        which = {role: number for number, one in enumerate(GENERATIONS) for role in one.roles if role in roles}
        chain = GENERATIONS[: max(which.values(), default=-1) + 1]
        pipes = [Pipe() for _ in chain]
        told = json.dumps([(there.fileno(), one.modules) for one, (_, there) in zip(chain, pipes, strict=True)])
        self._pipes = [here for here, _ in pipes]  # also of those in the chain that nobody asks for anything
        self._ends = {role: self._pipes[number] for role, number in which.items()}
        self._ready: set[Connection] = set()
        self._lock = threading.Lock()
        self._first = subprocess.Popen(
            [*shlex.split(python), "-m", "ctrl_hpc.cluster.prefork", str(os.getpid()), told],
            stdin=subprocess.DEVNULL,
            # no library may look for a GPU before the fork, or start a thread
            env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OPENBLAS_NUM_THREADS": "1"},
            pass_fds=[there.fileno() for _, there in pipes],
        )
        for _, there in pipes:
            there.close()

    @property
    def roles(self) -> tuple[str, ...]:
        """Whose jobs are forked, those first whose process is ready first."""
        return tuple(self._ends)

    def await_ready(self, role: str) -> None:
        """Return once the process that jobs of this role are forked from has imported all, or will not.

        Nothing has been asked of it yet: Ctrl-C may end the wait.
        """
        deadline = time.monotonic() + _IMPORTS_S
        while (end := self._awaited(role, deadline)) is not None:
            with contextlib.suppress(OSError):  # another thread has given it up
                wait([end], _LOOK_S)

    def _awaited(self, role: str, deadline: float) -> Connection | None:
        """The pipe on which a role's process has yet to say that it is ready."""
        with self._lock:
            end = self._ends.get(role)
            if end is None or end in self._ready:
                return None
            try:
                if end.poll():
                    problem = end.recv()
                elif time.monotonic() < deadline:
                    return end
                else:
                    problem = f"its imports take longer than {_IMPORTS_S:.0f} s"
            except (OSError, EOFError):
                problem = "it is gone"
            if problem:
                self._give_up(role, end, problem)
            else:
                self._ready.add(end)
            return None

    def fork(self, role: str, folder: Path, environment: Mapping[str, str]) -> Forked | None:
        """A job's controller; None where that process is not ready, or, told once, is gone or does not answer."""
        with self._lock:
            end = self._ends.get(role)
            if end is None or end not in self._ready:
                return None
            try:
                end.send((str(folder), dict(environment)))
                if end.poll(_ANSWER_S):
                    controller = Forked(end.recv())
                    end.send("go")
                    return controller
                problem = "it does not answer"
            except (OSError, EOFError):
                problem = "it is gone"
            except BaseException:  # the next job's would be this one's controller
                self._drop(end)
                raise
            self._give_up(role, end, problem)
            return None

    def _give_up(self, role: str, end: Connection, problem: str) -> None:
        self._drop(end)
        console.print(f"{role}: not forked from a process that is ready, but started: {problem}")

    def _drop(self, end: Connection) -> None:
        """Ask it for nothing more; a controller that it has not been told to let go ends."""
        self._ends = {role: one for role, one in self._ends.items() if one is not end}
        end.close()

    def close(self) -> None:
        """End the chain; jobs that were forked from it go on."""
        with self._lock:
            self._ends = {}
            self._first.kill()  # and so, by the kernel, those after it
            self._first.wait()
            for end in self._pipes:
                with contextlib.suppress(OSError, EOFError):
                    while end.poll(_ANSWER_S):  # until the process at its other end is gone
                        end.recv()
                end.close()


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
            time.sleep(_POLL_S)
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
        while not paths[0].submitted_pickle.exists():  # submitit's task would look once a second
            if time.monotonic() > deadline:
                raise RuntimeError(f"{paths[0].submitted_pickle} is not there: the driver has ended")
            time.sleep(_POLL_S)
        for task, path in enumerate(paths):
            self.tasks.append(_Task(self.folder, self.pid, task, path.stdout))  # type: ignore[arg-type]


class _Task(Forked):
    """A task of a job: a child of this process."""

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

        super().__init__(_fork(work))
        self._ended: int | None = None

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        if self._ended is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._ended = os.waitstatus_to_exitcode(status) if pid else None
        return self._ended


def _fork(work: Callable[[], None]) -> int:
    """The id of a child that does the work and ends as a program would."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if "numpy.random" in sys.modules:
            np.random.seed()  # as random does by itself
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
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies: the driver asks whether a controller runs
    with contextlib.suppress(EOFError, ConnectionError):
        end.send("")
        while True:
            folder, environment = end.recv()
            _fork_job(end, folder, environment, initial)


def _fork_job(end: Connection, folder: str, environment: Mapping[str, str], initial: Mapping[str, str]) -> None:
    """Tell the driver a controller's id, which begins once the driver says that it has heard it, and ends otherwise."""
    gate, release = os.pipe()

    def job() -> None:
        end.close()
        os.close(release)
        if os.read(gate, 1):
            os.close(gate)
            _control(folder, environment, initial)

    pid = _fork(job)
    os.close(gate)
    try:
        paths = JobPaths(folder, str(pid))
        for stale in (paths.submitted_pickle, *paths.folder.glob(f"{pid}_*_result.pkl")):  # an earlier job's
            stale.unlink(missing_ok=True)
        end.send(pid)
        end.recv()
        os.write(release, b".")
    finally:
        os.close(release)


def _end_with(parent: int) -> None:
    """Have the kernel end this process with its parent, which may be gone already."""
    processes.die_with_parent(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _import(modules: Sequence[str]) -> str:
    """What forbids to fork after these imports, if anything."""
    # Megatron imports it without need, and the first job to end would remove its folders for all
    sys.modules["wandb"] = None  # type: ignore[assignment]
    try:
        for module in modules:
            importlib.import_module(module)
    except (Exception, SystemExit):  # noqa: BLE001 (a job that needs it will say so in its own log)
        traceback.print_exc()
    sys.modules.pop("wandb")
    gc.collect()
    gc.freeze()
    threads = len(os.listdir("/proc/self/task")) - 1  # a lock that one of them holds would stay locked
    return f"its imports have started {threads} threads" if threads else ""


def main() -> None:
    """Import, fork the next generation, serve; in each process of the chain."""
    _end_with(int(sys.argv[1]))
    initial, told = dict(os.environ), json.loads(sys.argv[2])
    ends = [Connection(pipe) for pipe, _ in told]
    for number, (_, modules) in enumerate(told):
        problem = _import(modules)
        if problem:
            for end in ends[number:]:
                end.send(problem)
            break
        this = os.getpid()
        child = None if number + 1 == len(told) else os.fork()
        if child == 0:
            _end_with(this)
            ends[number].close()
            continue
        for later in ends[number + 1 :]:
            later.close()
        _serve(ends[number], initial)
        if child is not None:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(child, 0)  # it would end with this one
        break
    os._exit(0)


if __name__ == "__main__":
    main()
