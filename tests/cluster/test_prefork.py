"""Local jobs forked from processes that have imported ahead: the same tasks, ends and restarts as of jobs started."""

import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import psutil
import pytest
import submitit
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
        Generation(roles=("executor",), modules=("wave", "numpy.random")),
        Generation(roles=("trainer",), modules=("a_module_that_is_not_there",)),
    )
    monkeypatch.setattr(prefork_module, "GENERATIONS", chain)


def about() -> dict[str, Any]:
    """Where a task runs, and what it was given."""
    names = ("SUBMITIT_LOCAL_GLOBALID", "SUBMITIT_LOCAL_NTASKS", "OMP_NUM_THREADS", "OF_THE_DRIVER")
    return {name: os.environ.get(name) for name in (*names, "OPENBLAS_NUM_THREADS")} | {
        "imported": "wave" in sys.modules,
        "random": np.random.random(),
    }


def fail() -> None:
    """A task that ends by an error."""
    raise ValueError("one plain line")


def sleep() -> None:
    """A task that does not end by itself."""
    time.sleep(600)


def submitted(jobs: Jobs, function: Callable[[], Any], tasks: int = 2, role: str = "trainer") -> Job:
    return jobs.submit(role, function, [()], JobConfig(), tasks_per_node=tasks, threads=3)[0]


def importing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, role: str, code: str) -> None:
    """Have the generation of this role import a module of this code, and nothing else."""
    (tmp_path / "a_module_of_the_test.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    chain = tuple(
        Generation(roles=one.roles, modules=("a_module_of_the_test",)) if role in one.roles else one
        for one in prefork_module.GENERATIONS
    )
    monkeypatch.setattr(prefork_module, "GENERATIONS", chain)


def forked() -> list[psutil.Process]:
    """Those of the chain that live, its jobs among them, whoever their parents are."""
    mark = ["ctrl_hpc.cluster.prefork", str(os.getpid())]
    return [one for one in psutil.process_iter(["cmdline"]) if (one.info["cmdline"] or [])[2:4] == mark]


def test_tasks_are_children_of_their_controller_with_the_jobs_environment(
    make_config: Callable[..., Config], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = Jobs(make_config(), run_dir, "test")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "2")  # NumPy would start a thread
    chain = jobs.begin_prefork(["trainer"])
    try:
        monkeypatch.setenv("OF_THE_DRIVER", "set after the chain was started")
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", "3")
        job = submitted(jobs, about)
        until(lambda: jobs.state(job) == "ended", "the job is over")
        found = [job.result(task) for task in range(2)]
        assert [outcome and outcome[0] for outcome in found] == ["success", "success"]
        rows = [outcome[1] for outcome in found if outcome]
        assert [row["SUBMITIT_LOCAL_GLOBALID"] for row in rows] == ["0", "1"]
        assert {row["SUBMITIT_LOCAL_NTASKS"] for row in rows} == {"2"}
        assert {row["OMP_NUM_THREADS"] for row in rows} == {"3"}
        assert {row["OF_THE_DRIVER"] for row in rows} == {"set after the chain was started"}
        assert {row["OPENBLAS_NUM_THREADS"] for row in rows} == {"3"}
        assert all(row["imported"] for row in rows)
        assert rows[0]["random"] != rows[1]["random"]
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
    make_config: Callable[..., Config],
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    chain = Jobs(make_config(), run_dir, "test").begin_prefork(["executor"])
    try:
        chain.await_ready("executor")
        chain._first.send_signal(signal.SIGSTOP)
        monkeypatch.setattr(prefork_module, "_ANSWER_S", 0.2)
        assert chain.fork("executor", run_dir, {}) is None
        assert chain.roles == ()
        chain._first.send_signal(signal.SIGCONT)
        assert chain._first.wait(20.0) == 0
        until(lambda: not forked(), "the controller ends, which nobody has heard of", 20.0)
        assert "Traceback" not in capfd.readouterr().err, "it has not begun: it was given no environment to begin with"
    finally:
        chain.close()


def test_a_controller_whose_driver_was_interrupted_does_not_begin(
    make_config: Callable[..., Config], run_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    chain = Jobs(make_config(), run_dir, "test").begin_prefork(["executor"])
    try:
        chain.await_ready("executor")
        chain._first.send_signal(signal.SIGSTOP)
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            chain.fork("executor", run_dir, {})
        assert chain.roles == (), "the next job's controller would be this one's"
        chain._first.send_signal(signal.SIGCONT)
        assert chain._first.wait(20.0) == 0
        until(lambda: not forked(), "the controller ends, which nobody has heard of", 20.0)
        assert "Traceback" not in capfd.readouterr().err
    finally:
        chain.close()


def test_imports_that_hang_are_not_waited_for_and_ctrl_c_ends_the_wait(
    make_config: Callable[..., Config], run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    importing(monkeypatch, tmp_path, "executor", "import time\ntime.sleep(600)\n")
    chain = Jobs(make_config(), run_dir, "test").begin_prefork(["executor"])
    locked: list[bool] = []
    monkeypatch.setattr(prefork_module, "wait", lambda *given: (locked.append(chain._lock.locked()), wait(*given)))
    try:
        threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            chain.await_ready("executor")
        assert time.monotonic() - began < 5.0
        assert chain.fork("executor", run_dir, {}) is None, "it is not ready"
        monkeypatch.setattr(prefork_module, "_IMPORTS_S", 0.2)
        chain.await_ready("executor")
        assert chain.roles == ()
        assert locked and not any(locked), "others may ask meanwhile"
    finally:
        chain.close()


def test_the_chain_ends_at_once_and_its_jobs_go_on(
    make_config: Callable[..., Config], run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    importing(monkeypatch, tmp_path, "trainer", "import time\ntime.sleep(600)\n")
    jobs = Jobs(make_config(), run_dir, "test")
    chain = jobs.begin_prefork(["executor", "trainer"])
    job = submitted(jobs, sleep, tasks=1, role="executor")
    until(lambda: jobs._see_tasks(job) == [0], "the task is there")
    first = psutil.Process(chain._first.pid)
    (second,) = until(lambda: [one for one in first.children() if one.pid != int(job.id)], "both generations")
    chain.close()
    until(lambda: not second.is_running(), "the second is gone, too, though it imports", 20.0)
    assert jobs._see_tasks(job) == [0]
    assert {one.pid for one in forked()} == {int(job.id), *job.seen_tasks}
    jobs.end([job], grace_s=1.0)


def test_the_chain_ends_with_its_driver_while_it_imports(tmp_path: Path) -> None:
    (tmp_path / "hangs.py").write_text("import time\ntime.sleep(600)\n")
    code = """
        import sys, time
        from ctrl_hpc.cluster import prefork
        one, two = (prefork.Generation(roles=(name,), modules=(name,)) for name in ("wave", "hangs"))
        prefork.GENERATIONS = (one, two)
        print(prefork.Prefork(sys.executable, ["hangs"])._first.pid, flush=True)
        time.sleep(600)
    """
    driver = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    with driver:
        first = psutil.Process(int(driver.stdout.readline()))
        (second,) = until(first.children, "both generations")
        driver.kill()
    until(lambda: not first.is_running() and not second.is_running(), "both are gone", 20.0)


def test_a_job_does_not_take_an_earlier_one_of_its_id_for_itself(
    make_config: Callable[..., Config], run_dir: Path
) -> None:
    jobs = Jobs(make_config(), run_dir, "test")
    chain = jobs.begin_prefork(["executor"])
    try:
        chain.await_ready("executor")
        folder = jobs.log_dir / "executor"
        folder.mkdir(parents=True)
        last = int(Path("/proc/loadavg").read_text().split()[-1])  # the id given last
        left = submitit.core.utils.DelayedSubmission(fail)
        left.set_timeout(1, 1)
        for pid in range(last, last + 1000):
            left.dump(folder / f"{pid}_submitted.pkl")
            (folder / f"{pid}_0_result.pkl").write_bytes(pickle.dumps(("success", "of an earlier job")))
        slow, quick = submitted(jobs, sleep, 1, "executor"), submitted(jobs, about, 1, "executor")
        assert slow.result() is None
        until(lambda: jobs.state(quick) == "ended", "the job is over")
        outcome = quick.result()
        assert outcome is not None and outcome[0] == "success" and outcome[1]["imported"]
        jobs.end([slow], grace_s=1.0)
    finally:
        chain.close()


def found() -> tuple[bool, bool]:
    """Whether the module that was imported ahead found wandb, and whether a job would."""
    return sys.modules["a_module_of_the_test"].found, importlib.util.find_spec("wandb") is not None


def test_wandb_is_not_imported_ahead(
    make_config: Callable[..., Config], run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "try:\n    import wandb\n    found = True\nexcept ImportError:\n    found = False\n"
    importing(monkeypatch, tmp_path, "executor", code)
    jobs = Jobs(make_config(), run_dir, "test")
    chain = jobs.begin_prefork(["executor"])
    try:
        job = submitted(jobs, found, 1, "executor")
        until(lambda: jobs.state(job) == "ended", "the job is over")
        assert job.result() == ("success", (False, True))
    finally:
        chain.close()


def test_nothing_is_forked_beside_threads(
    make_config: Callable[..., Config],
    run_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    importing(monkeypatch, tmp_path, "executor", "import threading\nthreading.Timer(600, print).start()\n")
    chain = Jobs(make_config(), run_dir, "test").begin_prefork(["executor", "trainer"])
    try:
        assert chain.roles == ("executor", "trainer")
        chain.await_ready("trainer")
        assert chain.roles == ("executor",)
        chain.await_ready("executor")
        assert chain.roles == ()
        assert chain._first.wait(20.0) == 0, "the chain has ended"
    finally:
        chain.close()
    told = " ".join(capsys.readouterr().err.split())
    for role in ("executor", "trainer"):
        assert told.count(f"{role}: not forked from a process that is ready, but started: its imports have") == 1
    assert "have started 1 threads" in told


def test_without_processes_to_fork_from_jobs_are_started(
    make_config: Callable[..., Config],
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    services = Services(make_config(), run_dir)
    ahead: list[object] = []
    thread = threading.Thread(target=lambda: ahead.append(services.import_ahead(["executor"])))
    thread.start()
    thread.join()
    assert ahead == [None], "it would end with the thread"
    monkeypatch.setattr(sys, "executable", "/not/there/python")
    assert services.import_ahead(["executor"]) is None
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("jobs are not forked from processes that are ready, but started: [Errno 2]") == 1


def test_arrays_that_wait_for_no_imports_are_started_first(
    make_config: Callable[..., Config], run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(Services, "_submit", lambda _, role, elements: order.append(role) or [])
    chain = (
        Generation(roles=("generator",), modules=()),
        Generation(roles=("executor", "of_nobody"), modules=()),
    )
    monkeypatch.setattr(prefork_module, "GENERATIONS", chain)
    everything = {"critic", "executor", "generator"}
    with Services(make_config(), run_dir) as services:
        services.submit(everything)
        assert order == ["critic", "executor", "generator"]
    order.clear()
    with Services(make_config(), run_dir) as services:
        ahead = services.import_ahead(["executor", "generator"])
        assert ahead is not None and ahead.roles == ("generator", "executor")
        services.submit(everything)
        assert order == ["critic", "generator", "executor"]
