"""The trainer: one gang-scheduled job, a task a rank, watched from the driver and continued when it is interrupted."""

from __future__ import annotations

import importlib
import os
import re
import time
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Literal

import submitit

from ctrl_hpc.cluster import element
from ctrl_hpc.cluster.element import leave_with_driver
from ctrl_hpc.cluster.jobs import Job, Jobs
from ctrl_hpc.cluster.monitor import Monitor
from ctrl_hpc.cluster.prefork import Prefork
from ctrl_hpc.cluster.registry import Registry, read_entry
from ctrl_hpc.config import Config
from ctrl_hpc.progress import Steps, console
from ctrl_hpc.run import disk, journal
from ctrl_hpc.service import http

Stage = Literal["sft", "rl"]
POLL_S = 0.2
LOOK_S = 1.0
"""Seconds between looks at the ranks' heartbeats."""
STUCK_S = 45.0
"""A trainer without progress for so long is reported."""
TRAIN: dict[str, str] = {"sft": "ctrl_hpc.train.sft", "rl": "ctrl_hpc.train.rl"}
"""The module of each stage; its ``run(config, run_dir)`` is called on every rank."""
_TRIES_WITHOUT_PROGRESS = 2
_PEER_LOST = re.compile(
    r"gloo|nccl|connection (reset|closed|refused)|broken pipe|socket|tcpstore|processgroup|distbackend|"
    r"stopped before the end|told to stop|timed.out|preempted|not checkpointable",
    re.IGNORECASE,
)
"""Errors that say that another rank went away, or that the job was told to stop: worth another start."""


def run_trainer(config: Config, run_dir: str | Path, stage: Stage, prefork: Prefork | None = None) -> None:
    """Run a training stage to its end as a job of ``trainer.nodes`` x ``trainer.ranks_per_node`` tasks, forked from
    ``prefork`` where they may be.

    Shows progress, ends the job on Ctrl-C, and as soon as one rank fails. A job that was preempted, timed out, or lost
    a process is submitted again, up to ``launch.max_requeues`` times, and continues from its last checkpoint; twice
    without progress is a failure. Raises RuntimeError with one line that says what failed and names the log.
    """
    folder = Path(run_dir).absolute()
    jobs = Jobs(config, folder, "trainer", prefork)
    without_progress = 0
    for _ in range(config.launch.max_requeues + 1):
        before = _progress(folder, stage)[0]
        job = _submit(jobs, config, folder, stage)
        try:
            problem = _follow(jobs, job, config, folder, stage)
        finally:
            jobs.end([job], grace_s=5.0)
        if problem is None:
            return
        if disk.says_full(problem.text) or disk.is_full(folder):
            console.print(f"{stage}: {problem.text} (log: {problem.log})", soft_wrap=True)
            disk.await_space(folder, config.launch.disk_patience_s)
            continue
        if not problem.transient:
            raise RuntimeError(f"{stage}: {problem.text} (log: {problem.log})")
        without_progress = without_progress + 1 if _progress(folder, stage)[0] <= before else 0
        if without_progress >= _TRIES_WITHOUT_PROGRESS:
            raise RuntimeError(f"{stage}: {problem.text}, twice without progress (log: {problem.log})")
        console.print(f"{stage}: {problem.text}; continuing from the last checkpoint (log: {problem.log})")
    raise RuntimeError(f"{stage}: interrupted more than launch.max_requeues={config.launch.max_requeues} times")


class _Problem:
    def __init__(self, text: str, log: Path, transient: bool) -> None:
        self.text, self.log, self.transient = text, log, transient


def _submit(jobs: Jobs, config: Config, folder: Path, stage: Stage) -> Job:
    trainer = config.trainer
    session = _session(folder)
    port = 0 if config.launch.engine == "slurm" else http.free_port()
    resources = config.launch.trainer
    return jobs.submit(
        "trainer",
        _run_rank,
        [(config, str(folder), TRAIN[stage], session, port)],
        resources,
        nodes=trainer.nodes,
        tasks_per_node=trainer.ranks_per_node,
        threads=trainer.threads,
    )[0]


def _session(folder: Path) -> str:
    entry = read_entry(folder / "services" / "driver" / "driver.json")
    if entry is None:
        raise ValueError(f"{folder}: the trainer runs under a driver; enter Services(config, run_dir) first")
    return entry.session


def _follow(jobs: Jobs, job: Job, config: Config, folder: Path, stage: Stage) -> _Problem | None:
    """Watch a job to its end; what went wrong, or None."""
    moved = time.monotonic()
    step, total, note = _progress(folder, stage)
    steps: Steps | None = None
    launch, looked = config.launch, moved
    registry = Registry(folder, heartbeat_s=launch.heartbeat_s, dead_after_s=launch.dead_after_s)
    with ExitStack() as stack:
        while True:
            now = _progress(folder, stage)
            if now != (step, total, note) and now[1]:
                step, total, note = now
                moved = time.monotonic()
                steps = steps or stack.enter_context(Steps(f"{stage}: steps", total, done=step))
                steps.reach(step, note)
            outcomes = [job.result(task) for task in range(job.tasks)]
            if all(outcome is not None and outcome[0] == "success" for outcome in outcomes):
                return None
            failed = any(outcome is not None and outcome[0] == "error" for outcome in outcomes)
            lost = jobs.lost_tasks(job)
            if failed or lost or jobs.state(job) == "ended":
                return _diagnose(job, lost)
            if time.monotonic() - looked > LOOK_S:
                looked = time.monotonic()
                silent = [service.id for service in registry.census("trainer")[1] if service.job_id == job.id]
                if silent:
                    registry.remove(lambda service: (service.role, service.job_id) != ("trainer", job.id))
                    rank = int(silent[0].partition("-")[0])
                    lost_rank = f"the job lost a process (no heartbeat of rank {rank})"
                    return _Problem(lost_rank, job.log(rank), transient=True)
            if time.monotonic() - moved > STUCK_S:
                moved = time.monotonic()
                state = jobs.state(job)
                console.print(f"{stage}: no progress for {STUCK_S:.0f} s (job {job.id} {state}; log: {job.log()})")
            time.sleep(POLL_S)


def _diagnose(job: Job, lost: list[int]) -> _Problem | None:
    """The first error of a rank's own, else a rank that was told to stop or killed; None when all succeeded by now."""
    time.sleep(2 * POLL_S)  # ranks fail together: let the one at fault write its error
    errors = []
    for task in range(job.tasks):
        outcome = job.result(task)
        if outcome is not None and outcome[0] == "error":
            errors.append((task, job.last_words(task)))
    own = [(task, text) for task, text in errors if not _PEER_LOST.search(text)]
    if own:
        task, text = own[0]
        return _Problem(f"rank {task} failed: {text}", job.log(task), transient=False)
    silent = lost or [task for task in range(job.tasks) if job.result(task) is None]
    if silent:
        ranks = ", ".join(map(str, silent))  # the others are ended with the lost one, so that several may be silent
        return _Problem(f"the job lost a process (no result of rank {ranks})", job.log(silent[-1]), transient=True)
    if not errors:
        return None  # the last result came after the look that missed it
    task, text = errors[0]
    return _Problem(f"rank {task} stopped: {text}", job.log(task), transient=True)


def _progress(folder: Path, stage: Stage) -> tuple[int, int, str]:
    """Step, steps and a short note, as rank 0 last journalled them; zeros before."""
    found = journal.progress(folder, stage)
    metrics = found.get("metrics", {})
    shown = ("sft/loss",) if stage == "sft" else ("rl/reward", "rl/kl")
    note = " ".join(f"{name.partition('/')[2]} {metrics[name]:.3f}" for name in shown if name in metrics)
    return found.get("step", 0), found.get("steps", 0), note


def _run_rank(config: Config, run_dir: str, module: str, session: str, port: int) -> None:
    """One rank of the trainer: sets torch.distributed's environment and runs the module's ``run``."""
    leave_with_driver(run_dir, session, config.launch.dead_after_s)
    environment = submitit.JobEnvironment()
    node = element.first_node()
    os.environ.update(
        RANK=str(environment.global_rank),
        WORLD_SIZE=str(environment.num_tasks),
        LOCAL_RANK=str(environment.local_rank),
        LOCAL_WORLD_SIZE=str(config.trainer.ranks_per_node),
        MASTER_ADDR="127.0.0.1" if config.launch.engine == "local" else element.address(node),
        MASTER_PORT=str(port or 20000 + int(os.environ["SLURM_JOB_ID"]) % 40000),
    )
    registry = Registry(run_dir, heartbeat_s=config.launch.heartbeat_s)
    with registry.register(
        "trainer",
        "",
        id=f"{environment.global_rank}-{environment.job_id}",
        host=element.this_node(),
        job_id=environment.job_id,
        log=str(environment.paths.stdout),
        session=session,
    ):
        with _monitored(config, run_dir, environment):
            importlib.import_module(module).run(config, Path(run_dir))


def _monitored(config: Config, run_dir: str, environment: submitit.JobEnvironment) -> AbstractContextManager[object]:
    """Journals this rank's node, by the first of its ranks."""
    if environment.local_rank != 0 or not config.wandb.services:
        return nullcontext()
    node = environment.global_rank // config.trainer.ranks_per_node
    return Monitor(run_dir, "trainer", node, config.wandb.services_every_s)
