"""Starting and ending: nothing is left behind however a sandbox ends, and broken jails are replaced."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from ctrl_hpc.records import AssertTest, Execution, Limits, StdinTest
from ctrl_hpc.sandbox import Sandbox, rootfs
from ctrl_hpc.sandbox.jail import Jail, JailFault, Kind, memory_file
from ctrl_hpc.sandbox.memory import descendants
from ctrl_hpc.sandbox.worker import Worker

LIMITS = Limits(cpu_s=5.0, wall_s=60.0, memory_mb=128)
PASS = Execution(program="print(1)", tests=(StdinTest(stdin="", expected_stdout="1"),), limits=LIMITS)
SLEEP = Execution(
    program="import time; time.sleep(60)", tests=(StdinTest(stdin="", expected_stdout=""),), limits=LIMITS
)


def surroundings() -> tuple[list[int], list[str], int]:
    fds = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            fds.append(os.readlink(f"/proc/self/fd/{fd}"))
    return descendants(os.getpid()), sorted(fds), threading.active_count()


def test_nothing_is_left_after_a_sandbox_has_closed() -> None:
    with Sandbox(workers=1):
        pass
    before = surroundings()
    for fresh in (False, True):
        with Sandbox(workers=2, fresh=fresh) as sandbox:
            call = Execution(program="def f(): return 1", tests=(AssertTest(code="assert f() == 1"),), limits=LIMITS)
            assert all(verdict.accepted for verdict in sandbox.run_many([PASS, call] * 5))
    assert surroundings() == before


def test_a_closed_sandbox_drops_what_waits_and_takes_nothing() -> None:
    sandbox = Sandbox(workers=1)
    waiting = [sandbox.submit(Execution(program=f"{n}", tests=PASS.tests, limits=LIMITS)) for n in range(50)]
    sandbox.close()
    sandbox.close()
    assert all(future.done() for future in waiting) and sandbox.unfinished == 0
    with pytest.raises(ValueError, match="the sandbox is closed"):
        sandbox.submit(PASS)


_HOLDER = """
import sys
from ctrl_hpc.records import *
from ctrl_hpc.sandbox import Sandbox
from ctrl_hpc.sandbox.memory import descendants
import os, threading, time
sandbox = Sandbox(workers=1)
sandbox.run_tests("print(1)", [StdinTest(stdin="", expected_stdout="1")])
tests = [StdinTest(stdin="", expected_stdout="")]
sandbox.submit(Execution(program="import time; time.sleep(60)", tests=tuple(tests), limits=Limits(wall_s=60.0)))
while len(descendants(os.getpid())) < 4: time.sleep(0.01)
print(*descendants(os.getpid())[1:], flush=True)
time.sleep(100)
"""


def test_an_executor_that_is_killed_takes_its_jails_with_it() -> None:
    """SIGKILL of the executor: its nsjail, runner and running program end by themselves."""
    with subprocess.Popen([sys.executable, "-c", _HOLDER], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        pids = [int(word) for word in holder.stdout.readline().split()]
        assert len(pids) >= 3  # nsjail, runner, program
        descriptors = [os.pidfd_open(pid) for pid in pids]
        holder.kill()
        holder.wait()
    for fd in descriptors:
        assert _ends(fd), "a jailed process outlived its executor"
        os.close(fd)


def _ends(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 30)[0])


@pytest.mark.parametrize("victim", ["nsjail", "runner"])
def test_a_killed_jail_is_replaced_and_the_program_run_again(victim: str) -> None:
    """An outside kill is the executor's fault, not the program's: the test is run once more in a new jail."""
    before = set(descendants(os.getpid()))

    def jailed() -> list[int]:
        return [pid for pid in descendants(os.getpid()) if pid not in before]

    with Sandbox(workers=1) as sandbox:
        assert sandbox.run_many([PASS])[0].accepted
        jail_pids = jailed()
        future = sandbox.submit(SLEEP)
        while len(jailed()) < 3:
            pass
        os.kill(jail_pids[0 if victim == "nsjail" else 1], signal.SIGKILL)
        while set(jail_pids) & set(jailed()) or len(jailed()) < 3:
            pass
        os.kill(jailed()[0], signal.SIGKILL)
        verdict = future.result()
        assert verdict.status == "sandbox_error" and "the runner" in verdict.detail
        assert sandbox.run_many([PASS])[0].accepted


def test_a_fault_is_never_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    faults = iter([True, False, True, True])
    plain = Jail.run

    def failing(self: Jail, *args: object, **kwargs: object) -> object:
        if next(faults, False):
            raise JailFault("made to fail")
        return plain(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Jail, "run", failing)
    with Sandbox(workers=1) as sandbox:
        assert sandbox.run_many([PASS])[0].accepted
        verdict = sandbox.run_many([PASS])[0]
        assert (verdict.status, verdict.detail) == ("sandbox_error", "test 1 of 1: sandbox_error: made to fail")


def test_cancelling_ends_a_running_job() -> None:
    with Jail(rootfs.ensure()) as jail:
        fds = [memory_file("job", content) for content in (b"import time; time.sleep(60)", b"", b"", b"")]
        jail.submit(Kind.RUN, fds, LIMITS)
        jail.cancel()
        ended = jail.wait(40)
        assert ended.signal == signal.SIGKILL and ended.wall_s < 30
        jail.cancel()  # nothing runs: means nothing
        os.pwrite(fds[0], b"print('after')".ljust(27), 0)
        assert jail.run(Kind.RUN, fds, LIMITS).exit_code == 0 and os.pread(fds[2], 10, 0) == b"after\n"
        for fd in fds:
            os.close(fd)


def _powerless() -> dict[int, int]:
    """This process's descendants that belong to another user and have no capability nor a way to one: pid to uid."""
    found = {}
    for pid in descendants(os.getpid()):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            text = Path(f"/proc/{pid}/status").read_text()
            fields = dict(line.split(":", 1) for line in text.splitlines())
            owner = int(fields["Uid"].split()[0])
            if owner != 0 and int(fields["CapEff"], 16) == 0 and fields["NoNewPrivs"].strip() == "1":
                found[pid] = owner
    return found


def test_jails_of_root_have_outside_ids_of_nobody() -> None:
    """As root a jail's processes belong to an id that owns nothing, another one for each jail."""
    if os.getuid() != 0:
        return
    with Sandbox(workers=2) as sandbox:
        futures = [sandbox.submit(SLEEP) for _ in range(2)]
        while len(jailed := _powerless()) < 4:  # two runners, two programs
            pass
        while not all(future.done() for future in futures):
            for pid in _powerless():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        assert {future.result().status for future in futures} <= {"sandbox_error", "runtime_error"}
    assert len(set(jailed.values())) == 2 and min(jailed.values()) >= 1_000_000_000


@pytest.mark.slow
def test_roots_are_built_once_and_by_one(tmp_path: Path) -> None:
    roots: list[Path] = []
    threads = [threading.Thread(target=lambda: roots.append(rootfs.ensure(tmp_path / "roots"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(roots)) == 1 and len(roots) == 3
    assert [path.name for path in (tmp_path / "roots").iterdir()] == [roots[0].name]
    swept = next((roots[0] / "python/lib").glob("python*")) / "heapq.py"
    built, size = swept.stat().st_ctime_ns, swept.stat().st_size
    assert rootfs.ensure(tmp_path / "roots") == roots[0] and swept.stat().st_ctime_ns == built
    swept.unlink()
    for name, age_s in (("jail-old", 31 * 86400), ("jail-other", 29 * 86400)):
        (tmp_path / "roots" / name).mkdir()
        (tmp_path / "roots" / name / "complete").touch()
        os.utime(tmp_path / "roots" / name / "complete", (0, time.time() - age_s))
    assert rootfs.ensure(tmp_path / "roots") == roots[0]
    assert swept.stat().st_ctime_ns > built and swept.stat().st_size == size
    assert {path.name for path in (tmp_path / "roots").iterdir()} == {roots[0].name, "jail-other"}


def test_a_root_folder_that_others_could_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "roots").mkdir()
    (tmp_path / "roots").chmod(0o777)
    with pytest.raises(ValueError, match="is not a folder that only this user can write"):
        rootfs.ensure(tmp_path / "roots")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="is not a folder that only this user can write"):
        rootfs.ensure(tmp_path / "link")


def test_a_worker_starts_no_jail_for_a_problem_without_tests() -> None:
    worker = Worker(Path("/nowhere"), None, None)  # type: ignore[arg-type]
    verdict = worker.execute(Execution(program="", tests=(), limits=LIMITS))
    assert (verdict.status, verdict.detail) == ("unsupported", "there are no tests")


def test_a_fresh_jail_has_imported_what_its_program_names_and_a_warm_one_more() -> None:
    program = "import sys\nprint('heap' 'q' in sys.modules, 'bis' 'ect' in sys.modules)  # heapq"
    for fresh, found in ((True, "True False"), (False, "True True")):
        with Sandbox(workers=1, fresh=fresh) as sandbox:
            sandbox.run_tests("", [StdinTest(stdin="", expected_stdout="")])  # whose jail is there from the start
            assert sandbox.run_tests(program, [StdinTest(stdin="", expected_stdout=found)]).accepted
