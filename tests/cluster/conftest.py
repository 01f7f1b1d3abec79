"""A run's configuration for cluster tests, and a check that no process is left."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import one_host_slurm
import psutil
import pytest
import wandb_server
from one_host_slurm import SlurmCluster
from wandb_server import Store

from ctrl_hpc.config import Config, LaunchConfig, RolloutConfig, TrainerConfig

LAUNCH = LaunchConfig(heartbeat_s=0.5, dead_after_s=10.0, start_timeout_s=400.0)


def make_config(run_dir: Path, **values: Any) -> Config:
    """A configuration with quick heartbeats."""
    base = Config(
        name="test",
        run_dir=str(run_dir),
        launch=LAUNCH,
        rollout=RolloutConfig(threads=1),
        trainer=TrainerConfig(ranks_per_node=2, device="cpu"),
    )
    return dataclasses.replace(base, **values)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs on the Slurm cluster runs alone: the cluster is one for all, and what recovers has limited time."""
    for item in items:
        if {"slurm_cluster", "slurm_conf"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("alone")


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A loopback W&B server, and the environment that has wandb send to it."""
    with wandb_server.running() as (store, environment):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield store


@pytest.fixture(name="make_config")
def make_config_fixture(run_dir: Path) -> Callable[..., Config]:
    return lambda **values: make_config(run_dir, **values)


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[SlurmCluster]:
    """A test cluster for the whole session, and SLURM_CONF set to it: the one that is up, else one of its own."""
    given = os.environ.get("SLURM_CONF")
    if given and Path(given).with_name("cluster.json").exists():  # never a real cluster
        yield SlurmCluster(Path(given))
        return
    for left in Path("/tmp").glob("ctrl-hpc-tests-*"):  # of a session that was killed
        pid = left.name.rpartition("-")[2]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            one_host_slurm.stop(left)
    base = Path(f"/tmp/ctrl-hpc-tests-{os.getpid()}")  # sockets want a short path
    cluster = one_host_slurm.start(base)
    os.environ["SLURM_CONF"] = str(cluster.conf)
    try:
        yield cluster
    finally:
        if given is None:
            del os.environ["SLURM_CONF"]
        else:
            os.environ["SLURM_CONF"] = given
        one_host_slurm.stop(base)


@pytest.fixture(scope="session")
def slurm_conf(slurm_cluster: SlurmCluster) -> str:
    """The slurm.conf of the test cluster."""
    return str(slurm_cluster.conf)


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Every process a test started, however deep, is gone when it ends."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    sessions = set(_of_this_test(os.getpid()))
    yield
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    left = [child for child in left if child.status() != psutil.STATUS_ZOMBIE]
    orphans = set(_of_this_test(os.getpid())) - sessions
    assert not left, f"left running: {[' '.join(child.cmdline()) for child in left]}"
    assert not orphans, f"orphans: {orphans}"


def _of_this_test(pid: int) -> list[int]:
    """Processes marked by the environment of this test process."""
    mark = f"CTRL_HPC_TEST_MARK={pid}"
    os.environ["CTRL_HPC_TEST_MARK"] = str(pid)
    out = []
    for process in psutil.process_iter():
        try:
            environment = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            if process.pid != pid and mark.encode() in environment and process.status() != psutil.STATUS_ZOMBIE:
                out.append(process.pid)
        except (OSError, psutil.NoSuchProcess):
            continue
    return out
