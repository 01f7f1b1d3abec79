"""Recovery: how long after a fault a run works again as it did before.

It does when the driver lives, every role that the stages left still call has as many services as before, apart from the
victims, the trainer has reached the step that it was at, and something was recorded since.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from strikes import Site, Strike

from ctrl_hpc import config as configuration
from ctrl_hpc import pipeline
from ctrl_hpc.cluster.status import status
from ctrl_hpc.config import Config
from ctrl_hpc.evaluate.critics import roles
from ctrl_hpc.run import directory, journal

SETTLE_S = 3.0
"""The run is as before when it was found so for this long."""


def work(run_dir: Path) -> tuple[int, int]:
    """Changes when a run records something: files of its stages, and the time of the newest."""
    files = [file for name in pipeline.STAGES for file in (run_dir / name).rglob("*")]
    times = []
    for file in files:
        try:
            times.append(file.stat().st_mtime_ns)
        except FileNotFoundError:
            continue
    return len(times), max(times, default=0)


def progress(run_dir: Path) -> float:
    """How far a run has come: the stages that are done, and the share that is done of one that trains."""
    total = 0.0
    for name in pipeline.STAGES:
        if directory.is_done(run_dir, name):
            total += 1.0
        elif name in journal.STAGES and (found := journal.progress(run_dir, name)):
            total += found["step"] / found["steps"]
    return total


@dataclass(slots=True, kw_only=True)
class Before:
    """What a run was like when a fault struck."""

    services: Counter[str]
    stage: str | None
    """The training stage that was under way."""
    step: int
    victims: set[int] = field(default_factory=set)
    """Process ids that no longer count."""
    work: tuple[int, int] = (0, 0)
    """When the last fault was felt."""


def look(site: Site) -> Before:
    """What a run is like now."""
    services = Counter(service.role for service in site.services("executor", "critic", "generator"))
    under_way = [name for name in journal.STAGES if journal.place(site.run_dir, name).exists()]
    stage = next((name for name in under_way if not directory.is_done(site.run_dir, name)), None)
    return Before(services=services, stage=stage, step=_step(site, stage))


def is_restored(site: Site, before: Before, config: Config) -> bool:
    """Whether a run works as before."""
    if site.ended():
        return True
    todo = [name for name in config.stages if not directory.is_done(site.run_dir, name)]
    needed = roles(config, todo)
    living = site.services("driver", *before.services)
    now = Counter(service.role for service in living if service.pid not in before.victims)
    return (
        now["driver"] > 0
        and all(now[role] >= count for role, count in before.services.items() if role in needed)
        and (before.stage not in todo or _step(site, before.stage) >= before.step)
        and work(site.run_dir) != before.work
    )


def _step(site: Site, stage: str | None) -> int:
    if stage is None:
        return 0
    return int(status(site.run_dir)["stages"].get(stage, {}).get("step", 0))


@dataclass(slots=True, kw_only=True)
class Recovered:
    """A fault and what came of it."""

    name: str
    strike: Strike
    limit_s: float
    """Seconds allowed; of faults that overlap, what the gravest of them may take."""
    felt: float | None = None
    """When it was felt, by the monotonic clock."""
    recovery_s: float | None = None
    """Seconds from when it was felt; of faults that overlap, from when the last of them was."""


class Recovery:
    """Told of strikes and asked again and again, it notes when the run is as before."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._config: Config | None = None
        self._before: Before | None = None
        self._since: float | None = None
        self.faults: list[Recovered] = []

    def struck(self, name: str, strike: Strike, limit_s: float, before: Before) -> None:
        """A fault was done; ``before`` is what the run was like."""
        if self._before is None:
            self._before = before
        self._before.victims |= {service.pid for service in strike.victims}
        self.faults.append(Recovered(name=name, strike=strike, limit_s=limit_s))

    def look(self) -> None:
        """Note what has recovered."""
        open_ones = [item for item in self.faults if item.recovery_s is None]
        if not open_ones or self._before is None:
            return
        now = time.monotonic()
        for item in open_ones:
            if item.felt is None and (item.strike.felt() or self._site.ended()):
                item.felt, self._since = now, None
                self._before.work = work(self._site.run_dir)
        felt = [item.felt for item in open_ones if item.felt is not None]
        gravest = max(item.limit_s for item in open_ones)
        if not felt:
            return
        if self._config is None:
            self._config = configuration.load(self._site.run_dir / "config.yaml")
        if not is_restored(self._site, self._before, self._config):
            self._since = None
            return
        self._since = now if self._since is None else self._since
        if now - self._since >= SETTLE_S or self._site.ended():
            for item in open_ones:
                if item.felt is not None:
                    item.limit_s, item.recovery_s = gravest, max(0.0, self._since - max(felt))
            if all(item.recovery_s is not None for item in self.faults):
                self._before, self._since = None, None
