"""Stopping a trainer in time: by a signal, or because the wall-time would not last for another step and a save."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGTERM, signal.SIGUSR2)


class Interruption:
    """While entered, SIGTERM and SIGUSR2 are noted instead of obeyed, for the step in hand to end and be saved.

    ``requested`` is also true when less is left until ``SLURM_JOB_END_TIME`` than the longest step and the longest
    save took so far, with half as much again.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._before: dict[int, Any] = {}
        self._longest: dict[str, float] = {}
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        self._end = float(end) if end.isdigit() else None

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number

    def measured(self, what: str, seconds: float) -> None:
        """``step`` or ``save`` took this long."""
        self._longest[what] = max(seconds, self._longest.get(what, 0.0))

    @property
    def requested(self) -> bool:
        """Whether to save now and stop."""
        out_of_time = self._end is not None and time.time() + 1.5 * sum(self._longest.values()) > self._end
        return self._signal is not None or out_of_time

    def obey(self, step: int) -> None:
        """After the save: hand the signal to whoever would have had it (submitit requeues the job), or just stop.

        Raises RuntimeError when the process is still alive after that.
        """
        number = self._signal if self._signal is not None else signal.SIGUSR2
        self.__exit__()
        if self._signal is not None or callable(self._before.get(number)):
            os.kill(os.getpid(), number)
        raise RuntimeError(f"stopped before the end: saved after step {step}; a rerun continues there")
