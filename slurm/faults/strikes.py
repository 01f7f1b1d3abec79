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

from ctrl_hpc.cluster.registry import Registry, Service

TESTCLUSTER = Path(__file__).resolve().parent.parent / "testcluster"
ELEMENTS = ("executor", "critic", "generator")
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

    def services(self, *roles: str) -> list[Service]:
        """The living services of some roles."""
        return [service for service in Registry(self.run_dir).services() if service.role in roles]

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
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class Strike:
    """A fault that was done."""

    what: str
    repair: Callable[[], None] | None = None
    """What the site does about it later; None: nothing is needed."""
    repair_after_s: float = 0.0


def cancel_element(site: Site) -> Strike:
    """``scancel`` of an array element."""
    victim = site.pick(*ELEMENTS)
    site.command("scancel", victim.job_id)
    return Strike(what=f"scancel of {victim.role} {victim.job_id}")


def kill(*roles: str) -> Callable[[Site], Strike]:
    """SIGKILL of a process of one of these roles."""

    def strike(site: Site) -> Strike:
        victim = site.pick(*roles)
        os.kill(victim.pid, signal.SIGKILL)
        return Strike(what=f"SIGKILL of {victim.role} {victim.job_id}, process {victim.pid}")

    return strike


def freeze_element(site: Site) -> Strike:
    """SIGSTOP of an array element: its heartbeat is lost."""
    victim = site.pick(*ELEMENTS)
    os.kill(victim.pid, signal.SIGSTOP)
    return Strike(what=f"SIGSTOP of {victim.role} {victim.job_id}, process {victim.pid}")


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
    site.node("lose", name)
    return Strike(what=f"node {name} lost", repair=lambda: site.node("start", name), repair_after_s=30.0)


def stop_slurmd(site: Site) -> Strike:
    """slurmd of a node ends; what runs there goes on until Slurm gives it up."""
    name = site.pick(*ELEMENTS, "trainer").host
    site.node("stop", name)
    return Strike(what=f"slurmd of {name} stopped", repair=lambda: site.node("start", name), repair_after_s=30.0)


def preempt(site: Site) -> Strike:
    """A job of higher priority takes the node of an executor, whose partition allows that."""
    victim = site.pick("executor")
    options = ("--partition=high", "--exclusive", f"--nodelist={victim.host}", "--output=/dev/null")
    job = site.command("sbatch", "--parsable", *options, "--wrap", "sleep 5")
    return Strike(what=f"job {job} preempts {victim.host} with executor {victim.job_id}")


def end_time(site: Site) -> Strike:
    """The trainer's time limit comes near: Slurm warns it as the configuration says, then would kill it."""
    victim = site.pick("trainer")
    site.command("scontrol", "update", f"JobId={victim.job_id}", "EndTime=now+33")
    return Strike(what=f"the time limit of trainer {victim.job_id} is near")


def fill_disk(*roles: str) -> Callable[[Site], Strike]:
    """The run's disk is full for a while, once one of these roles is there."""

    def strike(site: Site) -> Strike:
        folder = site.run_dir.parent
        assert os.path.ismount(folder), f"{folder}: only a file system of its own is filled"
        site.pick(*roles)
        ballast = folder / "ballast"
        for size in (1 << 20, 1 << 10):
            with contextlib.suppress(OSError), open(ballast, "ab", buffering=0) as out:  # until it is full
                while True:
                    out.write(bytes(size))
        return Strike(what="the disk is full", repair=lambda: ballast.unlink(missing_ok=True), repair_after_s=12.0)

    return strike


FAULTS: dict[str, Callable[[Site], Strike]] = {
    "cancel element": cancel_element,
    "kill executor": kill("executor"),
    "kill rollout server": kill("critic", "generator"),
    "kill trainer rank": kill("trainer"),
    "kill driver": kill("driver"),
    "freeze element": freeze_element,
    "hang executor": hang_executor,
    "lose node": lose_node,
    "stop slurmd": stop_slurmd,
    "preempt": preempt,
    "time limit": end_time,
    "full disk": fill_disk(*ELEMENTS),
    "full disk in training": fill_disk("trainer"),
}
"""All faults by name."""


class Striker(threading.Thread):
    """Does faults one after another and repairs them in time; ``strikes`` tells what was done, ``failure`` why not."""

    def __init__(self, site: Site, plan: Sequence[tuple[float, str]], say: Callable[[str], None]) -> None:
        """``plan``: seconds since the strike before, and a key of ``FAULTS``."""
        super().__init__(name="striker", daemon=True)
        self._site, self._plan, self._say = site, plan, say
        self._began = time.monotonic()
        self._repairs: list[Repair] = []
        self.strikes: list[str] = []
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Strike by strike; what is not repaired when the run ends is repaired then."""
        try:
            for gap_s, name in self._plan:
                last = time.monotonic()
                while not self._site.ended() and time.monotonic() - last < gap_s:
                    time.sleep(POLL_S)
                if self._site.ended():
                    break
                strike = FAULTS[name](self._site)
                self.strikes.append(name)
                self._say(f"{time.monotonic() - self._began:6.1f} s: {strike.what}")
                if strike.repair is not None:
                    self._repairs.append(Repair(strike.repair, strike.repair_after_s))
            while any(repair.is_alive() for repair in self._repairs) and not self._site.ended():
                time.sleep(POLL_S)
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            self.failure = error
        finally:
            for repair in self._repairs:
                repair.now()


class Repair(threading.Thread):
    """Does a repair after a while, or at once when told."""

    def __init__(self, repair: Callable[[], None], after_s: float) -> None:
        super().__init__(name="repair", daemon=True)
        self._repair, self._after_s = repair, after_s
        self._told = threading.Event()
        self.start()

    def run(self) -> None:
        """Wait, then repair."""
        self._told.wait(self._after_s)
        self._repair()

    def now(self) -> None:
        """Return when the repair is done."""
        self._told.set()
        self.join()
