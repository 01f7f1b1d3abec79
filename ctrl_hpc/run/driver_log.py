"""What a driver prints, in ``RUN/logs/driver.log``, whichever way it was started."""

from __future__ import annotations

import contextlib
import os
import queue
import re
import sys
import threading
from collections.abc import Iterator
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

    Nothing is done where they go there already. A thread of its own writes, so that a disk that hangs holds up nothing;
    what a full disk does not take is lost.
    """
    file = _file_of(run_dir)
    if _goes_there(file):
        yield
        return
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    writer = threading.Thread(target=_write, args=(file, lines), name="driver-log", daemon=True)
    writer.start()
    shown = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Both(stream, lines) for stream in shown)  # type: ignore[assignment]
    try:
        yield
    except Exception as error:
        lines.put(f"ended: {error}")
        raise
    finally:
        sys.stdout, sys.stderr = shown
        lines.put(None)
        writer.join(_PATIENCE_S)


class _Both:
    """A stream whose lines are put into a queue, too."""

    def __init__(self, shown: TextIO, lines: queue.SimpleQueue[str | None]) -> None:
        self._shown, self._lines, self._begun = shown, lines, ""

    def write(self, text: str) -> int:
        written = self._shown.write(text)
        *whole, self._begun = (self._begun + text).split("\n")
        for line in whole:
            plain = _CONTROL.sub("", line).rstrip()
            if _BAR not in plain:
                self._lines.put(plain)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shown, name)


def _write(file: Path, lines: queue.SimpleQueue[str | None]) -> None:
    while (line := lines.get()) is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "a", encoding="utf-8") as out:
                out.write(f"{line}\n")
        except OSError as error:
            if error.errno not in disk.FULL:
                raise


def _goes_there(file: Path) -> bool:
    """Whether standard output is that file, as it is for a driver that Python or sbatch started."""
    try:
        return os.path.samestat(os.fstat(sys.stdout.fileno()), file.stat())
    except (OSError, ValueError):  # no such file yet, or no descriptor behind the stream
        return False
