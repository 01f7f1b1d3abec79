"""The test cluster itself: a real Slurm that comes up and goes without a trace, and does what the product relies on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import one_host_slurm
import pytest
import submitit
from one_host_slurm import SCRIPTS, SlurmCluster

from ctrl_hpc.config import load

ROOT = Path(__file__).parents[2]
RERUN = 'echo "start ${SLURM_RESTART_COUNT:-0}"; [ -n "${SLURM_RESTART_COUNT:-}" ] || sleep 300'
"""Works on until it is requeued, then ends at once."""


@pytest.mark.parametrize("name", ["local", "slurm", "testcluster"])
def test_profiles_load(name: str) -> None:
    config = load(ROOT / "configs" / "tiny.yaml", [f"cluster={name}"])
    assert config.launch.engine == ("local" if name == "local" else "slurm")
    assert config.cluster == name


def test_the_test_clusters_profile_names_its_partitions() -> None:
    launch = load(ROOT / "configs" / "tiny.yaml", ["cluster=testcluster"]).launch
    assert (launch.trainer.partition, launch.rollout.partition, launch.executor.partition) == ("gpu", "gpu", "cpu")
    assert launch.signal_delay_s < 60


@dataclass(frozen=True, slots=True)
class SlowJobs:
    """Jobs whose course takes Slurm a while, so they run beside the other tests."""

    folder: Path
    requeued: int
    preempted: int
    preempting: int
    timed_out: int


@pytest.fixture(scope="module")
def slow_jobs(slurm_cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlowJobs]:
    """A job that is requeued by hand, one that is preempted, and one that runs into its time limit."""
    folder = tmp_path_factory.mktemp("slow")
    whole = ["--exclusive", f"--nodelist={slurm_cluster.nodes[0]}"]
    other = f"--nodelist={slurm_cluster.nodes[1]}"
    requeued = slurm_cluster.submit(RERUN, other, output=folder / "requeued")
    timed_out = slurm_cluster.submit("sleep 300", "--time=5", other, output=folder / "timed_out")
    preempted = slurm_cluster.submit(RERUN, "--partition=low", *whole, output=folder / "preempted")
    for file in ("requeued", "preempted"):
        slurm_cluster.wait_for(f"{file} has started", lambda file=file: "start 0" in text(folder / file))
    slurm_cluster.run("scontrol", "requeue", str(requeued))
    # time limits are whole minutes, but an end may be given to the second
    slurm_cluster.run("scontrol", "update", f"JobId={timed_out}", "EndTime=now+2")
    preempting = slurm_cluster.submit("true", "--partition=high", *whole, output=folder / "preempting")
    yield SlowJobs(folder, requeued, preempted, preempting, timed_out)
    slurm_cluster.run("scancel", "--quiet", *map(str, (requeued, preempted, preempting, timed_out)))


def text(file: Path) -> str:
    return file.read_text() if file.exists() else ""


@pytest.mark.slow
def test_a_cluster_comes_up_beside_another_and_goes_without_a_trace(
    slurm_cluster: SlurmCluster, slow_jobs: SlowJobs
) -> None:
    base = Path(f"/tmp/ctrl-hpc-tests-b-{os.getpid()}")
    options = ["--nodes", "2", "--cpus", "3", "--gpus", "1"]
    try:
        cluster = one_host_slurm.start(base, *options)
        prefix = one_host_slurm.prefix(base)
        first, second = cluster.nodes
        assert (first, second) == (f"{prefix}1", f"{prefix}2") and cluster.gpu_nodes == [first, second]
        assert not {first, second} & set(slurm_cluster.nodes)
        assert cluster.run("sinfo", "-h", "-p", "gpu", "-o", "%D %c %G").split() == ["2", "3", "gpu:test:1"]
        # again: it says that it is up and changes nothing
        assert one_host_slurm.start(base, *options) == cluster
        line = refusal("up", "--base", base, "--nodes", "5")
        assert line == f"--nodes 5: {base} is up with 2; slurm/testcluster/down ends it first"

        leaves_a_child = "(setsid sleep 301 &); echo on; sleep 301"
        job = cluster.submit(leaves_a_child, f"--nodelist={first}", output=base / "first")
        cluster.submit(leaves_a_child, f"--nodelist={second}", output=base / "second")
        cluster.wait_for("two jobs", lambda: text(base / "first") == text(base / "second") == "on\n")
        cluster.run(SCRIPTS / "node", "stop", first, "--base", base)
        assert sleepers(first) == 2  # without slurmd a job goes on
        cluster.run(SCRIPTS / "node", "start", first, "--base", base)
        assert cluster.run("srun", "-w", first, "printenv", "SLURMD_NODENAME") == f"{first}\n"
        assert cluster.run("squeue", "-h", "-o", "%T", "-j", str(job)) == "RUNNING\n"
        cluster.run(SCRIPTS / "node", "lose", first, "--base", base)
        assert sleepers(first) == 0 and sleepers(second) == 2
        assert len(one_host_slurm.traces(base, prefix)) > 6
    finally:
        one_host_slurm.stop(base)
    assert one_host_slurm.traces(base, prefix) == []
    assert sleepers(second) == 0
    assert set(slurm_cluster.run("sinfo", "-h", "-o", "%a").split()) == {"up"}


def sleepers(node: str) -> int:
    """Processes of the jobs above on a node."""
    found = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            is_it = (folder / "cmdline").read_bytes() == b"sleep\x00301\x00"
            found += is_it and f"SLURMD_NODENAME={node}".encode() in (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # gone
            continue
    return found


def refusal(script: str, *arguments: str | Path) -> str:
    """The one line a script refuses with."""
    done = subprocess.run([SCRIPTS / script, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done
    (line,) = done.stderr.splitlines()
    return line.removeprefix("testcluster: ")


@pytest.mark.slow
def test_wrong_situations_are_one_line() -> None:
    with tempfile.TemporaryDirectory(prefix="ctrl-hpc-") as folder:  # pytest's own paths are too long
        Path(folder, "mine").touch()
        line = refusal("up", "--base", folder)
        assert line == f"--base {folder}: not empty and not a test cluster's; choose another folder"
        assert Path(folder, "mine").exists()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        line = refusal("up", "--base", "/tmp/ctrl-hpc-never", "--nodes", "1", "--port", str(port))
    assert line == f"--port {port}: port {port} is in use; leave --port out to have free ones chosen"
    assert "longer than 60 characters" in refusal("up", "--base", "/tmp/" + 60 * "x")
    assert "no test cluster there" in refusal("node", "stop", "n1", "--base", "/tmp/ctrl-hpc-never")
    assert not Path("/tmp/ctrl-hpc-never").exists()


@pytest.mark.slow
def test_jobs_run_and_are_accounted_for(slurm_cluster: SlurmCluster, slow_jobs: SlowJobs, tmp_path: Path) -> None:
    good = slurm_cluster.submit("echo $SLURM_JOB_PARTITION", "--cpus-per-task=3", output=tmp_path / "good")
    options = ["--account=research", "--qos=urgent", "--constraint=gpu"]
    bad = slurm_cluster.submit("exit 3", *options, output=tmp_path / "bad")
    # slurmctld tells the database in its own time
    fields = ["State", "ExitCode", "AllocCPUS", "Partition", "Account", "QOS"]
    for job, row in [
        (good, ["COMPLETED", "0:0", "3", "cpu", "root", "normal"]),
        (bad, ["FAILED", "3:0", "1", "cpu", "research", "urgent"]),
    ]:
        slurm_cluster.wait_for(
            f"job {job}: {row}", lambda job=job, row=row: slurm_cluster.accounted(job, *fields) == [row]
        )
    assert slurm_cluster.accounted(bad, "NodeList")[0][0] in slurm_cluster.gpu_nodes
    assert (tmp_path / "good").read_text() == "cpu\n"


@pytest.mark.slow
def test_arrays_have_an_element_each(slurm_cluster: SlurmCluster, slow_jobs: SlowJobs, tmp_path: Path) -> None:
    script = "echo $SLURM_ARRAY_TASK_ID of $SLURM_ARRAY_JOB_ID; exit $((SLURM_ARRAY_TASK_ID == 2))"
    job = slurm_cluster.submit(script, "--array=0-3%2", output=tmp_path / "%A_%a")
    slurm_cluster.finish(job, ["COMPLETED", "COMPLETED", "FAILED", "COMPLETED"])
    assert [(tmp_path / f"{job}_{i}").read_text() for i in range(4)] == [f"{i} of {job}\n" for i in range(4)]
    assert slurm_cluster.accounted(job, "JobID") == [[f"{job}_{i}"] for i in range(4)]


@pytest.mark.slow
def test_gpus_are_given_out_and_counted(slurm_cluster: SlurmCluster, slow_jobs: SlowJobs, tmp_path: Path) -> None:
    one = 'srun -l sh -c "echo $SLURMD_NODENAME ${CUDA_VISIBLE_DEVICES:-none}"'.replace("$", "\\$")
    two_tasks = ["--partition=gpu", "--nodes=2", "--ntasks-per-node=2", "--gpus-per-task=1"]
    job = slurm_cluster.submit(one, *two_tasks, output=tmp_path / "gpus")
    without = slurm_cluster.submit(one, output=tmp_path / "without")
    slurm_cluster.finish(job, ["COMPLETED"])
    slurm_cluster.finish(without, ["COMPLETED"])
    lines = sorted((tmp_path / "gpus").read_text().splitlines())
    tasks = [line.split() for line in lines]
    assert [task[0] for task in tasks] == ["0:", "1:", "2:", "3:"]
    assert {task[1] for task in tasks} == set(slurm_cluster.gpu_nodes)
    devices = [[task[2] for task in tasks if task[1] == node] for node in slurm_cluster.gpu_nodes]
    assert all(len(set(pair)) == 2 and set(pair) <= set("01234567") for pair in devices)
    assert (tmp_path / "without").read_text().split()[2] == "none"
    slurm_cluster.wait_for("four GPUs counted", lambda: "gres/gpu=4" in slurm_cluster.accounted(job, "AllocTRES")[0][0])
    refused = slurm_cluster.call("sbatch", "--partition=gpu", "--nodes=1", "--gres=gpu:99", "--wrap", "true")
    assert refused.returncode != 0 and "Requested node configuration is not available" in refused.stderr


@pytest.mark.slow
def test_submitit_maps_over_an_array(slurm_cluster: SlurmCluster, slow_jobs: SlowJobs, tmp_path: Path) -> None:
    executor = submitit.AutoExecutor(folder=tmp_path / "jobs", cluster="slurm")
    executor.update_parameters(slurm_partition="cpu", timeout_min=5, cpus_per_task=1, slurm_array_parallelism=2)
    jobs = executor.map_array(pow, [2, 3, 5], [3, 3, 3])
    assert [job.result() for job in jobs] == [8, 27, 125]
    array = jobs[0].job_id.partition("_")[0]
    assert [job.job_id for job in jobs] == [f"{array}_{i}" for i in range(3)]
    slurm_cluster.finish(int(array), ["COMPLETED"] * 3)


@pytest.mark.slow
def test_the_driver_runs_as_a_job_and_comes_back_before_its_time_limit(
    slurm_cluster: SlurmCluster, slow_jobs: SlowJobs, tmp_path: Path
) -> None:
    driver = tmp_path / "bin" / "ctrl-hpc"
    driver.parent.mkdir()
    driver.write_text(
        f"""#!/bin/bash
settings="restart=${{SLURM_RESTART_COUNT:-0}} wandb=$WANDB_MODE hub=$HF_HUB_OFFLINE cpus=$SRUN_CPUS_PER_TASK"
echo "$@ $settings" >> {tmp_path}/calls
[ -n "${{SLURM_RESTART_COUNT:-}}" ] && exit 7
trap 'echo told to end >> {tmp_path}/calls; exit 1' TERM
while true; do sleep 0.1; done
"""
    )
    driver.chmod(0o755)
    submit = ["env", f"CTRL_HPC_PROGRAM={driver}", sys.executable, "-m", "ctrl_hpc.cli", "sbatch", "tiny"]
    own = [f"run_dir={tmp_path / 'run'}", "cluster=testcluster", f"--chdir={tmp_path}", "--partition=gpu", "--time=5"]
    said = slurm_cluster.run(*submit, "rl.steps=3", *own)
    job = int(said.split()[1].rstrip(":"))
    assert said.rstrip().endswith(f"its log: {tmp_path / 'run' / 'logs' / 'driver.log'}")
    slurm_cluster.wait_for("the driver works", lambda: "restart=0" in text(tmp_path / "calls"))
    slurm_cluster.run("scancel", "--batch", "--signal=USR2", str(job))
    slurm_cluster.wait_for("the driver works again", lambda: "restart=1" in text(tmp_path / "calls"))
    slurm_cluster.wait_for(
        "it ends", lambda: slurm_cluster.accounted(job, "State", "ExitCode")[-1:] == [["FAILED", "7:0"]]
    )
    first, told, second = (tmp_path / "calls").read_text().splitlines()
    words = f"{ROOT / 'configs' / 'tiny.yaml'} rl.steps=3 run_dir={tmp_path / 'run'} cluster=testcluster"
    assert first == f"run {words} restart=0 wandb=offline hub=1 cpus=2"
    assert "near the time limit, requeued" not in text(tmp_path / "run" / "logs" / "driver.log").partition("start 2")[2]
    assert "start 1: ctrl-hpc run" in text(tmp_path / "run" / "logs" / "driver.log")
    assert told == "told to end"
    assert second == first.replace("rl.steps", "launch.snapshot=keep rl.steps").replace("restart=0", "restart=1")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("launch.trainer.partition=gpus", "launch.trainer.partition: 'gpus' is refused by Slurm for the trainer: "),
        ("launch.rollout.cpus=4000", "launch.rollout is refused by Slurm for the critic: "),
    ],
)
def test_what_slurm_would_refuse_is_told_before_anything_is_submitted(
    slurm_cluster: SlurmCluster, tmp_path: Path, override: str, told: str
) -> None:
    words = [sys.executable, "-m", "ctrl_hpc.cli", "run", "tiny", "cluster=testcluster", f"run_dir={tmp_path / 'run'}"]
    done = slurm_cluster.call(*words, override)
    assert done.returncode == 2
    assert told in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_requeued_job_runs_again(slurm_cluster: SlurmCluster, slow_jobs: SlowJobs) -> None:
    slurm_cluster.finish(slow_jobs.requeued, ["REQUEUED", "COMPLETED"])
    assert started(slow_jobs.folder / "requeued") == ["start 0", "start 1"]


@pytest.mark.slow
def test_a_preempted_job_runs_again(slurm_cluster: SlurmCluster, slow_jobs: SlowJobs) -> None:
    slurm_cluster.finish(slow_jobs.preempting, ["COMPLETED"])
    slurm_cluster.finish(slow_jobs.preempted, ["PREEMPTED", "COMPLETED"])
    assert started(slow_jobs.folder / "preempted") == ["start 0", "start 1"]


def started(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if line.startswith("start")]


@pytest.mark.slow
def test_a_time_limit_ends_a_job(slurm_cluster: SlurmCluster, slow_jobs: SlowJobs) -> None:
    slurm_cluster.finish(slow_jobs.timed_out, ["TIMEOUT"])
    assert "DUE TO TIME LIMIT" in (slow_jobs.folder / "timed_out").read_text()
