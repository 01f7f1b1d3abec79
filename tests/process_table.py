"""Which processes of a test are alive."""

import os
from pathlib import Path

import psutil


def processes_of(folder: Path) -> list[str]:
    """Living processes, zombies and this one excepted, whose command line names the folder."""
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            command = " ".join(process.cmdline())
        except psutil.Error:
            continue  # it ended meanwhile, or is a zombie
        if str(folder) in command:
            found.append(f"{process.pid} {command[:200]}")
    return found
