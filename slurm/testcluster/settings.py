"""What a test cluster consists of, its folder, ports and nodes, and the configuration files of Slurm made from them."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import socket
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

PROGRAMS = {
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "slurmdbd": "slurmdbd",
    "sinfo": "slurm-client",
    "sacctmgr": "slurm-client",
    "munged": "munge",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
}
"""Programs that must be there, and the Debian packages they come from."""

PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"
"""Daemons lie in sbin, which is not on everybody's PATH."""

LONGEST_BASE = 60
"""Unix sockets lie under the folder, and their paths hold 107 characters at most."""


@dataclass(frozen=True)
class Settings:
    """A test cluster, as written to ``cluster.json`` in its folder."""

    base: str
    """Folder of everything the cluster writes."""
    nodes: int
    """Fake nodes on this host."""
    cpus: int
    """CPUs a node claims to have."""
    gpus: int
    """Fake GPUs of a GPU node."""
    port: int
    """First of ``nodes + 2`` ports: slurmctld, slurmdbd, then a slurmd each."""
    proctrack: str
    """How Slurm tracks the processes of a job: ``cgroup`` or ``linuxproc``."""
    starter: int
    """Process that starts the cluster."""

    @property
    def folder(self) -> Path:
        """``base`` as a path."""
        return Path(self.base)

    @property
    def conf(self) -> Path:
        """What SLURM_CONF points to."""
        return self.folder / "slurm.conf"

    @property
    def prefix(self) -> str:
        """Start of the node names; unique on this host, because cgroups are named after nodes."""
        return f"tc{self.port}-"

    @property
    def node_names(self) -> list[str]:
        """All nodes."""
        return [f"{self.prefix}{i}" for i in range(1, self.nodes + 1)]

    @property
    def gpu_node_names(self) -> list[str]:
        """Nodes with GPUs: the last half, two at least where there are two."""
        return self.node_names[-max(self.nodes // 2, min(self.nodes, 2)) :]

    @property
    def slurmd_ports(self) -> dict[str, int]:
        """Where the slurmd of a node listens."""
        return {name: self.port + 2 + i for i, name in enumerate(self.node_names)}

    def save(self) -> None:
        """Write ``cluster.json``, which marks the folder as a test cluster's."""
        (self.folder / "cluster.json").write_text(json.dumps(asdict(self), indent=1) + "\n")


def read(base: Path) -> Settings | None:
    """The settings of the cluster in ``base``; None where there is none."""
    try:
        return Settings(**json.loads((base / "cluster.json").read_text()))
    except FileNotFoundError:
        return None
    except (TypeError, ValueError):
        raise ValueError(f"{base}/cluster.json: not written by this program; remove the folder by hand") from None


def programs() -> dict[str, str]:
    """Full paths of the programs. Raises ValueError when some are missing."""
    found = {name: shutil.which(name, path=PATH) for name in PROGRAMS}
    missing = [name for name, path in found.items() if path is None]
    if missing:
        packages = " ".join(sorted({PROGRAMS[name] for name in missing}))
        raise ValueError(
            f"not installed: {', '.join(missing)}; run scripts/setup-tests, or: apt-get install {packages}"
        )
    return {name: path for name, path in found.items() if path is not None}


def free_ports(count: int, first: int | None) -> int:
    """The first of ``count`` free consecutive loopback ports.

    Below those that the kernel hands out itself, and below those that a trainer listens on: 20000 and its job's id.
    """
    if first is not None:
        taken = [port for port in range(first, first + count) if not _is_free(port)]
        if taken:
            raise ValueError(f"--port {first}: port {taken[0]} is in use; leave --port out to have free ones chosen")
        return first
    choose = random.SystemRandom()
    for _ in range(200):
        first = choose.randrange(10000, 20000 - count)
        if all(_is_free(port) for port in range(first, first + count)):
            return first
    raise ValueError(f"no {count} consecutive free ports between 10000 and 20000")


def _is_free(port: int) -> bool:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def slurm_version() -> tuple[int, int]:
    """Year and month of the installed Slurm."""
    out = subprocess.run([programs()["slurmctld"], "-V"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"(\d+)\.(\d+)", out)
    assert found is not None, out
    return int(found[1]), int(found[2])


def write(settings: Settings) -> None:
    """Write slurm.conf, slurmdbd.conf, gres.conf and cgroup.conf, and the folders they name."""
    base = settings.folder
    for name in ("db", "dev", "log", "munge", "run", "spool", "state", "tmp"):
        (base / name).mkdir(exist_ok=True)
    for name in settings.node_names:
        (base / "spool" / name).mkdir(exist_ok=True)
    for gpu in range(settings.gpus):
        (base / "dev" / f"gpu{gpu}").symlink_to("/dev/null")  # slurmd asks for character devices
    settings.conf.write_text(slurm_conf(settings))
    (base / "gres.conf").write_text(gres_conf(settings))
    (base / "cgroup.conf").write_text(cgroup_conf(settings))
    dbd = base / "slurmdbd.conf"
    dbd.touch(mode=0o600)
    dbd.write_text(slurmdbd_conf(settings))
    key = base / "munge" / "key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))


def _hostlist(names: list[str]) -> str:
    numbers = [name.rpartition("-")[2] for name in names]
    return f"{names[0].rpartition('-')[0]}-[{numbers[0]}-{numbers[-1]}]" if len(names) > 1 else names[0]


def slurm_conf(settings: Settings) -> str:
    """slurm.conf: two partitions by kind of node, two by priority, quick reactions, real accounting."""
    base, host, port = settings.base, socket.gethostname().split(".")[0], settings.port
    gpu_nodes = settings.gpu_node_names if settings.gpus else []
    cpu_nodes = [name for name in settings.node_names if name not in gpu_nodes]
    slurmd_port = settings.slurmd_ports

    def node_line(names: list[str], extra: str) -> str:
        ports = f"{slurmd_port[names[0]]}-{slurmd_port[names[-1]]}" if len(names) > 1 else f"{slurmd_port[names[0]]}"
        return (
            f"NodeName={_hostlist(names)} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports} "
            f"CPUs={settings.cpus} RealMemory={max(64000, settings.cpus * 500)} State=UNKNOWN {extra}"
        )

    lines = [
        f"ClusterName=testcluster{port}",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={port}",
        "SlurmUser=root",
        "SlurmdUser=root",
        "# own munge; a requeued job waits for its old credential to expire",
        "AuthType=auth/munge",
        "CredType=cred/munge",
        f"AuthInfo=socket={base}/munge/socket,cred_expire=10",
        f"StateSaveLocation={base}/state",
        f"SlurmdSpoolDir={base}/spool/%n",
        f"SlurmctldPidFile={base}/run/slurmctld.pid",
        f"SlurmdPidFile={base}/run/%n.pid",
        f"SlurmctldLogFile={base}/log/slurmctld.log",
        f"SlurmdLogFile={base}/log/%n.log",
        "# loopback only, every node asked directly",
        "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny",
        "TreeWidth=65533",
        "MpiDefault=none",
        f"ProctrackType=proctrack/{settings.proctrack}",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/linux",
        "SwitchType=switch/none",
        "# nodes that claim more than the host has",
        "SlurmdParameters=config_overrides",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_CPU_Memory",
        "DefMemPerCPU=500",
        "# faults and ends are noticed soon",
        "SlurmdTimeout=10",
        "KillWait=2",
        "InactiveLimit=0",
        "ReturnToService=2",
        "JobRequeue=1",
        "MessageTimeout=20",
        "SchedulerType=sched/backfill",
        "SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2,bf_continue",
        "DependencyParameters=kill_invalid_depend",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "SlurmctldParameters=preempt_send_user_signal",
        "AccountingStorageType=accounting_storage/slurmdbd",
        "AccountingStorageHost=127.0.0.1",
        f"AccountingStoragePort={port + 1}",
        f"AccountingStoragePass={base}/munge/socket",
        "AccountingStorageTRES=gres/gpu",
        "GresTypes=gpu",
    ]
    if cpu_nodes:
        lines.append(node_line(cpu_nodes, "Feature=cpu"))
    if gpu_nodes:
        lines.append(node_line(gpu_nodes, f"Feature=gpu Gres=gpu:test:{settings.gpus}"))
    every, usual = _hostlist(settings.node_names), "DefaultTime=30 MaxTime=1-00:00:00 State=UP"
    lines.append(f"PartitionName=cpu Nodes={every} Default=YES PriorityTier=10 PreemptMode=OFF {usual}")
    if gpu_nodes:
        lines.append(f"PartitionName=gpu Nodes={_hostlist(gpu_nodes)} PriorityTier=10 PreemptMode=OFF {usual}")
    lines.append(f"PartitionName=low Nodes={every} PriorityTier=1 PreemptMode=REQUEUE GraceTime=5 {usual}")
    lines.append(f"PartitionName=high Nodes={every} PriorityTier=100 PreemptMode=OFF {usual}")
    return "\n".join(lines) + "\n"


def slurmdbd_conf(settings: Settings) -> str:
    """slurmdbd.conf: the database is reached over its socket, which the environment names."""
    base = settings.base
    return "\n".join(
        [
            "AuthType=auth/munge",
            f"AuthInfo=socket={base}/munge/socket",
            "DbdHost=localhost",
            "DbdAddr=127.0.0.1",
            f"DbdPort={settings.port + 1}",
            "SlurmUser=root",
            f"LogFile={base}/log/slurmdbd.log",
            f"PidFile={base}/run/slurmdbd.pid",
            "StorageType=accounting_storage/mysql",
            "StorageHost=localhost",
            "StorageUser=root",
            "StorageLoc=slurm",
            "",
        ]
    )


def gres_conf(settings: Settings) -> str:
    """gres.conf: links to /dev/null stand for the devices; Slurm numbers them in CUDA_VISIBLE_DEVICES."""
    if not settings.gpus:
        return ""
    files = f"{settings.base}/dev/gpu" + (f"[0-{settings.gpus - 1}]" if settings.gpus > 1 else "0")
    nodes = _hostlist(settings.gpu_node_names)
    return f"AutoDetect=off\nNodeName={nodes} Name=gpu Type=test File={files} Flags=nvidia_gpu_env\n"


def cgroup_conf(settings: Settings) -> str:
    """cgroup.conf: v1, which does nothing until asked, or none; left to itself slurmd may insist on systemd for v2."""
    if slurm_version() < (22, 5):  # knows v1 only, and no such key
        return ""
    unused = settings.proctrack == "linuxproc" and slurm_version() >= (24, 5)
    return "CgroupPlugin=disabled\n" if unused else "CgroupPlugin=cgroup/v1\n"
