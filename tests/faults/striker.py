"""The striker: does faults as the run comes along, repairs them in time, and watches the run recover."""

from __future__ import annotations

import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import recovery
from disks import DISK_FAULTS
from recovery import Recovered, Recovery
from strikes import JOB_FAULTS, POLL_S, Fault, Site

FAULTS: dict[str, Fault] = JOB_FAULTS | DISK_FAULTS
"""All faults by name."""
LOOK_S = 0.5
"""Seconds between looks at how the run recovers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A fault of a plan."""

    name: str
    """A key of ``FAULTS``."""
    progress: float
    """It is due when the run has come so far (:func:`recovery.progress`), be the machine fast or slow, ..."""
    delay_s: float
    """... and so many seconds later: at no particular moment of a step."""


class Striker(threading.Thread):
    """Does the faults of a plan; ``faults`` tells what was done and what came of it, ``failure`` why it stopped."""

    def __init__(
        self, site: Site, plan: Sequence[Planned], say: Callable[[str], None], *, one_at_a_time: bool = False
    ) -> None:
        """``one_at_a_time``: a fault waits for the recovery from the one before, too."""
        super().__init__(name="striker", daemon=True)
        self._site, self._plan, self._say, self._one_at_a_time = site, list(plan), say, one_at_a_time
        self._due: dict[int, float] = {}
        self._began = time.monotonic()
        self._repairs: list[Repair] = []
        self._recovery = Recovery(site)
        self._looked = 0.0
        self.failure: BaseException | None = None

    @property
    def faults(self) -> list[Recovered]:
        """What was done, in order."""
        return self._recovery.faults

    def run(self) -> None:
        """Strike by strike, to the end of the run; what is not repaired then is repaired."""
        try:
            while self._plan and not self._site.ended():
                fault = self._next()
                if fault is None:
                    self._wait()
                    continue
                self._plan.remove(fault)
                self._strike(fault.name)
                while self._one_at_a_time and self.faults[-1].recovery_s is None:
                    self._wait()
            while not self._site.ended():
                self._wait()
        except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
            self.failure = error
        finally:
            for repair in self._repairs:
                repair.now()
            self._look()

    def _next(self) -> Planned | None:
        """A fault that is due."""
        now, progress = time.monotonic(), recovery.progress(self._site.run_dir)
        for fault in self._plan:
            if progress >= fault.progress and now >= self._due.setdefault(id(fault), now + fault.delay_s):
                return fault
        return None

    def _strike(self, name: str) -> None:
        fault = FAULTS[name]
        before = recovery.look(self._site)
        strike = fault.strike(self._site)
        for role, count in Counter(victim.role for victim in strike.victims).items():
            before.services[role] = max(before.services[role], count)  # they may have come after the look
        self._recovery.struck(name, strike, fault.recovers_in_s, before)
        self._say(f"{time.monotonic() - self._began:6.1f} s: {strike.what}")
        if strike.repair is not None:
            self._repairs.append(Repair(strike.repair, strike.repair_after_s))

    def _wait(self) -> None:
        time.sleep(POLL_S)
        if time.monotonic() - self._looked > LOOK_S:
            self._look()
            self._looked = time.monotonic()

    def _look(self) -> None:
        open_ones = [item for item in self.faults if item.recovery_s is None]
        self._recovery.look()
        for item in open_ones:
            if item.recovery_s is not None:
                at = time.monotonic() - self._began
                self._say(f"{at:6.1f} s: as before, {item.recovery_s:.1f} s after: {item.strike.what}")


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
