"""The same arrays and trainer job on a real one-host Slurm: nothing changes but the configuration."""

import dataclasses
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import random_qwen
from one_host_slurm import SlurmCluster
from test_services_local import start_driver, stub, until
from transformers import AutoTokenizer

from ctrl_hpc.cluster import services as services_module
from ctrl_hpc.cluster import status, trainer
from ctrl_hpc.cluster.element import token
from ctrl_hpc.cluster.registry import Registry, Service
from ctrl_hpc.cluster.services import Services
from ctrl_hpc.config import Config, CriticConfig, ExecutorConfig, TrainerConfig, load
from ctrl_hpc.records import Message, Sampling
from ctrl_hpc.rollout.client import RolloutClient

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("slurm_conf")]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(services_module.SERVE, "executor", stub)
    monkeypatch.setitem(trainer.TRAIN, "sft", "stub_train")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


@pytest.fixture
def on_slurm(make_config: Callable[..., Config]) -> Callable[..., Config]:
    """The test's configuration with the profile of the test cluster."""
    launch = load(ROOT / "configs" / "tiny_ci.yaml", ["cluster=testcluster"]).launch
    launch = dataclasses.replace(launch, heartbeat_s=0.5)
    return lambda **values: make_config(**{"launch": launch, **values})


def queue() -> list[str]:
    command = ["squeue", "--noheader", "--array", "--format=%i %T"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()


def executors(run_dir: Path) -> list[Service]:
    return [service for service in Registry(run_dir).services() if service.role == "executor"]


def behave(run_dir: Path, **wishes: object) -> None:
    (run_dir / "behaviour.json").write_text(json.dumps(wishes))


def test_an_array_and_a_gang_over_two_nodes(
    on_slurm: Callable[..., Config], run_dir: Path, slurm_cluster: SlurmCluster
) -> None:
    behave(run_dir, all_reduce=True)
    config = on_slurm(
        executor=ExecutorConfig(elements=3), trainer=TrainerConfig(nodes=2, ranks_per_node=1, device="cpu")
    )
    with Services(config, run_dir) as services:
        services.start({"executor"})
        found = until(lambda: len(executors(run_dir)) == 3 and executors(run_dir), "three elements")
        assert len({service.job_id.partition("_")[0] for service in found}) == 1  # one array
        assert {service.job_id.partition("_")[2] for service in found} == {"0", "1", "2"}
        assert all(service.host != os.uname().nodename for service in found)  # Slurm's names
        trainer.run_trainer(config, run_dir, "sft")
        assert len(queue()) == 3  # the trainer's job is gone
    assert queue() == []
    # services that were asked to leave, and a trainer that is done, have ended well
    array = int(found[0].job_id.partition("_")[0])
    slurm_cluster.finish(array, ["COMPLETED"] * 3)
    (log,) = run_dir.glob("logs/trainer/*_0_log.out")
    slurm_cluster.finish(int(log.name.partition("_")[0]), ["COMPLETED"])
    assert not list((run_dir / "services" / "leave").iterdir())
    sums = [json.loads((run_dir / f"sum-{rank}").read_text()) for rank in range(2)]
    assert [item["sum"] for item in sums] == [3.0, 3.0]
    assert sums[0]["node"] != sums[1]["node"]
    places = [json.loads((run_dir / f"rank-{rank}-of-2").read_text()) for rank in range(2)]
    assert places[0]["MASTER_PORT"] == places[1]["MASTER_PORT"]
    assert [item["LOCAL_RANK"] for item in places] == ["0", "0"]
    assert len(status.logs(run_dir, "executor")) == 3


def test_a_cancelled_element_is_replaced(on_slurm: Callable[..., Config], run_dir: Path) -> None:
    with Services(on_slurm(executor=ExecutorConfig(elements=2)), run_dir) as services:
        services.start({"executor"})
        found = until(lambda: len(executors(run_dir)) == 2 and executors(run_dir), "two elements")
        until(lambda: "executor" in services._served, "the watch has seen one")
        victim = found[0]
        subprocess.run(["scancel", victim.job_id], check=True)
        until(lambda: victim.job_id not in {service.job_id for service in executors(run_dir)}, "it leaves")
        until(lambda: len(executors(run_dir)) == 2, "another takes its place")
    assert queue() == []


def test_a_requeued_element_serves_again_under_its_id(on_slurm: Callable[..., Config], run_dir: Path) -> None:
    with Services(on_slurm(), run_dir) as services:
        services.start({"executor"})
        (before,) = executors(run_dir)
        subprocess.run(["scontrol", "requeue", before.job_id], check=True)
        after = until(
            lambda: [service for service in executors(run_dir) if service.pid != before.pid], "it serves again"
        )
        assert [service.job_id for service in after] == [before.job_id]


def test_a_failing_rank_cancels_the_gang(on_slurm: Callable[..., Config], run_dir: Path) -> None:
    behave(run_dir, fail_rank=1)
    config = on_slurm()
    with (
        Services(config, run_dir),
        pytest.raises(RuntimeError, match="sft: rank 1 failed: ValueError: the data"),
    ):
        trainer.run_trainer(config, run_dir, "sft")
    assert queue() == []


def test_a_killed_rank_is_a_new_job(on_slurm: Callable[..., Config], run_dir: Path) -> None:
    behave(run_dir, kill_rank_once=1)
    config = on_slurm()
    with Services(config, run_dir):
        trainer.run_trainer(config, run_dir, "sft")
    assert (run_dir / "killed-once").exists() and queue() == []


def test_jobs_end_with_a_killed_driver(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTRL_HPC_TEST_ENGINE", "slurm")
    driver = start_driver(run_dir)
    assert len(queue()) == 1
    os.kill(driver.pid, signal.SIGKILL)
    driver.communicate()
    until(lambda: queue() == [], "the element ends by itself")


def test_a_rollout_server_on_a_gpu_node(on_slurm: Callable[..., Config], run_dir: Path) -> None:
    folder = random_qwen.build(run_dir / "model")
    with Services(on_slurm(critic=CriticConfig(model=folder)), run_dir) as services:
        services.start({"critic"})
        registry = Registry(run_dir)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        client = RolloutClient(lambda: registry.endpoints("critic"), tokenizer, token=token(run_dir))
        chat = (Message(role="user", content="print the sum"),)
        (answer,) = client.complete([chat], Sampling(temperature=0.0, max_tokens=4))[0]
        assert len(answer.token_ids) >= 1
        client.close()
    assert queue() == []
