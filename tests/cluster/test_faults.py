"""A run on a real Slurm: the local run's report to the bit; and whatever dies, nothing is lost or done twice.

Every fault strikes at a random moment; the seed is printed, and CTRL_HPC_FAULT_SEED repeats it.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb_records
from one_host_slurm import SlurmCluster

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "faults"))
from striker import Planned, Striker  # noqa: E402
from strikes import Site, is_over  # noqa: E402

pytestmark = pytest.mark.slow
ON_SLURM = (
    *("cluster=testcluster", "executor.elements=3", "rollout.critic_elements=1", "rollout.generator_elements=1"),
    *("trainer.nodes=2", "trainer.ranks_per_node=1", "launch.executor.constraint=cpu", "launch.executor.partition=low"),
)
"""Executors on the CPU nodes, where they may be preempted; the rest on the GPU nodes, the trainer over two."""
RUNS: dict[str, tuple[str, ...]] = {
    "elements": (
        *("cancel element", "kill executor", "kill rollout server", "freeze element", "hang executor"),
        *("kill wandb", "time limit of the trainer"),
    ),
    "nodes": ("preempt", "stop slurmd", "lose node", "time limit of an element"),
    "driver killed": ("kill driver", "kill batch shell"),
    "driver stopped": ("freeze driver", "time limit of the driver"),
    "trainer": ("kill trainer rank", "freeze trainer rank"),
    "full disk": ("full disk", "full disk in training"),
    "slow disk": ("slow disk", "hung disk"),
    "anything": ("kill any process",) * 6,
}
"""The faults of each run."""
ONE_AT_A_TIME = ("driver killed", "driver stopped", "trainer")
"""Runs whose second fault waits for the recovery from the first, which it would hide."""
OF_TRAINERS = (
    *("kill wandb", "time limit of the trainer", "full disk in training", "kill trainer rank", "freeze trainer rank"),
)
"""Faults that come while there is a trainer."""
TRAINED, STRUCK, FIRST_STRUCK = 2.0, 3.25, 2.5
"""How far the run has come when it begins to train (two stages are done); when the last fault is due, at a quarter of
RL; and at latest the first one, where another one waits for the recovery from it."""
LONGEST_DELAY_S = 1.5
"""A fault comes at most so long after the run has come so far."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on this machine alone."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    command = [sys.executable, "-m", "ctrl_hpc.cli", "run", ROOT / "configs" / "tiny_faults.yaml", f"run_dir={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def start(cluster: SlurmCluster, run_dir: Path, *overrides: str) -> int:
    """The run's driver as a job; its id."""
    command = ["sbatch", "--parsable", "--partition=gpu", f"--output={run_dir}.log", f"--chdir={ROOT}"]
    run = ["slurm/run.sbatch", "configs/tiny_faults.yaml", f"run_dir={run_dir}", *ON_SLURM, *overrides]
    return int(cluster.run("env", f"PATH={Path(sys.executable).parent}:{os.environ['PATH']}", *command, *run))


class Ended:
    """Whether a driver's job is over; Slurm is asked once a second."""

    def __init__(self, job: int) -> None:
        self._job = job
        self._asked, self._answer = 0.0, False

    def __call__(self) -> bool:
        if not self._answer and time.monotonic() - self._asked > 1.0:
            self._asked = time.monotonic()
            self._answer = is_over(str(self._job))
        return self._answer


def rows(file: Path) -> list[dict[str, Any]]:
    content = file.read_bytes()
    return [json.loads(line) for line in (gzip.decompress(content) if file.suffix == ".gz" else content).splitlines()]


def account(run_dir: Path) -> dict[str, Any]:
    """What was done: every sample and step of a run, in order."""
    steps = sorted((run_dir / "rl" / "rollouts").glob("step-*.jsonl.gz"))
    report = json.loads((run_dir / "report" / "results.json").read_text())["datasets"]["tiny"]
    evaluated = sorted((run_dir / "eval" / "tiny").rglob("*.jsonl"))
    return {
        "drafts": [row["id"] for row in rows(run_dir / "sample" / "solutions.jsonl")],
        "critiques": [row["id"] for row in rows(run_dir / "synthesize" / "critiques.jsonl")],
        "sft steps": [row["step"] for row in rows(run_dir / "sft" / "metrics.jsonl")],
        "rl steps": [row["step"] for row in rows(run_dir / "rl" / "metrics.jsonl")],
        "steps in wandb": {stage: wandb_records.steps(run_dir, stage) for stage in ("sft", "rl")},
        "rollouts": {file.name: Counter(row["solution_id"] for row in rows(file)) for file in steps},
        "masked": sum(row["masked"] for file in steps for row in rows(file)),
        "staleness": {row["rl/staleness"] for row in rows(run_dir / "rl" / "metrics.jsonl")},
        "evaluated": {str(file.relative_to(run_dir)): len(rows(file)) for file in evaluated},
        "reported": (report["n_problems"], report["n_samples"], sorted(report["critics"])),
    }


def values(run_dir: Path) -> dict[str, Any]:
    """What came out, without times and without the servers' log-probabilities, which batches round differently."""
    report = json.loads((run_dir / "report" / "results.json").read_text())
    names = ("critique", "revision", "reward", "token_ids", "version", "status")
    steps = sorted((run_dir / "rl" / "rollouts").glob("step-*.jsonl.gz"))
    learned = ("rl/reward", "rl/kl", "rl/grad_norm", "rl/entropy")
    return {
        "datasets": report["datasets"],
        "sft": [row["sft/loss"] for row in rows(run_dir / "sft" / "metrics.jsonl")],
        "rl": [[row[name] for name in learned] for row in rows(run_dir / "rl" / "metrics.jsonl")],
        "rollouts": [[row[name] for name in names] for file in steps for row in rows(file)],
        "weights": [(run_dir / stage / "hf" / "model.safetensors").read_bytes() for stage in ("sft", "rl")],
    }


def test_the_report_is_the_local_runs_to_the_bit(
    slurm_cluster: SlurmCluster, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = start(slurm_cluster, run_dir, "rollout.critic_elements=2")
    slurm_cluster.wait_for("the run ends", Ended(job), 400)
    assert (run_dir / "report" / "results.json").exists(), Path(f"{run_dir}.log").read_text()
    hosts = [file.name for file in (run_dir / "logs" / "trainer").glob("*_log.out")]
    assert len(hosts) == 4  # two ranks of sft, two of rl
    assert account(run_dir) == account(undisturbed)
    assert values(run_dir) == values(undisturbed)
    assert slurm_cluster.run("squeue", "-h") == ""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 300 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def served_disk(small_disk: Path) -> Iterator[tuple[Path, int]]:
    """A file system that a process serves, as a file server would, and this process."""
    (small_disk / "exported").mkdir()
    folder = small_disk.with_name("served")
    folder.mkdir()
    server = subprocess.Popen(["bindfs", "-f", "--multithreaded", small_disk / "exported", folder])
    try:
        while not os.path.ismount(folder):
            assert server.poll() is None, "bindfs ended"
            time.sleep(0.05)
        yield folder, server.pid
    finally:
        server.send_signal(signal.SIGCONT)
        subprocess.run(["umount", "--lazy", folder], check=True)
        server.wait()


def planned(fault: str, last: float, chance: random.Random) -> Planned:
    """A fault at a random moment of a run, long before its end, however fast the machine is."""
    at = chance.uniform(TRAINED if fault in OF_TRAINERS else 0.0, last)
    return Planned(name=fault, progress=at, delay_s=chance.uniform(0.0, LONGEST_DELAY_S))


@pytest.mark.parametrize("name", RUNS)
def test_nothing_is_lost_or_counted_twice(
    name: str, slurm_cluster: SlurmCluster, undisturbed: Path, served_disk: tuple[Path, int], small_disk: Path
) -> None:
    seed = int(os.environ.get("CTRL_HPC_FAULT_SEED", secrets.randbelow(1 << 31)))
    chance = random.Random(f"{seed} {name}")
    last = FIRST_STRUCK if name in ONE_AT_A_TIME else STRUCK
    plan = [planned(fault, last, chance) for fault in chance.sample(RUNS[name], len(RUNS[name]))]
    folder, server = served_disk
    run_dir = (folder if name == "slow disk" else small_disk) / "run"
    lines = [f"CTRL_HPC_FAULT_SEED={seed}"]
    job = start(slurm_cluster, run_dir)
    ended = Ended(job)
    site = Site(run_dir=run_dir, base=slurm_cluster.base, random=chance, ended=ended, disk=server)
    site.pick("driver")
    striker = Striker(site, plan, lines.append, one_at_a_time=name in ONE_AT_A_TIME)
    striker.start()
    try:
        slurm_cluster.wait_for("the run ends", ended, 500)
    finally:
        striker.join(60)
        log = Path(f"{run_dir}.log").read_text()
        print(*lines, log, sep="\n")
    assert striker.failure is None, striker.failure
    assert sorted(fault.name for fault in striker.faults) == sorted(RUNS[name])
    assert (run_dir / "report" / "results.json").exists(), log
    assert account(run_dir) == account(undisturbed)
    late = [fault for fault in striker.faults if fault.recovery_s is None or fault.recovery_s > fault.limit_s]
    assert late == []
    slurm_cluster.wait_for("no job is left", lambda: slurm_cluster.run("squeue", "-h") == "", 60)
    slurm_cluster.wait_for("all nodes are back", lambda: "idle" in slurm_cluster.run("sinfo", "-h", "-o", "%T"), 60)
