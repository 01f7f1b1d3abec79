"""Names and addresses of the nodes a job runs on, as Slurm told its batch script; a container holds no Slurm to ask."""

from __future__ import annotations

import os
import re
import socket


def this_node() -> str:
    """The name of this node: Slurm's, where it has one (several nodes of a test cluster share a host)."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def address(node: str) -> str:
    """An address by which other nodes reach a node of this job: Slurm's NodeAddr, else the node's name."""
    pairs = (pair.partition("=") for pair in os.environ.get("CTRL_HPC_ADDRESSES", "").split(","))
    return next((place for name, _, place in pairs if name == node and place), node)


def first_node() -> str:
    """The first node of this job: of ``n[03-05,9],x1`` it is ``n03``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", os.environ.get("SLURM_JOB_NODELIST", ""))
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group()) if first else this_node()
