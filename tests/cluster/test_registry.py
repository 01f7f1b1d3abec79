"""Registrations: found while they are fresh, forgotten when stale, whatever the clocks say."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from ctrl_hpc import cli, jsonl
from ctrl_hpc.cluster import processes, registry
from ctrl_hpc.cluster.registry import DriverWatch, Registry


def rewrite(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def beat(file: Path, since_s: float = 0.0) -> None:
    """A heartbeat of ``since_s`` ago."""
    os.utime(file, (time.time() - since_s,) * 2)


def test_a_registered_service_is_found_until_it_withdraws(run_dir: Path) -> None:
    here = Registry(run_dir, heartbeat_s=60)
    with here.register("executor", "http://127.0.0.1:1", id="0-7", job_id="7"):
        assert Registry(run_dir).endpoints("executor") == ["http://127.0.0.1:1"]
        assert Registry(run_dir).endpoints("critic") == []
        (service,) = Registry(run_dir).services()
        assert (service.job_id, service.machine) == ("7", processes.machine())
    assert Registry(run_dir).endpoints("executor") == []


def test_heartbeats_refresh_the_entry(run_dir: Path) -> None:
    with Registry(run_dir, heartbeat_s=0.02).register("executor", "http://a", id="0"):
        file = run_dir / "services" / "executor" / "0.json"
        first = registry.read_entry(file)
        assert first is not None
        deadline = time.monotonic() + 20
        beats = {first.beat}
        while len(beats) < 4:
            now = registry.read_entry(file)
            assert now is not None and time.monotonic() < deadline
            beats.add(now.beat)


def test_an_entry_removed_by_mistake_comes_back(run_dir: Path) -> None:
    with Registry(run_dir, heartbeat_s=0.02).register("executor", "http://a", id="0"):
        Registry(run_dir).remove(lambda _: False)
        deadline = time.monotonic() + 20
        while Registry(run_dir).endpoints("executor") != ["http://a"]:
            assert time.monotonic() < deadline


def test_a_silent_service_is_dead_by_the_readers_clock(run_dir: Path, monkeypatch: object) -> None:
    registration = Registry(run_dir, heartbeat_s=600).register("executor", "http://a", id="0")
    file = run_dir / "services" / "executor" / "0.json"
    rewrite(file, machine="elsewhere")
    beat(file, -10_000)  # a node whose clock is fast
    clock = [100.0]
    monkeypatch.setattr(registry.time, "monotonic", lambda: clock[0])  # type: ignore[attr-defined]
    reader = Registry(run_dir, dead_after_s=30)
    assert reader.endpoints("executor") == ["http://a"]
    clock[0] += 29
    assert reader.endpoints("executor") == ["http://a"]
    beat(file)
    clock[0] += 29
    assert reader.endpoints("executor") == ["http://a"]  # it beat in between
    clock[0] += 31
    assert reader.endpoints("executor") == []
    beat(file, 1)
    clock[0] += 1
    assert reader.endpoints("executor") == ["http://a"]  # a lost heartbeat came back
    registration.close()


def test_an_old_entry_is_dead_at_first_sight(run_dir: Path) -> None:
    registration = Registry(run_dir, heartbeat_s=600).register("executor", "http://a", id="0")
    file = run_dir / "services" / "executor" / "0.json"
    rewrite(file, machine="elsewhere")
    beat(file, 100)
    assert Registry(run_dir, dead_after_s=30).endpoints("executor") == []
    registration.close()


def test_a_process_that_is_gone_is_dead_at_once_on_its_machine(run_dir: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    registration = Registry(run_dir, heartbeat_s=600).register("executor", "http://a", id="0")
    file = run_dir / "services" / "executor" / "0.json"
    rewrite(file, pid=child.pid, started=processes.started(child.pid))
    assert Registry(run_dir).endpoints("executor") == ["http://a"]
    child.communicate(b"\n")
    assert Registry(run_dir).endpoints("executor") == []
    registration.close()


def test_a_process_is_the_same_when_the_systems_clock_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = processes.started(child.pid)
    assert started is not None and started >= (processes.started(os.getpid()) or 0) > 0
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: 0.0)  # what psutil counts a process's start from
    assert psutil.Process(child.pid).create_time() == pytest.approx(started / os.sysconf("SC_CLK_TCK"))
    assert processes.is_running(child.pid, started)
    assert processes.is_running(child.pid, None)
    assert not processes.is_running(child.pid, started + 1)
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert processes.started(child.pid) is None, "a zombie runs no more"
    child.wait()
    assert processes.started(child.pid) is None


def test_a_broken_entry_is_not_a_service(run_dir: Path) -> None:
    folder = run_dir / "services" / "executor"
    folder.mkdir(parents=True)
    (folder / "0.json").write_text('{"role": "exec')
    assert Registry(run_dir).services() == []


def test_the_driver_is_watched(run_dir: Path) -> None:
    here = Registry(run_dir, heartbeat_s=600)
    with here.register("driver", "", id="driver", session="one"):
        assert DriverWatch(run_dir, "one", 30).alive()
        assert not DriverWatch(run_dir, "two", 30).alive()  # another driver has taken over
        file = run_dir / "services" / "driver" / "driver.json"
        rewrite(file, pid=2**22 - 1)
        assert not DriverWatch(run_dir, "one", 30).alive()
    assert not DriverWatch(run_dir, "one", 0.0).alive()


def test_service_records_are_plain_data() -> None:
    names = {field.name for field in dataclasses.fields(registry.Service)}
    assert {"role", "id", "url", "host", "pid", "job_id", "log", "session", "beat"} <= names


def test_who_asks_reads_the_drivers_list_and_not_every_entry(run_dir: Path, monkeypatch: object) -> None:
    clock = [100.0]
    monkeypatch.setattr(registry.time, "monotonic", lambda: clock[0])  # type: ignore[attr-defined]
    here = Registry(run_dir, heartbeat_s=600)
    with here.register("executor", "http://a", id="0"), here.register("critic", "http://c", id="0"):
        here.write_list(here.census()[0])
        with here.register("executor", "http://b", id="1"):
            reader, list_file = Registry(run_dir), run_dir / "services" / "alive.json"
            assert reader.endpoints("executor") == ["http://a"]  # as the driver says: it has not seen the other one yet
            assert reader.endpoints("critic") == ["http://c"]
            here.write_list(here.census()[0])
            assert reader.endpoints("executor") == ["http://a", "http://b"]
            beat(list_file, -10_000)  # renewed by a node whose clock is fast
            clock[0] += 5
            assert reader.endpoints("executor") == ["http://a", "http://b"]
            list_file.write_text("[]")
            os.utime(list_file, (7, 7))
            assert reader.endpoints("executor") == []
            clock[0] += 7  # nobody renews it: the entries count
            assert reader.endpoints("executor") == ["http://a", "http://b"]
            list_file.write_text('{"not": "a list"}')
            assert reader.endpoints("critic") == ["http://c"]
        here.remove_list()
        clock[0] += 1
        assert reader.endpoints("executor") == ["http://a"]


def test_services_are_told_to_prometheus(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    jsonl.write_text(run_dir / "config.yaml", "{}\n")
    out = run_dir / "targets.json"
    with (
        Registry(run_dir).register("executor", "http://10.0.0.7:8123", id="3-77", host="node7"),
        Registry(run_dir).register("driver", "", id="driver"),
    ):
        assert cli.main(["status", str(run_dir), "--targets", str(out)]) == 0
        assert json.loads(out.read_text()) == [
            {
                "targets": ["10.0.0.7:8123"],
                "labels": {"run": run_dir.name, "role": "executor", "element": "3", "node": "node7"},
            }
        ]
        assert cli.main(["status", str(run_dir), "--targets", str(run_dir / "config.yaml")]) == 2
    assert (run_dir / "config.yaml").read_text() == "{}\n"
    assert "nothing was overwritten" in capsys.readouterr().err
    assert cli.main(["status", str(run_dir), "--targets", str(out)]) == 0
    assert json.loads(out.read_text()) == []
