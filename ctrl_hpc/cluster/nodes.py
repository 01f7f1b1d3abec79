"""Names and addresses of the nodes a job runs on."""

from __future__ import annotations

import os
import re
import socket
import subprocess


def this_node() -> str:
    """The name of this node: Slurm's, where it has one (several nodes of a test cluster share a host)."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def address(node: str) -> str:
    """An address by which other nodes reach a node: Slurm's NodeAddr, else the node's name."""
    if "SLURM_JOB_ID" not in os.environ:
        return node
    command = ["scontrol", "show", "node", node, "--oneliner"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r"\bNodeAddr=(\S+)", answer.stdout)
    return found.group(1) if found else node


def first_node() -> str:
    """The first node of this job."""
    node_list = os.environ.get("SLURM_JOB_NODELIST")
    if not node_list:
        return this_node()
    command = ["scontrol", "show", "hostnames", node_list]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return answer.stdout.split()[0]
