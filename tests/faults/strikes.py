"""Faults of a run on a test cluster, each done to something picked at random: what may happen to jobs, nodes and disks.

A fault waits until there is something to do it to. Some need a repair later, as an operator or the site would do it.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from ctrl_hpc.cluster import processes
from ctrl_hpc.cluster.registry import Registry, Service

TESTCLUSTER = Path(__file__).resolve().parents[2] / "slurm" / "testcluster"
ELEMENTS = ("executor", "critic", "generator")
HUNG = "hung-"
"""Start of the ids of executors that hang."""
POLL_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A run on a test cluster."""

    run_dir: Path
    base: Path
    """The test cluster's folder."""
    random: random.Random
    ended: Callable[[], bool]
    """Whether the run is over."""
    disk: int | None = None
    """Process that serves the file system of the run directory, where one of its own does."""

    def services(self, *roles: str) -> list[Service]:
        """The living services of some roles; those that only a fault has put there do not count."""
        living = Registry(self.run_dir).services()
        return [service for service in living if service.role in roles and not service.id.startswith(HUNG)]

    def pick(self, *roles: str) -> Service:
        """One of them, waited for. Raises RuntimeError when the run ends before there is any."""
        while not (found := self.services(*roles)):
            if self.ended():
                raise RuntimeError(f"{self.run_dir}: the run ended before there was any {' or '.join(roles)}")
            time.sleep(POLL_S)
        return self.random.choice(found)

    def node(self, what: str, name: str) -> None:
        """Stop, lose or start a node of the test cluster."""
        subprocess.run([TESTCLUSTER / "node", what, name, "--base", self.base], check=True, capture_output=True)

    def command(self, *words: str) -> str:
        """What a Slurm command prints."""
        environment = {**os.environ, "SLURM_CONF": str(self.base / "slurm.conf")}
        return subprocess.run(words, check=True, capture_output=True, text=True, env=environment).stdout.strip()


def is_over(job: str) -> bool:
    """Whether a driver's job has left the queue for good: its guard, which may have it requeued, has left it, too."""
    listed = subprocess.run(["squeue", "-h", "-o", "%i %j"], capture_output=True, text=True, check=False)
    names = (job, f"ctrl-hpc-guard-{job}")
    return listed.returncode == 0 and not any(
        name in line.split() for line in listed.stdout.splitlines() for name in names
    )


def at_once() -> bool:
    """A fault that takes effect when it is done."""
    return True


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """A fault that was done."""

    what: str
    victims: Sequence[Service] = ()
    """Services that will not serve again."""
    felt: Callable[[], bool] = at_once
    """Whether it has taken effect, or (disks) is over: from then on the run recovers."""
    repair: Callable[[], None] | None = None
    """What the site does about it later; None: nothing is needed."""
    repair_after_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A kind of fault."""

    strike: Callable[[Site], Strike]
    recovers_in_s: float = 60.0
    """The run works again as before within this time after the fault."""


def is_gone(service: Service) -> bool:
    """Whether a service's process has ended."""
    return not processes.is_running(service.pid, service.started)


def cancel_element(site: Site) -> Strike:
    """``scancel`` of an array element."""
    victim = site.pick(*ELEMENTS)
    site.command("scancel", "--quiet", victim.job_id)  # quiet: it may be gone meanwhile
    return Strike(what=f"scancel of {victim.role} {victim.job_id}", victims=[victim])


def kill(*roles: str) -> Callable[[Site], Strike]:
    """SIGKILL of a process of one of these roles."""
    return _send(signal.SIGKILL, *roles)


def freeze(*roles: str) -> Callable[[Site], Strike]:
    """SIGSTOP of a process of one of these roles: its heartbeat is lost."""
    return _send(signal.SIGSTOP, *roles)


def _send(number: signal.Signals, *roles: str) -> Callable[[Site], Strike]:
    def strike(site: Site) -> Strike:
        victim = site.pick(*roles)
        os.kill(victim.pid, number)
        what = f"{number.name} of {victim.role} {victim.job_id}, process {victim.pid}"
        return Strike(what=what, victims=[victim])

    return strike


def freeze_driver(site: Site) -> Strike:
    """The driver stands still for a while: its jobs take it for lost."""
    victim = site.pick("driver")
    os.kill(victim.pid, signal.SIGSTOP)
    over = threading.Event()

    def repair() -> None:
        if not is_gone(victim):
            os.kill(victim.pid, signal.SIGCONT)
        over.set()

    what = f"SIGSTOP of the driver, process {victim.pid}"
    return Strike(what=what, felt=over.is_set, repair=repair, repair_after_s=20.0)


def kill_wandb(site: Site) -> Strike:
    """SIGKILL of the process in which the driver's wandb writes, while there is a trainer whose steps it is told."""
    while True:
        site.pick("trainer")
        driver = site.pick("driver")
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(driver.pid).children(recursive=True):
                if child.name() == "wandb-core" and child.status() != psutil.STATUS_ZOMBIE:
                    child.kill()
                    return Strike(what=f"SIGKILL of wandb's process {child.pid} of the driver")
        time.sleep(POLL_S)


def kill_any_process(site: Site) -> Strike:
    """SIGKILL of any process of the jobs: shells, srun, Python, wandb's, sandboxes, Slurm's own step daemons."""
    site.pick(*ELEMENTS, "trainer")
    kinds: dict[str, list[psutil.Process]] = {}
    for process in _of_jobs(site.base / "slurm.conf"):
        try:
            kinds.setdefault(process.name(), []).append(process)
        except psutil.NoSuchProcess:
            continue
    victim = site.random.choice(kinds[site.random.choice(sorted(kinds))])
    services = site.services("driver", *ELEMENTS, "trainer")
    try:
        command = " ".join(victim.cmdline())[:100]
        victim.kill()
    except psutil.NoSuchProcess:
        command = "gone meanwhile"
    hit = [service for service in services if service.pid == victim.pid]
    return Strike(what=f"SIGKILL of process {victim.pid}: {command}", victims=hit)


def _of_jobs(conf: Path) -> list[psutil.Process]:
    """The processes of all jobs of a cluster, and the daemons that watch over them."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            environment = process.environ()
            if environment.get("SLURM_CONF") != str(conf) or "SLURM_JOB_ID" not in environment:
                continue
            for member in (process, *process.children(recursive=True)):
                found[member.pid] = member
            parent = process.parent()
            if parent is not None and parent.name().startswith("slurmstepd"):
                found[parent.pid] = parent
        except psutil.Error:
            continue
    return list(found.values())


def kill_batch_shell(site: Site) -> Strike:
    """SIGKILL of the shell that runs the driver's batch script, and so of the job."""
    victim = site.pick("driver")
    shell = psutil.Process(victim.pid).parent()
    assert shell is not None and shell.name() in ("bash", "slurm_script"), "the driver is a job"
    shell.kill()
    return Strike(what=f"SIGKILL of the driver's batch shell, process {shell.pid}", victims=[victim])


def hang_executor(site: Site) -> Strike:
    """An executor that takes work and never answers, though its heart beats."""
    session = site.pick("driver").session
    command = [sys.executable, str(Path(__file__).with_name("hung_executor.py")), str(site.run_dir), session]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = process.stdout.readline().strip()

    def repair() -> None:
        process.kill()
        process.communicate()

    return Strike(what=f"an executor that hangs at {url}", repair=repair, repair_after_s=40.0)


def lose_node(site: Site) -> Strike:
    """A node goes down with all that runs on it."""
    name = site.pick(*ELEMENTS, "trainer").host
    there = [service for service in site.services("driver", *ELEMENTS, "trainer") if service.host == name]
    site.node("lose", name)
    repair = lambda: site.node("start", name)  # noqa: E731
    return Strike(what=f"node {name} lost", victims=there, repair=repair, repair_after_s=30.0)


def stop_slurmd(site: Site) -> Strike:
    """slurmd of a node ends; what runs there goes on until Slurm gives it up."""
    name = site.pick(*ELEMENTS, "trainer").host
    site.node("stop", name)
    repaired: list[bool] = []

    def repair() -> None:
        site.node("start", name)
        repaired.append(True)

    def given_up() -> bool:
        return bool(repaired) or "down" in site.command("sinfo", "-h", "-n", name, "-o", "%T")

    return Strike(what=f"slurmd of {name} stopped", felt=given_up, repair=repair, repair_after_s=30.0)


def preempt(site: Site) -> Strike:
    """A job of higher priority takes the node of an executor, whose partition allows that."""
    victim = site.pick("executor")
    options = ("--partition=high", "--exclusive", f"--nodelist={victim.host}", "--output=/dev/null")
    job = site.command("sbatch", "--parsable", *options, "--wrap", "sleep 5")
    there = [service for service in site.services("executor") if service.host == victim.host]
    what = f"job {job} preempts {victim.host} with executor {victim.job_id}"
    return Strike(what=what, victims=there, felt=lambda: is_gone(victim))


def end_time(role: str, seconds: int) -> Callable[[Site], Strike]:
    """The time limit of a job comes near: Slurm warns it as its batch script says, then would kill it."""

    def strike(site: Site) -> Strike:
        while True:
            victim = site.pick(role)
            with contextlib.suppress(subprocess.CalledProcessError):  # its job is just ending: another one
                site.command("scontrol", "update", f"JobId={victim.job_id}", f"EndTime=now+{seconds}")
                break
            time.sleep(POLL_S)
        there = [service for service in site.services(role) if service.job_id == victim.job_id]

        def repair() -> None:
            """The next start of the job has its whole time again, not what was left of this one."""
            with contextlib.suppress(subprocess.CalledProcessError):  # it has ended, or another job goes on with it
                site.command("scontrol", "update", f"JobId={victim.job_id}", "TimeLimit=60")

        what = f"the time limit of {role} {victim.job_id} is near"
        felt = lambda: is_gone(victim)  # noqa: E731
        return Strike(what=what, victims=there, felt=felt, repair=repair, repair_after_s=40.0)

    return strike


JOB_FAULTS: dict[str, Fault] = {
    "cancel element": Fault(strike=cancel_element),
    "kill executor": Fault(strike=kill("executor")),
    "kill rollout server": Fault(strike=kill("critic", "generator")),
    "kill trainer rank": Fault(strike=kill("trainer"), recovers_in_s=90.0),
    "kill driver": Fault(strike=kill("driver"), recovers_in_s=90.0),
    "kill batch shell": Fault(strike=kill_batch_shell, recovers_in_s=90.0),
    "kill wandb": Fault(strike=kill_wandb),
    "kill any process": Fault(strike=kill_any_process, recovers_in_s=90.0),
    "freeze element": Fault(strike=freeze(*ELEMENTS)),
    "freeze trainer rank": Fault(strike=freeze("trainer"), recovers_in_s=90.0),
    "freeze driver": Fault(strike=freeze_driver, recovers_in_s=90.0),
    "hang executor": Fault(strike=hang_executor),
    "lose node": Fault(strike=lose_node, recovers_in_s=90.0),
    "stop slurmd": Fault(strike=stop_slurmd, recovers_in_s=90.0),
    "preempt": Fault(strike=preempt),
    "time limit of an element": Fault(strike=end_time("executor", 33)),
    "time limit of the trainer": Fault(strike=end_time("trainer", 33), recovers_in_s=90.0),
    "time limit of the driver": Fault(strike=end_time("driver", 183), recovers_in_s=90.0),
}
"""Faults of processes, jobs and nodes. A lost driver takes the trainer along."""
