"""Local jobs forked from processes that have imported ahead: the same tasks, ends and restarts as of jobs started."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest
from test_services_local import pids, stub, until

from ctrl_hpc.cluster import prefork as prefork_module
from ctrl_hpc.cluster import services as services_module
from ctrl_hpc.cluster.jobs import Job, Jobs
from ctrl_hpc.cluster.prefork import Generation
from ctrl_hpc.cluster.services import Services
from ctrl_hpc.config import Config, JobConfig

pytestmark = pytest.mark.slow
cloudpickle.register_pickle_by_value(sys.modules[__name__])
cloudpickle.register_pickle_by_value(sys.modules["test_services_local"])


@pytest.fixture(autouse=True)
def modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules that are soon imported, and one whose lack a job would tell."""
    chain = (
        Generation(roles=("executor",), modules=("wave",)),
        Generation(roles=("trainer",), modules=("a_module_that_is_not_there",)),
    )
    monkeypatch.setattr(prefork_module, "GENERATIONS", chain)


def about() -> dict[str, Any]:
    """Where a task runs, and what it was given."""
    names = ("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS", "OMP_NUM_THREADS", "OF_THE_DRIVER")
    return {name: os.environ.get(name) for name in names} | {"pid": os.getpid(), "imported": "wave" in sys.modules}


def fail() -> None:
    """A task that ends by an error."""
    raise ValueError("one plain line")


def sleep() -> None:
    """A task that does not end by itself."""
    time.sleep(600)


def submitted(jobs: Jobs, function: Callable[[], Any], tasks: int = 2) -> Job:
    return jobs.submit("trainer", function, [()], JobConfig(), tasks_per_node=tasks, threads=3)[0]


def test_tasks_are_children_of_their_controller_with_the_jobs_environment(
    make_config: Callable[..., Config], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = Jobs(make_config(), run_dir, "test")
    chain = jobs.begin_prefork(["trainer"])
    try:
        monkeypatch.setenv("OF_THE_DRIVER", "set after the chain was started")
        job = submitted(jobs, about)
        until(lambda: jobs.state(job) == "ended", "the job is over")
        found = [job.result(task) for task in range(2)]
        assert [outcome and outcome[0] for outcome in found] == ["success", "success"]
        rows = [outcome[1] for outcome in found if outcome]
        assert [row["SUBMITIT_LOCAL_GLOBALID"] for row in rows] == ["0", "1"]
        assert {row["SUBMITIT_LOCAL_NTASKS"] for row in rows} == {"2"}
        assert {row["OMP_NUM_THREADS"] for row in rows} == {"3"}
        assert {row["OF_THE_DRIVER"] for row in rows} == {"set after the chain was started"}
        assert all(row["imported"] for row in rows)
        failed = submitted(jobs, fail, tasks=1)
        until(lambda: jobs.state(failed) == "ended", "the job is over")
        assert failed.last_words() == "ValueError: one plain line"
        assert "one plain line" in failed.log().read_text()
    finally:
        chain.close()


def test_a_killed_task_is_missed_and_the_rest_is_ended(make_config: Callable[..., Config], run_dir: Path) -> None:
    jobs = Jobs(make_config(), run_dir, "test")
    chain = jobs.begin_prefork(["trainer"])
    try:
        job = submitted(jobs, sleep)
        until(lambda: len(jobs._see_tasks(job)) == 2 and None not in jobs._see_tasks(job), "both tasks are there")
        assert jobs._see_tasks(job) == [0, 1]
        assert jobs.lost_tasks(job) == []
        os.kill(sorted(job.seen_tasks)[1], signal.SIGKILL)
        until(lambda: jobs.lost_tasks(job) == [1], "the second task is missed")
        jobs.end([job], grace_s=1.0)
        gone = (int(job.id), *job.seen_tasks)
        until(lambda: not any(psutil.pid_exists(pid) for pid in gone), "all of them are gone, and none a zombie", 10.0)
        assert jobs.state(job) == "ended"
    finally:
        chain.close()


def test_without_the_chain_jobs_are_started_as_ever(
    make_config: Callable[..., Config],
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(services_module.SERVE, "executor", stub)
    with Services(make_config(), run_dir) as services:
        chain = services.import_ahead(["executor"])
        assert chain is not None
        services.start(["executor"])
        (first,) = pids(run_dir)
        assert psutil.Process(first).name() == "task-0"
        until(lambda: "executor" in services._served, "the watch has seen it")
        chain._first.kill()
        chain._first.wait()
        assert psutil.pid_exists(first), "it needs the chain no more"
        os.kill(first, signal.SIGKILL)
        (second,) = until(lambda: pids(run_dir) - {first}, "another element serves")
        assert psutil.Process(second).name() != "task-0"
    assert not psutil.pid_exists(second)
    told = " ".join(capsys.readouterr().err.split())
    assert "executor: not forked from a process that is ready, but started: it is gone" in told


def test_a_chain_that_does_not_answer_is_not_waited_for(
    make_config: Callable[..., Config], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = Jobs(make_config(), run_dir, "test")
    chain = jobs.begin_prefork(["executor"])
    try:
        chain.await_ready("executor")
        chain._first.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(prefork_module, "_ANSWER_S", 0.2)
        assert chain.fork("executor", run_dir, {}) is None
        assert "executor" not in chain._ends
    finally:
        chain._first.send_signal(signal.SIGCONT)
        chain.close()


def test_imports_that_hang_are_not_waited_for_and_ctrl_c_ends_the_wait(
    make_config: Callable[..., Config], run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_slow_module.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    slow = (Generation(roles=("executor",), modules=("a_slow_module",)),)
    monkeypatch.setattr(prefork_module, "GENERATIONS", slow)
    chain = Jobs(make_config(), run_dir, "test").begin_prefork(["executor"])
    try:
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            chain.await_ready("executor")
        assert time.monotonic() - began < 5.0
        assert chain.fork("executor", run_dir, {}) is None, "it is not ready"
        monkeypatch.setattr(prefork_module, "_IMPORTS_S", 0.2)
        chain.await_ready("executor")
        assert "executor" not in chain._ends
    finally:
        chain.close()


def test_the_chain_ends_with_its_driver(make_config: Callable[..., Config], run_dir: Path) -> None:
    jobs = Jobs(make_config(), run_dir, "test")
    chain = jobs.begin_prefork(["trainer"])
    job = submitted(jobs, sleep, tasks=1)
    until(lambda: jobs._see_tasks(job) == [0], "the task is there")
    first = psutil.Process(chain._first.pid)
    (second,) = until(lambda: [one for one in first.children() if one.pid != int(job.id)], "both generations")
    for end in set(chain._ends.values()):
        end.close()  # as when the driver is killed
    assert chain._first.wait(timeout=20.0) == 0
    until(lambda: not second.is_running(), "the second is gone, too")
    assert jobs._see_tasks(job) == [0], "jobs go on: they watch the driver themselves"
    jobs.end([job], grace_s=1.0)
