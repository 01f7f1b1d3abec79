"""Progress of long steps: a bar with rate and time left on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console(stderr=True)
"""Where a command says what goes on; its results go to standard output."""
_LOG_EVERY_S = 15.0
"""Seconds between the lines of a log."""


class Steps:
    """A long step's progress: ``advance`` it as work gets done."""

    def __init__(self, description: str, total: int, done: int = 0) -> None:
        self._console = Console(stderr=True)
        self._description, self._total, self._done = description, total, done
        self._started, self._first, self._told = time.monotonic(), done, time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(description, total=total, completed=done, note="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def advance(self, n: int = 1, note: str = "") -> None:
        """``n`` more units are done; ``note`` is shown behind the bar."""
        self.reach(self._done + n, note)

    def reach(self, done: int, note: str = "") -> None:
        """``done`` units are done in all."""
        self._done = done
        self._bar.update(self._task, completed=done, note=note)
        now = time.monotonic()
        if not self._console.is_terminal and (now - self._told > _LOG_EVERY_S or done >= self._total):
            self._told = now
            rate = (done - self._first) / max(now - self._started, 1e-9)
            left = f", {(self._total - done) / rate:.0f} s left" if rate > 0 and done < self._total else ""
            self._console.print(f"{self._description}: {done}/{self._total}{left} {note}".rstrip(), highlight=False)
