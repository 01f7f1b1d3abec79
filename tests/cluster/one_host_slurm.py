"""The test cluster as tests see it: up, down, commands, and waiting for jobs."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).parents[2] / "slurm" / "testcluster"


@dataclass(frozen=True, slots=True)
class SlurmCluster:
    """A test cluster that is up."""

    conf: Path
    """What SLURM_CONF points to."""

    @property
    def base(self) -> Path:
        """The cluster's folder."""
        return self.conf.parent

    @property
    def nodes(self) -> list[str]:
        """Names of all nodes."""
        return self.run("sinfo", "-h", "-N", "-p", "cpu", "-o", "%N").split()

    @property
    def gpu_nodes(self) -> list[str]:
        """Names of the nodes with GPUs."""
        return self.run("sinfo", "-h", "-N", "-p", "gpu", "-o", "%N").split()

    def call(self, *command: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command against this cluster; jobs do not inherit the mark that tells a test's own processes."""
        environment = {name: value for name, value in os.environ.items() if name != "CTRL_HPC_TEST_MARK"}
        environment["SLURM_CONF"] = str(self.conf)
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def run(self, *command: str | Path) -> str:
        """What a command that must succeed prints."""
        done = self.call(*command)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, script: str, *options: str, output: Path) -> int:
        """``sbatch`` of shell lines; returns the job id."""
        command = ["sbatch", "--parsable", f"--output={output}", "--open-mode=append", *options, "--wrap", script]
        return int(self.run(*command))

    def accounted(self, job: int, *fields: str) -> list[list[str]]:
        """sacct's fields of a job's elements, each start of a requeued one its own line, oldest first."""
        out = self.run("sacct", "-n", "-P", "-X", "--duplicates", "-j", str(job), "-o", ",".join(fields))
        return [line.split("|") for line in out.splitlines()]

    def wait_for(self, what: str, is_true: Callable[[], bool], timeout_s: float = 120.0) -> None:
        """Return as soon as ``is_true`` answers so; it is asked five times a second."""
        end = time.monotonic() + timeout_s
        while not is_true():
            assert time.monotonic() < end, f"not within {timeout_s:.0f} s: {what}"
            time.sleep(0.2)

    def finish(self, job: int, states: Sequence[str], timeout_s: float = 120.0) -> None:
        """Wait until sacct tells these states of the job's elements and starts."""
        self.wait_for(
            f"job {job} in {states}",
            lambda: [row[0] for row in self.accounted(job, "State")] == list(states),
            timeout_s,
        )


def start(base: Path, *options: str) -> SlurmCluster:
    """``up``, asserting that it says where slurm.conf is."""
    done = subprocess.run([SCRIPTS / "up", "--base", base, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    name, _, conf = done.stdout.splitlines()[-1].partition("=")
    assert (name, conf) == ("SLURM_CONF", f"{base}/slurm.conf")
    return SlurmCluster(Path(conf))


def stop(base: Path) -> None:
    """``down``."""
    done = subprocess.run([SCRIPTS / "down", "--base", base], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def traces(base: Path, prefix: str) -> list[str]:
    """What there is of a cluster whose node names start with ``prefix``: processes, cgroups, mounts and files."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes()
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            files = [os.readlink(link) for link in [folder / "cwd", *(folder / "fd").iterdir()]]
        except OSError:  # gone, or not ours to look at
            continue
        holds = any(file.startswith(f"{base}/") for file in files)
        if holds or str(base) in command or f"SLURMD_NODENAME={prefix}".encode() in environment:
            found.append(f"process {folder.name}: {command}")
    found += [f"cgroup {path}" for path in Path("/sys/fs/cgroup").glob(f"*/slurm_{prefix}*")]
    found += [f"mount {line}" for line in Path("/proc/mounts").read_text().splitlines() if str(base) in line]
    return found + [str(path) for path in base.parent.glob(f"{base.name}*")]


def prefix(base: Path) -> str:
    """Start of the node names of the cluster in ``base``."""
    return f"tc{json.loads((base / 'cluster.json').read_text())['port']}-"
