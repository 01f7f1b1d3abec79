"""Arrays through submitit's local executor: start, restart, stop; no process is left, whoever is killed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest

from ctrl_hpc.cluster import job_records, status
from ctrl_hpc.cluster import services as services_module
from ctrl_hpc.cluster.jobs import Jobs
from ctrl_hpc.cluster.registry import Registry
from ctrl_hpc.cluster.services import Services
from ctrl_hpc.config import Config, ExecutorConfig, JobConfig

pytestmark = [pytest.mark.slow, pytest.mark.alone]  # heartbeats may be missing for seconds only
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def stub(config: Config, run_dir: str, element: int, session: str) -> None:
    """A service that answers every GET with its process id, and writes down its environment."""
    import http.server
    import json
    import os
    import signal
    from pathlib import Path

    from ctrl_hpc.cluster.element import _Element

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(str(os.getpid()).encode())

    if (Path(run_dir) / "fail").exists():
        raise ValueError("there is no nsjail here")
    names = ("WANDB_RUN_ID", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "SLURM_JOB_ID")
    (Path(run_dir) / f"environment-{element}.json").write_text(
        json.dumps({name: os.environ.get(name) for name in names})
    )
    with _Element(config, run_dir, "executor", element, session) as this:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        this.ready(f"http://127.0.0.1:{server.server_address[1]}")
        if (Path(run_dir) / "deaf").exists():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        server.serve_forever()


@pytest.fixture(autouse=True)
def stubs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(services_module.SERVE, "executor", stub)


def until(condition: Callable[[], Any], what: str, seconds: float = 120.0) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return found


def pids(run_dir: Path) -> set[int]:
    return {service.pid for service in Registry(run_dir).services() if service.role == "executor"}


def test_an_array_starts_and_stops(
    make_config: Callable[..., Config], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "of-the-driver")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    config = make_config(executor=ExecutorConfig(elements=2))
    with Services(config, run_dir) as services:
        services.start({"executor"})
        assert len(services.registry.endpoints("executor")) >= 1
        until(lambda: len(pids(run_dir)) == 2, "the second element joins")
        rows = status.jobs(run_dir)
        assert [row["role"] for row in rows] == ["driver", "executor", "executor"]
        assert {row["state"] for row in rows if row["role"] == "executor"} == {"serving"}
        assert status.status(run_dir)["running"] is True
        running = pids(run_dir)
    assert not any(psutil.pid_exists(pid) for pid in running)
    assert Registry(run_dir).entries() == []
    assert status.status(run_dir)["running"] is False
    seen = json.loads((run_dir / "environment-1.json").read_text())
    assert seen == {"WANDB_RUN_ID": None, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", "SLURM_JOB_ID": None}
    assert os.environ["WANDB_RUN_ID"] == "of-the-driver"
    (first, *_) = status.logs(run_dir, "executor")
    assert "leaving" in first.read_text()
    with pytest.raises(ValueError, match="trainer: no logs; there are: executor"):
        status.logs(run_dir, "trainer")


def test_a_killed_element_is_started_again(make_config: Callable[..., Config], run_dir: Path) -> None:
    with Services(make_config(), run_dir) as services:
        services.start(["executor"])
        (first,) = pids(run_dir)
        until(lambda: "executor" in services._served, "the watch has seen it")
        os.kill(first, signal.SIGKILL)
        (second,) = until(lambda: pids(run_dir) - {first}, "another element serves")
        assert second != first
        until(lambda: len(services.registry.endpoints("executor")) == 1, "it is registered, and alone")


def test_an_element_that_hangs_is_replaced(make_config: Callable[..., Config], run_dir: Path) -> None:
    config = make_config()
    config = dataclasses.replace(config, launch=dataclasses.replace(config.launch, dead_after_s=2.0))
    with Services(config, run_dir) as services:
        services.start(["executor"])
        (first,) = pids(run_dir)
        until(lambda: "executor" in services._served, "the watch has seen it")
        os.kill(first, signal.SIGSTOP)
        until(lambda: pids(run_dir) - {first}, "another element serves")
        until(lambda: not psutil.pid_exists(first), "the one that hung is gone")


def test_arrays_that_nothing_will_ask_again_are_ended(make_config: Callable[..., Config], run_dir: Path) -> None:
    with Services(make_config(executor=ExecutorConfig(elements=2)), run_dir) as services:
        services.start(["executor"])
        services.keep({"executor", "critic"})
        running = until(lambda: len(pids(run_dir)) == 2 and pids(run_dir), "two elements")
        services.keep({"critic"})
        until(lambda: not any(psutil.pid_exists(pid) for pid in running), "they are gone")
        until(lambda: [row["role"] for row in status.jobs(run_dir)] == ["driver"], "their records, too")
        assert status.status(run_dir)["running"]


def test_an_element_deaf_to_sigterm_is_killed(make_config: Callable[..., Config], run_dir: Path) -> None:
    (run_dir / "deaf").touch()
    with Services(make_config(), run_dir) as services:
        services.start(["executor"])
        (pid,) = pids(run_dir)
    assert not psutil.pid_exists(pid)


def test_an_array_that_fails_says_why_and_where(make_config: Callable[..., Config], run_dir: Path) -> None:
    (run_dir / "fail").touch()
    with pytest.raises(RuntimeError) as caught, Services(make_config(), run_dir) as services:
        services.start(["executor"])
    message = str(caught.value)
    assert message.startswith("executor: the array ended before it served: ValueError: there is no nsjail here (log: ")
    assert "\n" not in message
    log = Path(message.partition("(log: ")[2].rstrip(")"))
    assert "there is no nsjail here" in log.read_text()


def test_an_array_that_never_comes_up_is_reported(make_config: Callable[..., Config], run_dir: Path) -> None:
    config = make_config()
    config = dataclasses.replace(config, launch=dataclasses.replace(config.launch, start_timeout_s=0.01))
    with pytest.raises(RuntimeError, match=r"executor: no element of the array came up in 0 s; log: .*/logs/executor/"):
        with Services(config, run_dir) as services:
            services.start(["executor"])


def test_unknown_roles_and_a_second_driver_are_refused(make_config: Callable[..., Config], run_dir: Path) -> None:
    with Services(make_config(), run_dir) as services:
        with pytest.raises(ValueError, match="'oracle' is not a service; allowed: executor, critic, generator"):
            services.start(["oracle"])
        code = textwrap.dedent(
            """
            import sys
            from ctrl_hpc.cluster.services import Services
            from ctrl_hpc.config import Config
            try:
                Services(Config(name="test"), sys.argv[1]).__enter__()
            except ValueError as error:
                print(error)
            """
        )
        command = [sys.executable, "-c", code, str(run_dir)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert f"another driver (process {os.getpid()} on " in said


DRIVER = """
import sys, time
import cloudpickle
sys.path.insert(0, sys.argv[2])
import test_services_local
from pathlib import Path
import dataclasses, os
from conftest import make_config
from ctrl_hpc.cluster import services
services.SERVE["executor"] = test_services_local.stub
config = make_config(Path(sys.argv[1]))
engine = os.environ.get("CTRL_HPC_TEST_ENGINE", "local")
config = dataclasses.replace(config, launch=dataclasses.replace(config.launch, engine=engine))
with services.Services(config, sys.argv[1]) as running:
    running.start(["executor"])
    print("up", flush=True)
    time.sleep(600)
"""


def start_driver(run_dir: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DRIVER, str(run_dir), str(Path(__file__).parent)]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert driver.stdout is not None and driver.stdout.readline() == "up\n"
    return driver


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_children_end_with_the_driver_however_it_ends(run_dir: Path, number: int) -> None:
    driver = start_driver(run_dir)
    members = psutil.Process(driver.pid).children(recursive=True)
    assert len(members) == 2  # submitit's controller and its task
    if number == signal.SIGINT:
        os.killpg(driver.pid, number)  # what the terminal does on Ctrl-C
    else:
        os.kill(driver.pid, number)
    driver.communicate()
    _, alive = psutil.wait_procs(members, timeout=30)
    assert not alive


def test_a_new_driver_ends_what_a_killed_one_left(make_config: Callable[..., Config], run_dir: Path) -> None:
    driver = start_driver(run_dir)
    members = psutil.Process(driver.pid).children(recursive=True)
    for member in members:
        member.suspend()  # they cannot notice by themselves
    driver.kill()
    driver.wait()
    with Services(make_config(), run_dir) as services:
        assert not any(member.is_running() for member in members)
        services.start(["executor"])
        assert len(pids(run_dir)) == 1


def test_stop_from_outside_ends_driver_and_services(run_dir: Path) -> None:
    driver = start_driver(run_dir)
    members = psutil.Process(driver.pid).children(recursive=True)
    said = status.stop(run_dir)
    driver.communicate()
    assert said == [f"driver {driver.pid} ended"]
    assert not any(member.is_running() for member in members)


def test_local_jobs_share_the_gpus_of_the_machine(
    make_config: Callable[..., Config], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    servers, trainers = Jobs(config, run_dir, "services"), Jobs(config, run_dir, "trainer")
    one = JobConfig(gpus=1)
    started = servers.submit("critic", time.sleep, [(60,), (60,)], one)
    try:
        started += trainers.submit("trainer", time.sleep, [(60,)], one)
        started += servers.submit("executor", time.sleep, [(60,)], JobConfig())
        seen = [psutil.Process(int(job.id)).environ()["CUDA_VISIBLE_DEVICES"] for job in started]
        assert seen == ["4", "5", "7", ""]
        servers.end(started[:1])  # its GPU is the least used then
        started += trainers.submit("trainer", time.sleep, [(60,)], JobConfig(gpus=1), tasks_per_node=2)
        assert [job.gpus for job in started] == [(4,), (5,), (7,), (), (4, 5)]
        started += trainers.submit("trainer", time.sleep, [(60,)], JobConfig(gpus=4))
        assert started[-1].gpus == ()  # more than there are
        assert [list(job.gpus) for job in job_records.recorded(run_dir) if job.role == "critic"] == [[5]]
    finally:
        servers.end(started)
        trainers.end(started)


def test_an_interruption_that_python_swallows_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Last:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)  # the exception ends this, and goes no further

    monkeypatch.setattr(sys, "unraisablehook", services_module._again)
    before = signal.signal(signal.SIGTERM, services_module._interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            last = Last()
            del last
            time.sleep(10)
    finally:
        signal.signal(signal.SIGTERM, before)
