"""A run's configuration for cluster tests, and a check that no process is left."""

import dataclasses
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

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


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture(name="make_config")
def make_config_fixture(run_dir: Path) -> Callable[..., Config]:
    return lambda **values: make_config(run_dir, **values)


@pytest.fixture(scope="session")
def slurm_conf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A test cluster for the whole session: the one that is up (SLURM_CONF), else one of its own."""
    given = os.environ.get("SLURM_CONF")
    if given:
        yield given
        return
    scripts = Path(__file__).parents[2] / "slurm" / "testcluster"
    with tempfile.TemporaryDirectory(prefix="ctrl-hpc-tc-") as parent:  # sockets want a short path
        base = Path(parent) / "c"
        up = subprocess.run([scripts / "up", "--base", base], capture_output=True, text=True, check=False)
        assert up.returncode == 0, up.stderr
        os.environ["SLURM_CONF"] = up.stdout.strip().splitlines()[-1].partition("=")[2]
        try:
            yield os.environ["SLURM_CONF"]
        finally:
            del os.environ["SLURM_CONF"]
            down = subprocess.run([scripts / "down", "--base", base], capture_output=True, text=True, check=False)
            assert down.returncode == 0, down.stderr


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
