"""SIGKILL for the process in which wandb writes what a test logs."""

import time

import psutil

from ctrl_hpc.cluster import processes


def kill_wandb() -> None:
    """Kill the wandb process of this one, and those that it has started; none where it is dead already."""
    for child in psutil.Process().children():
        if child.name() == "wandb-core" and processes.started(child.pid) is not None:
            killed = [child, *child.children(recursive=True)]
            for process in killed:
                process.kill()
            while any(processes.started(process.pid) is not None for process in killed):
                time.sleep(0.01)
