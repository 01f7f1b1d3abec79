"""Jobs of a run through submitit: the local executor and Slurm by one code path, the engine chosen by configuration."""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
import pynvml
import submitit
from submitit.core.utils import JobPaths
from submitit.slurm.slurm import SlurmExecutor

from ctrl_hpc.cluster import job_records, processes
from ctrl_hpc.cluster.job_records import JobRecord
from ctrl_hpc.cluster.prefork import TASK_NAME, Prefork, PreforkExecutor
from ctrl_hpc.cluster.slurm import WAITING, SlurmQueue
from ctrl_hpc.config import Config, JobConfig, LaunchConfig
from ctrl_hpc.progress import console
from ctrl_hpc.run import disk, snapshot
from ctrl_hpc.service import access

State = Literal["pending", "running", "ended"]
_SCRUBBED = re.compile(r"(WANDB_(RUN_ID|SWEEP_ID|RUN_GROUP|NAME|RESUME|SERVICE|AGENT.*)|SLURM_(?!CONF$).*|SBATCH_.*)")
SETTLE_S = 1.0
"""The tasks of a local gang are all there so long after the first."""
_SETUP = (
    "export SRUN_CPUS_PER_TASK=${{SLURM_CPUS_PER_TASK:-1}} TMPDIR=${{SLURM_TMPDIR:-${{TMPDIR:-/tmp}}}}",
    "id=${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}} id=${{id:-$SLURM_JOB_ID}}",
    # a container holds no scontrol to ask
    'export CTRL_HPC_ADDRESSES=$(scontrol show node "$SLURM_JOB_NODELIST" --oneliner 2>/dev/null | '
    "sed -n 's/^NodeName=\\([^ ]*\\).* NodeAddr=\\([^ ]*\\).*/\\1=\\2/p' | paste -sd,)",
    'for log in {folder}/"$id"_*_log.out; do '
    '[ "${{SLURM_RESTART_COUNT:-0}}" = 0 ] || [ ! -e "$log" ] || '
    'mv "$log" "${{log%.out}}.start$SLURM_RESTART_COUNT.out"; done',
)
"""Shell lines before every job's own: a node's own disk for scratch; the addresses of the job's nodes; the logs of its
earlier starts put aside."""
_environment_lock = threading.Lock()


@dataclass(slots=True)
class Job:
    """A submitted job, or an element of an array."""

    role: str
    element: int
    handle: Any
    """submitit's job."""
    engine: str
    tasks: int
    gpus: tuple[int, ...] = ()
    """Local: those of the machine that it sees, by number; empty: as many as it asks for, from the first on."""
    submitted: float = field(default_factory=time.monotonic)
    first_seen: float = 0.0
    """Local: when the first of its tasks was seen."""
    seen_tasks: dict[int, int] = field(default_factory=dict)
    """Local: process ids of its tasks ever seen, with their start times."""

    @property
    def id(self) -> str:
        """Slurm's job id, or the local controller's process id."""
        return str(self.handle.job_id)

    def log(self, task: int = 0) -> Path:
        """What a task prints."""
        return Path(JobPaths(self.handle.paths.folder, self.id, task).stdout)

    def result(self, task: int = 0) -> tuple[str, Any] | None:
        """``("success", value)`` or ``("error", traceback)`` once the task has ended by itself; None before, or when
        it was killed."""
        path = JobPaths(self.handle.paths.folder, self.id, task).result_pickle
        try:
            with open(path, "rb") as file:
                if not access.is_ours(os.fstat(file.fileno())):
                    raise RuntimeError(f"{path}: another user wrote it, so it is not read")
                outcome: tuple[str, Any] = pickle.load(file)
                return outcome
        except (FileNotFoundError, EOFError):
            return None

    def last_words(self, task: int = 0) -> str:
        """The last line of the error, or of the log."""
        outcome = self.result(task)
        text = outcome[1] if outcome and outcome[0] == "error" else ""
        if not text and self.log(task).is_file():
            text = self.log(task).read_text(encoding="utf-8", errors="replace")
        lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
        return lines[-1] if lines else "it printed nothing"


class Jobs:
    """Submits, watches and ends the jobs of one driver."""

    def __init__(self, config: Config, run_dir: str | Path, name: str, prefork: Prefork | None = None) -> None:
        """``name`` tells the records of several ``Jobs`` of one driver apart; local jobs without GPUs are forked from
        ``prefork``, where there is one."""
        self.prefork = prefork
        self._file = job_records.folder_of(run_dir) / f"jobs-{name}.json"
        self._launch = config.launch
        self._name = config.name
        self._wandb_mode = config.wandb.mode
        self._run_dir = Path(run_dir).absolute()
        self._jobs: list[Job] = []
        self._lock = threading.Lock()
        self._slurm = SlurmQueue()
        if self._launch.engine == "slurm" and shutil.which("sbatch") is None:
            raise ValueError("launch.engine: slurm needs the commands sbatch, squeue and scancel, which are not here")

    @property
    def log_dir(self) -> Path:
        """Folder of all logs."""
        return self._run_dir / "logs"

    def begin_prefork(self, roles: Sequence[str]) -> Prefork | None:
        """Have processes import ahead what local jobs of these roles need; does not wait. None, told, where they cannot
        be started."""
        python = _python(self._launch, JobConfig(), snapshot.latest(self._run_dir))
        try:
            with _environment_lock, _environment(1, self._wandb_mode), _interrupts_blocked():
                self.prefork = Prefork(python, roles)
        except OSError as error:
            console.print(f"jobs are not forked from processes that are ready, but started: {error}")
        return self.prefork

    def submit(
        self,
        role: str,
        function: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
        resources: JobConfig,
        *,
        elements: Sequence[int] | None = None,
        nodes: int = 1,
        tasks_per_node: int = 1,
        threads: int = 1,
    ) -> list[Job]:
        """One job for each tuple of arguments, as one array where there are several (as several arrays where Slurm
        allows none so large); does not wait for them."""
        if self.prefork is not None and not resources.gpus:
            self.prefork.await_ready(role)
        with _environment_lock, _environment(threads, self._wandb_mode), _interrupts_blocked():
            executor = self._executor(role, resources, nodes, tasks_per_node)
            if self._launch.engine == "local" and resources.gpus:
                return self._submit_beside(executor, role, function, arguments, elements, resources, tasks_per_node)
            handles = []
            size = self._slurm.largest_array() if self._launch.engine == "slurm" else len(arguments)
            for start in range(0, len(arguments), size):
                part = arguments[start : start + size]
                if len(part) == 1:
                    handles.append(executor.submit(function, *part[0]))
                else:
                    handles += executor.map_array(function, *zip(*part, strict=True))
        numbers = range(len(handles)) if elements is None else elements
        jobs = [
            Job(role=role, element=number, handle=handle, engine=self._launch.engine, tasks=nodes * tasks_per_node)
            for number, handle in zip(numbers, handles, strict=True)
        ]
        with self._lock:
            self._jobs += jobs
            self._record()
        return jobs

    def _submit_beside(
        self,
        executor: submitit.LocalExecutor,
        role: str,
        function: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]],
        elements: Sequence[int] | None,
        resources: JobConfig,
        tasks: int,
    ) -> list[Job]:
        """Local jobs with GPUs, each on those that the run's other jobs on this machine use least."""
        jobs = []
        for number, given in zip(range(len(arguments)) if elements is None else elements, arguments, strict=True):
            gpus = _least_used(self._run_dir, resources.gpus * tasks)
            executor.update_parameters(visible_gpus=gpus)
            handle = executor.submit(function, *given)
            jobs.append(Job(role=role, element=number, handle=handle, engine="local", tasks=tasks, gpus=gpus))
            with self._lock:
                self._jobs.append(jobs[-1])
                self._record()
        return jobs

    def _executor(self, role: str, resources: JobConfig, nodes: int, tasks_per_node: int) -> submitit.Executor:
        launch = self._launch
        # without %j: Slurm makes no folders, and would lose the log of a job that starts at once
        folder = self.log_dir / role
        python = _python(launch, resources, snapshot.latest(self._run_dir))
        common = _common(self._name, role, resources, nodes, tasks_per_node)
        if launch.engine == "local":
            if self.prefork is not None and not resources.gpus:
                local: submitit.LocalExecutor = PreforkExecutor(folder, python, self.prefork, role)
            else:
                local = submitit.LocalExecutor(folder, python=python)
            local.update_parameters(**common, gpus_per_node=resources.gpus * tasks_per_node)
            return local
        executor = submitit.AutoExecutor(
            folder=folder, cluster=launch.engine, slurm_max_num_timeout=launch.max_requeues, slurm_python=python
        )
        own = _slurm_parameters(launch, folder, resources, nodes * tasks_per_node, tasks_per_node)
        executor.update_parameters(**common, **{f"slurm_{name}": value for name, value in own.items()})
        return executor

    def state(self, job: Job) -> State:
        """Where a job stands; for Slurm at most one squeue call in two seconds, whatever the number of jobs."""
        if job.engine == "local":
            self._see_tasks(job)
            return "running" if job.handle._process.poll() is None else "ended"
        listed = self._slurm.state(job.id)
        if listed is not None:
            return "pending" if listed in WAITING else "running"
        if any(job.result(task) is not None for task in range(job.tasks)):
            return "ended"
        # a job may be missing from one listing while it is requeued
        return "ended" if self._slurm.missed(job.id) >= 2 else "running"

    def lost_tasks(self, job: Job) -> list[int]:
        """Local gangs: tasks that ended without a result, as by SIGKILL (Slurm ends such a gang by itself)."""
        if job.engine != "local":
            return []
        alive = self._see_tasks(job)
        if not job.seen_tasks or None in alive or time.monotonic() - job.first_seen < SETTLE_S:
            return []
        return [task for task in range(job.tasks) if task not in alive and job.result(task) is None]

    def _see_tasks(self, job: Job) -> list[int | None]:
        """The local tasks that are alive; None for one that is only being started."""
        alive: list[int | None] = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(int(job.id)).children():
                with contextlib.suppress(psutil.Error):
                    start = processes.started(child.pid)
                    if start is not None:
                        if not job.seen_tasks:
                            job.first_seen = time.monotonic()
                        job.seen_tasks.setdefault(child.pid, start)
                        alive.append(_task_of(child))
        return alive

    def reason(self, job: Job) -> str:
        """``"NODE_FAIL: "``, ``"PREEMPTED: "`` ...: why Slurm says that a job has ended, for messages; empty for local
        jobs and while it runs."""
        return self._slurm.reason(job.id) if job.engine == "slurm" else ""

    def end(self, jobs: Sequence[Job], *, grace_s: float = 5.0, wait: bool = True, asked: bool = False) -> None:
        """End these jobs; returns when no process of local ones is left and, with ``wait``, Slurm's are gone.

        Slurm's that were ``asked`` to leave, or have their result, may do so, and end as COMPLETED, before the rest is
        cancelled.
        """
        local = [job for job in jobs if job.engine == "local"]
        for job in local:
            self._see_tasks(job)
        tasks = [pid for job in local for pid, start in job.seen_tasks.items() if processes.is_running(pid, start)]
        controllers = [int(job.id) for job in local if job.handle._process.poll() is None]
        if tasks or controllers:
            processes.end([*controllers, *tasks], first=tasks, grace_s=grace_s)
        for job in local:
            job.handle._process.wait()
        distributed = [job.id for job in jobs if job.engine == "slurm"]
        if distributed:
            leaving = [job.id for job in jobs if job.engine == "slurm" and (asked or job.result() is not None)]
            if wait and leaving:
                self._slurm.await_end(leaving)
            left = self._slurm.cancel(distributed, wait)
            if left:
                console.print(f"Slurm still lists {left} cancelled jobs; they were told to end")
        with self._lock:
            self._jobs = [job for job in self._jobs if job not in jobs]
            self._record()

    def _record(self) -> None:
        """Tell later drivers, ``status`` and ``stop`` what was started; a full disk is no reason to fail."""
        try:
            job_records.write(self._file, [_record_of(job) for job in self._jobs])
        except OSError as error:  # jobs end with their driver, recorded or not
            if error.errno not in disk.FULL:
                raise


def _task_of(process: psutil.Process) -> int | None:
    """Which task of its job it is: a forked one is named so, another has it in its environment."""
    named = TASK_NAME.fullmatch(process.name())
    told = named.group(1) if named else process.environ().get("SUBMITIT_LOCAL_GLOBALID")
    return None if told is None else int(told)


def _least_used(run_dir: Path, count: int) -> tuple[int, ...]:
    """``count`` GPUs of this machine, those first that the fewest living local jobs of the run see.

    Those of ``CUDA_VISIBLE_DEVICES``, where it is set, else all that NVML finds; empty where there are not so many.
    """
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is None:
        try:
            pynvml.nvmlInit()
            known = list(range(pynvml.nvmlDeviceGetCount()))
        except pynvml.NVMLError:
            known = []
    else:
        known = [int(number) for number in given.split(",") if number.strip().isdecimal()]  # others have names
    seen = Counter(
        gpu
        for record in job_records.recorded(run_dir)
        if record.engine == "local" and processes.is_running(int(record.job_id), record.started)
        for gpu in record.gpus
    )
    return tuple(sorted(known, key=lambda gpu: (seen[gpu], gpu))[:count]) if count <= len(known) else ()


def _python(launch: LaunchConfig, resources: JobConfig, code: Path | None) -> str:
    """The command that starts Python in a job, with the copy of the code as its program where there is one."""
    given = launch.python if launch.engine == "slurm" and resources.contained else None
    inside = given or shlex.quote(sys.executable)
    return inside if code is None else f"{inside} -u {shlex.quote(str(code))}"


def _common(name: str, role: str, resources: JobConfig, nodes: int, tasks_per_node: int) -> dict[str, Any]:
    """submitit's parameters for both engines."""
    return {
        "name": f"{role}-{name}",  # squeue shows the first letters
        "timeout_min": resources.time_min,
        "nodes": nodes,
        "tasks_per_node": tasks_per_node,
        "stderr_to_stdout": True,
    }


def _slurm_parameters(
    launch: LaunchConfig, folder: Path, resources: JobConfig, tasks: int, tasks_per_node: int
) -> dict[str, Any]:
    """submitit's parameters for Slurm, by sbatch's names where it has one."""
    gang = ("--kill-on-bad-exit=1",) if tasks > 1 else ()
    return {
        "cpus_per_task": resources.cpus,
        "mem": None if resources.memory_gb is None else f"{round(resources.memory_gb * 1024)}MB",
        "partition": resources.partition,
        "constraint": resources.constraint,
        "gpus_per_node": resources.gpus * tasks_per_node or None,
        "account": launch.account,
        "qos": launch.qos,
        "signal_delay_s": launch.signal_delay_s,
        "array_parallelism": launch.array_parallelism,
        "setup": [*(line.format(folder=shlex.quote(str(folder))) for line in _SETUP), *launch.setup],
        "srun_args": [*gang, *(launch.srun_args if resources.contained else ())] or None,
        "additional_parameters": {"requeue": True, **resources.additional},
    }


def scripts(config: Config) -> dict[str, str]:
    """The batch scripts of a run on Slurm, by role, as submitit would hand them to sbatch; needs no Slurm here."""
    launch, rollout, trainer = config.launch, config.rollout, config.trainer
    jobs = (
        ("executor", config.executor.elements, launch.executor, 1, 1),
        ("critic", 0 if rollout.critic_urls else rollout.critic_elements, launch.rollout, 1, 1),
        ("generator", rollout.generator_elements if config.generator_is_served else 0, launch.rollout, 1, 1),
        ("trainer", 1, launch.trainer, trainer.nodes, trainer.ranks_per_node),
    )
    out, names = {}, SlurmExecutor._equivalence_dict()
    code = snapshot.place(config.run_dir or "", launch.snapshot)
    for role, elements, resources, nodes, per_node in jobs:
        folder = Path(config.run_dir or "").absolute() / "logs" / role
        executor = _PaperExecutor(folder, python=_python(launch, resources, code))
        common = _common(config.name, role, resources, nodes, per_node)
        executor.update_parameters(**{names.get(name, name): value for name, value in common.items()})
        executor.update_parameters(**_slurm_parameters(launch, folder, resources, nodes * per_node, per_node))
        if elements > 1:
            executor.parameters["map_count"] = elements
        if elements:
            command = executor._submitit_command_str
            out[role] = executor._make_submission_file_text(command, "paper")
    return out


class _PaperExecutor(SlurmExecutor):
    """Writes scripts, whether there is a Slurm or not."""

    @classmethod
    def affinity(cls) -> int:
        return 1


def _record_of(job: Job) -> JobRecord:
    return JobRecord(
        role=job.role,
        element=job.element,
        engine=job.engine,
        job_id=job.id,
        machine=processes.machine() if job.engine == "local" else "",
        started=processes.started(int(job.id)) if job.engine == "local" else None,
        log=str(job.log()),
        tasks=job.tasks,
        gpus=job.gpus,
    )


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """Processes started meanwhile do not see the terminal's Ctrl-C: the driver ends them in order."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _environment(threads: int, wandb_mode: str) -> Iterator[None]:
    """The environment jobs inherit: no identity of a wandb run or Slurm job, threads that do not spin, no network."""
    own = {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    own |= {"WANDB_MODE": wandb_mode, "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"), "PYTHONUNBUFFERED": "1"}
    scrubbed = [name for name in os.environ if _SCRUBBED.fullmatch(name)]
    before = {name: os.environ.pop(name, None) for name in (*scrubbed, *own)}
    os.environ.update(own)
    try:
        yield
    finally:  # these alone: other threads have variables of their own
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
