"""One element of an array: where it runs, how it registers, serves and leaves."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from urllib.error import HTTPError
from urllib.parse import urlsplit

import submitit

from ctrl_hpc.cluster import engines, processes
from ctrl_hpc.cluster import registry as registries
from ctrl_hpc.cluster.monitor import Monitor, direct
from ctrl_hpc.cluster.registry import DriverWatch, Registration, Registry
from ctrl_hpc.config import Config
from ctrl_hpc.config.machine import resolve_device
from ctrl_hpc.service import http
from ctrl_hpc.store.tests import folder_of


def this_node() -> str:
    """The name of this node: Slurm's, where it has one (several nodes of a test cluster share a host)."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def address(node: str) -> str:
    """An address by which other nodes reach a node of this job: Slurm's NodeAddr, else the node's name."""
    pairs = (pair.partition("=") for pair in os.environ.get("CTRL_HPC_ADDRESSES", "").split(","))
    return next((place for name, _, place in pairs if name == node and place), node)


def first_node() -> str:
    """The first node of this job: of ``n[03-05,9],x1`` it is ``n03``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", os.environ.get("SLURM_JOB_NODELIST", ""))
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group()) if first else this_node()


WATCH_S = 1.0
"""Seconds between looks for the driver."""
_HEALTH_S = 5.0
"""A service that does not answer its own question about its health for so long skips a heartbeat."""
_LEAVE_S = 10.0
"""Seconds an orphaned process gets to end by itself."""


def _serve_executor(config: Config, run_dir: str, element: int, session: str) -> None:
    """An element of the executor array."""
    from ctrl_hpc.sandbox.server import serve

    with _Element(config, run_dir, "executor", element, session) as this:
        serve(
            host=config.launch.bind,
            port=0,
            workers=config.executor.workers,
            cache_dir=Path(run_dir) / "verdicts" if config.executor.cache else None,
            token=token(run_dir),
            on_ready=this.ready,
            judges=config.executor.judges,
            python=config.executor.python,
            packages=config.executor.packages,
            testlib=config.executor.testlib,
            tests_dir=folder_of(run_dir),
        )


def _serve_critic(config: Config, run_dir: str, element: int, session: str) -> None:
    """An element of the critic's rollout array; it starts with the base critic."""
    _serve_rollout(config, run_dir, "critic", config.critic.model, element, session)


def _serve_generator(config: Config, run_dir: str, element: int, session: str) -> None:
    """An element of the fixed generator's rollout array."""
    _serve_rollout(config, run_dir, "generator", config.generator, element, session)


SERVE: dict[str, Callable[[Config, str, int, str], None]] = {
    "executor": _serve_executor,
    "critic": _serve_critic,
    "generator": _serve_generator,
}
"""The service of each role."""


def _serve_rollout(config: Config, run_dir: str, role: str, model: str, element: int, session: str) -> None:
    if config.rollout.engine != "builtin":
        with _Element(config, run_dir, role, element, session) as this:
            engines.serve(config, model, token(run_dir), this.ready)
        return
    from ctrl_hpc.rollout.server import serve

    with _Element(config, run_dir, role, element, session) as this:
        serve(
            model,
            host=config.launch.bind,
            port=0,
            on_ready=this.ready,
            threads=config.rollout.threads,
            device=resolve_device("rollout.device", config.rollout.device),
            dtype=config.rollout.dtype,
            batching=config.rollout.batching,
            max_batch_tokens=config.rollout.max_batch_tokens,
            token=token(run_dir),
        )


class _Element:
    """The life of an element around its server: leaves with its parent or its driver, is registered once it answers."""

    def __init__(self, config: Config, run_dir: str, role: str, element: int, session: str) -> None:
        self._launch, self._run_dir, self._role = config.launch, run_dir, role
        self._element, self._session = element, session
        self._config = config
        self._registration: Registration | None = None
        self._monitor: Monitor | None = None

    def __enter__(self) -> _Element:
        leave_with_driver(self._run_dir, self._session, self._launch.dead_after_s)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        """An element that was asked to leave has done its work: its job ends well."""
        if self._registration is not None:
            self._registration.close()
        if self._monitor is not None:
            self._monitor.__exit__()
        return kind is not None and issubclass(kind, _Asked)

    def ready(self, url: str) -> None:
        """The server answers at this URL: announce it."""
        environment = submitit.JobEnvironment()
        registry = Registry(self._run_dir, heartbeat_s=self._launch.heartbeat_s)
        self._registration = registry.register(
            self._role,
            self._advertised(url),
            id=f"{self._element}-{environment.job_id}",
            host=this_node(),
            job_id=environment.job_id,
            log=str(environment.paths.stdout),
            session=self._session,
            healthy=partial(answers, url),
        )
        if self._config.wandb.services:
            every_s, key = self._config.wandb.services_every_s, token(self._run_dir)
            self._monitor = Monitor(self._run_dir, self._role, self._element, every_s, url, key).__enter__()

    def _advertised(self, url: str) -> str:
        parts = urlsplit(url)
        host = self._launch.advertise or parts.hostname
        if host == "0.0.0.0":
            host = address(this_node())
        return f"http://{host}:{parts.port}"


def answers(url: str) -> bool:
    """Whether this process's service at ``url`` answers on ``/health``; it leaves when the service says it is dead."""
    try:
        with direct.open(f"{url}/health", timeout=_HEALTH_S):
            return True
    except HTTPError as error:
        if b'"dead"' in error.read(1000):
            print("the service's worker has ended: leaving", flush=True)
            os.kill(os.getpid(), signal.SIGTERM)
        return True
    except OSError:
        return False


def leave_with_driver(run_dir: str, session: str, dead_after_s: float) -> None:
    """End this process by SIGTERM, then by force, once it is asked to leave, or its driver or its parent is gone."""
    if os.getpid() != os.getpgrp():  # Slurm's tasks lead groups of their own already
        os.setsid()  # the terminal's Ctrl-C goes to the driver alone
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    request = leave_request(run_dir, session, submitit.JobEnvironment().job_id)
    for number in (signal.SIGTERM, signal.SIGUSR2):  # submitit's own handler swallows SIGTERM
        signal.signal(number, partial(_leave, request))
    processes.die_with_parent()
    watch = DriverWatch(run_dir, session, dead_after_s)

    def look() -> None:
        while watch.alive() and not request.exists():
            threading.Event().wait(WATCH_S)
        print(f"{'not needed' if request.exists() else f'the driver of {run_dir} is gone'}: leaving", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(_LEAVE_S)
        os._exit(1)

    threading.Thread(target=look, name="driver-watch", daemon=True).start()


class _Asked(SystemExit):
    """The driver needs this element no more."""


def leave_request(run_dir: str | Path, session: str, job_id: str) -> Path:
    """The file by which a driver asks a job to leave."""
    return registries.folder_of(run_dir) / "leave" / f"{session}-{job_id}"


def _leave(request: Path, number: int, _: FrameType | None) -> None:
    print(f"{signal.Signals(number).name}: leaving", flush=True)
    if request.exists():
        raise _Asked(0)
    raise SystemExit(processes.INTERRUPTED)


def token(run_dir: str | Path) -> str:
    """The bearer token that a run's services ask for; made once a run, readable by its owner only."""
    return http.token_in(registries.folder_of(run_dir) / "token")
