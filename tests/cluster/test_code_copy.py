"""A run whose checkout is broken while it runs: elements that start later, and the driver, go on from the copy."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_services_local import until

from ctrl_hpc.cluster import status
from ctrl_hpc.cluster.registry import Registry
from ctrl_hpc.run import snapshot

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    folder = tmp_path / "checkout"
    for name in ("ctrl_hpc", "kernels/ctrl_kernels", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "models").symlink_to(ROOT / "models")
    return folder


def start(checkout: Path, run_dir: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "ctrl_hpc.cli", "sample", "configs/tiny_ci.yaml", f"run_dir={run_dir}"]
    command += ["data.n_train=150"]
    return subprocess.Popen(
        [*command, "generator=oracle", *overrides],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": f"{checkout}:{checkout / 'kernels'}"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def break_everything(checkout: Path) -> None:
    for file in checkout.rglob("*.py"):
        file.write_text(f"(((\n{file.read_text()}")
    for file in checkout.rglob("*.j2"):
        file.write_text("{% nonsense %}")


def finishes_though_its_checkout_breaks(checkout: Path, run_dir: Path, *overrides: str) -> None:
    driver = start(checkout, run_dir, *overrides)
    try:
        registry = Registry(run_dir)
        (element,) = until(lambda: [item for item in registry.services() if item.role == "executor"], "an element")
        driver.send_signal(signal.SIGSTOP)  # it has the work still before it
        break_everything(checkout)
        os.kill(element.pid, signal.SIGKILL)
        driver.send_signal(signal.SIGCONT)
        _, said = driver.communicate(timeout=240)
    finally:
        if driver.poll() is None:
            driver.terminate()
            driver.send_signal(signal.SIGCONT)
            driver.communicate()
    assert driver.returncode == 0, said
    assert "starting it again" in " ".join(said.split())
    done = json.loads((run_dir / "sample" / "done.json").read_text())
    copy = snapshot.latest(run_dir)
    assert copy is not None and done["code"] == copy.name
    assert (done["solutions"], done["pass_at_1"]) == (150, 1.0)
    assert len(status.logs(run_dir, "executor")) == 2
    assert status.status(run_dir)["stages"]["sample"]["state"] == "done"
    assert subprocess.run([sys.executable, "-m", "ctrl_hpc.cli"], cwd=checkout, stderr=subprocess.PIPE).returncode == 1


def test_a_local_run_goes_on(checkout: Path, tmp_path: Path) -> None:
    finishes_though_its_checkout_breaks(checkout, tmp_path / "run")


@pytest.mark.usefixtures("slurm_conf")
def test_a_run_on_slurm_goes_on(checkout: Path, tmp_path: Path) -> None:
    finishes_though_its_checkout_breaks(checkout, tmp_path / "run", "cluster=testcluster")
