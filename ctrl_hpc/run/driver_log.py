"""What a driver prints, in ``RUN/logs/driver.log``, whichever way it was started."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from ctrl_hpc.run import disk

_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")
_BAR = "━"
"""Progress bars are drawn with it, many times a second: no lines for a file."""
_PATIENCE_S = 2.0
"""Longest wait for a slow disk at the end."""


def _file_of(run_dir: str | Path) -> Path:
    """Where it is."""
    return Path(run_dir) / "logs" / "driver.log"


@contextlib.contextmanager
def kept(run_dir: str | Path) -> Iterator[None]:
    """Standard output and error go to the file, too, without colours and progress bars.

    Where they go there already, that is all. A thread of its own writes, so that a disk that hangs holds up nothing;
    what a full disk does not take is lost, there and where they go: it ends no driver.
    """
    file = _file_of(run_dir)
    if _goes_there(file):
        with _shown_by(_Tolerant):
            yield
        return
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    writer = threading.Thread(target=_write, args=(file, lines), name="driver-log", daemon=True)
    writer.start()
    try:
        with _shown_by(lambda stream: _Both(stream, lines)):
            yield
    except Exception as error:
        lines.put(f"ended: {error}")
        raise
    finally:
        lines.put(None)
        writer.join(_PATIENCE_S)


@contextlib.contextmanager
def _shown_by(wrapped: Callable[[TextIO], Any]) -> Iterator[None]:
    shown = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (wrapped(stream) for stream in shown)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = shown


class _Tolerant:
    """A stream that loses what a full disk does not take."""

    def __init__(self, shown: TextIO) -> None:
        self._shown = shown

    def write(self, text: str) -> int:
        with _unless_full():
            self._shown.write(text)
        return len(text)

    def flush(self) -> None:
        with _unless_full():
            self._shown.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shown, name)


@contextlib.contextmanager
def _unless_full() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in disk.FULL:
            raise


class _Both(_Tolerant):
    """One whose lines are put into a queue, too."""

    def __init__(self, shown: TextIO, lines: queue.SimpleQueue[str | None]) -> None:
        super().__init__(shown)
        self._lines, self._begun = lines, ""

    def write(self, text: str) -> int:
        written = super().write(text)
        *whole, self._begun = (self._begun + text).split("\n")
        for line in whole:
            plain = _CONTROL.sub("", line).rstrip()
            if _BAR not in plain:
                self._lines.put(plain)
        return written


def _write(file: Path, lines: queue.SimpleQueue[str | None]) -> None:
    while (line := lines.get()) is not None:
        with _unless_full():
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "a", encoding="utf-8") as out:
                out.write(f"{line}\n")


def _goes_there(file: Path) -> bool:
    """Whether standard output is that file, as it is for a driver that Python or sbatch started."""
    try:
        return os.path.samestat(os.fstat(sys.stdout.fileno()), file.stat())
    except (OSError, ValueError):  # no such file yet, or no descriptor behind the stream
        return False
