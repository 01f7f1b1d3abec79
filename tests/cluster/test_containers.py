"""Jobs in containers of a real runtime, Charliecloud, on the real Slurm: what goes in, what comes out, how they end."""

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from one_host_slurm import SlurmCluster
from test_services_local import until
from test_slurm import behave, executors, queue

from ctrl_hpc.cluster import connect, trainer
from ctrl_hpc.cluster.services import Services
from ctrl_hpc.config import Config, TrainerConfig, load
from ctrl_hpc.records import Execution, Limits, StdinTest
from ctrl_hpc.run import snapshot

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("slurm_conf")]
ROOT = Path(__file__).parents[2]
ENDED = "Job completed successfully"
PROGRAMS = ("sh", "env", "cat")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A root of its own with a few programs and no Slurm; libraries, Python and the checkout are mounted."""
    folder = tmp_path / "an image"
    for name in ("dev", "etc", "home", "proc", "run", "sys", "tmp", "usr/bin", "usr/lib", "usr/lib64", "usr/sbin"):
        (folder / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (folder / name).symlink_to(f"usr/{name}")
    for name in ("passwd", "group", "hosts", "resolv.conf"):
        (folder / "etc" / name).touch()
    for name in PROGRAMS:
        shutil.copy(shutil.which(name) or "", folder / "usr" / "bin" / name)
    for place in mounted():
        (folder / place.lstrip("/")).mkdir(parents=True, exist_ok=True)
    return folder


def mounted() -> list[str]:
    return ["/usr/lib", "/usr/lib64", sys.base_prefix, sys.prefix, str(ROOT)]


@pytest.fixture
def contained(
    make_config: Callable[..., Config], image: Path, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Config]:
    """The test cluster's configuration with a container around every Python; services ask for a token."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setitem(trainer.TRAIN, "sft", "stub_train")
    mounts = [f"--bind={place}" for place in mounted()]
    launch = dataclasses.replace(
        load(ROOT / "configs" / "tiny_ci.yaml", ["cluster=testcluster"]).launch,
        heartbeat_s=0.5,
        bind="0.0.0.0",
        setup=("export USER=root NAMED='of the host'",),
        python=shlex.join(["ch-run", "--unset-env=SLURM_CONF", *mounts, str(image), "--", sys.executable]),
    )
    return lambda **values: make_config(launch=launch, generator="oracle", **values)


def inside(image: Path) -> list[int]:
    """The processes whose root is the image."""
    place, found = (image / "usr" / "bin").stat(), []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            there = (folder / "root" / "usr" / "bin").stat()
        except OSError:
            continue
        if (there.st_dev, there.st_ino) == (place.st_dev, place.st_ino):
            found.append(int(folder.name))
    return found


def test_an_executor_in_a_container(
    contained: Callable[..., Config], image: Path, run_dir: Path, slurm_cluster: SlurmCluster
) -> None:
    config = contained()
    with Services(config, run_dir) as services:
        services.start({"executor"})
        (first,) = executors(run_dir)
        assert first.pid in inside(image)
        environment = dict(
            pair.split("=", 1) for pair in Path(f"/proc/{first.pid}/environ").read_text().split("\0") if "=" in pair
        )
        assert environment["NAMED"] == "of the host" and environment["SLURM_JOB_ID"] == first.job_id
        assert environment["OMP_WAIT_POLICY"] == "PASSIVE" and "SLURM_CONF" not in environment
        assert first.url.startswith("http://127.0.0.1:")  # Slurm's NodeAddr, though there is no scontrol inside

        connections = connect.connect(config, run_dir, [])
        program = "print(int(input()) + 1)"
        test = StdinTest(stdin="2\n", expected_stdout="3\n")
        (verdict,) = connections.executor.run_many([Execution(program=program, tests=(test,), limits=Limits())])
        assert verdict.status == "accepted"  # a jail inside the container

        log = Path(first.log)
        copy = snapshot.latest(run_dir)
        assert copy is not None and str(copy) in Path(f"/proc/{first.pid}/cmdline").read_text()
        until(lambda: "executor" in services._served, "the watch has seen it")
        slurm_cluster.run("scancel", "--signal=USR2", first.job_id)
        slurm_cluster.finish(int(first.job_id), ["COMPLETED"])
        assert ENDED in log.read_text()  # the server in the container was told, and left in order

        (second,) = until(
            lambda: [item for item in executors(run_dir) if item.job_id != first.job_id], "another takes its place"
        )
        assert inside(image)
    assert queue() == []
    until(lambda: not inside(image), "nothing is left in the container")
    slurm_cluster.finish(int(second.job_id), ["COMPLETED"])  # it was asked to leave
    assert ENDED in Path(second.log).read_text()  # by scancel's SIGTERM


def test_an_exit_code_comes_out(contained: Callable[..., Config], tmp_path: Path, slurm_cluster: SlurmCluster) -> None:
    command = f"{contained().launch.python} -c 'raise SystemExit(7)'"
    job = slurm_cluster.submit(f"export USER=root\n{command}", output=tmp_path / "log")
    slurm_cluster.finish(job, ["FAILED"])
    assert slurm_cluster.accounted(job, "ExitCode") == [["7:0"]]


def test_ranks_in_containers_on_two_nodes(contained: Callable[..., Config], image: Path, run_dir: Path) -> None:
    behave(run_dir, all_reduce=True)
    config = contained(trainer=TrainerConfig(nodes=2, ranks_per_node=1, device="cpu"))
    with Services(config, run_dir):
        trainer.run_trainer(config, run_dir, "sft")
        sums = [json.loads((run_dir / f"sum-{rank}").read_text()) for rank in range(2)]
        assert [item["sum"] for item in sums] == [3.0, 3.0] and sums[0]["node"] != sums[1]["node"]
        behave(run_dir, fail_rank=1)
        with pytest.raises(RuntimeError, match="sft: rank 1 failed: ValueError: the data"):
            trainer.run_trainer(config, run_dir, "sft")
    assert queue() == []
    until(lambda: not inside(image), "nothing is left in the container")


def test_the_doctor_in_a_container(image: Path, tmp_path: Path) -> None:
    mounts = [f"--bind={place}" for place in mounted()]
    command = ["ch-run", *mounts, str(image), "--", sys.executable, "-m", "ctrl_hpc.cli", "doctor", str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "USER": "root", "COLUMNS": "300"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row[1].strip(): row[2:] for row in (line.split("│") for line in done.stdout.splitlines()) if len(row) > 4}
    assert rows["slurm"][0].strip() == "absent" and "sbatch" in rows["slurm"][1]
    assert rows["executor: isolation"][0].strip() == "ok"
