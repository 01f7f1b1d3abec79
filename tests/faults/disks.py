"""Faults of the file system that a run directory lies on: full, slow, and standing still."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable

from strikes import ELEMENTS, Fault, Site, Strike

FULL_S = 12.0
SLOW_S = 20.0
"""Longer than a heartbeat may be missing on the test cluster."""
SLOW_STEPS_S = (1.0, 0.1)
"""A slow disk answers nothing, then what has gathered, in turns of so many seconds."""


def fill(*roles: str) -> Callable[[Site], Strike]:
    """The disk is full for a while, once one of these roles is there."""

    def strike(site: Site) -> Strike:
        folder = site.run_dir.parent
        assert os.path.ismount(folder), f"{folder}: only a file system of its own is filled"
        site.pick(*roles)
        ballast = folder / "ballast"
        for size in (1 << 20, 1 << 10):
            with contextlib.suppress(OSError), open(ballast, "ab", buffering=0) as out:  # until it is full
                while True:
                    out.write(bytes(size))
        over = threading.Event()

        def repair() -> None:
            ballast.unlink(missing_ok=True)
            over.set()

        return Strike(what="the disk is full", felt=over.is_set, repair=repair, repair_after_s=FULL_S)

    return strike


def slow_down(site: Site) -> Strike:
    """Every access takes up to a second for a while."""
    assert site.disk is not None, "only a file system that a process of its own serves is slowed down"
    site.pick(*ELEMENTS, "trainer")
    stop, over = threading.Event(), threading.Event()
    disk = site.disk

    def take_turns() -> None:
        hang_s, answer_s = SLOW_STEPS_S
        while not stop.is_set():
            os.kill(disk, signal.SIGSTOP)
            stop.wait(hang_s)
            os.kill(disk, signal.SIGCONT)
            time.sleep(answer_s)
        over.set()

    threading.Thread(target=take_turns, name="slow-disk", daemon=True).start()

    def repair() -> None:
        stop.set()
        over.wait()

    what = f"an access to the disk takes up to {SLOW_STEPS_S[0]:.0f} s"
    return Strike(what=what, felt=over.is_set, repair=repair, repair_after_s=SLOW_S)


def hang(site: Site) -> Strike:
    """No access returns for a while, as with a file server that is gone."""
    assert site.disk is not None, "only a file system that a process of its own serves is stopped"
    site.pick(*ELEMENTS, "trainer")
    disk, over = site.disk, threading.Event()
    os.kill(disk, signal.SIGSTOP)

    def repair() -> None:
        os.kill(disk, signal.SIGCONT)
        over.set()

    return Strike(what="the disk does not answer", felt=over.is_set, repair=repair, repair_after_s=SLOW_S)


DISK_FAULTS: dict[str, Fault] = {
    "full disk": Fault(strike=fill(*ELEMENTS)),
    "full disk in training": Fault(strike=fill("trainer"), recovers_in_s=90.0),
    "slow disk": Fault(strike=slow_down),
    "hung disk": Fault(strike=hang),
}
"""Faults of the disk; their recovery counts from when they are over."""
