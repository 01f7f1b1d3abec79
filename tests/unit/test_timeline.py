"""A run's timeline: events of the Trace Event Format, at the times that the journals have."""

import json

import pytest

from ctrl_hpc import cli, jsonl
from ctrl_hpc.report import timeline
from ctrl_hpc.run.journal import place
from ctrl_hpc.train.loop import Clock


@pytest.fixture
def run_dir(tmp_path):
    """Two steps of RL: collection from 100 to 103, the trainer waits from 100.5 to 103 and updates until 104 ..."""
    (tmp_path / "config.yaml").write_text("{}\n")
    lines = [
        {
            **{"step": step, "time": 104.5 + 5 * step, "time/step_s": 4.0, "rl/reward": 0.5},
            **{"time/rollout_s": 2.0, "began_rollout": 100.0 + 5 * step, "ended_rollout": 102.0 + 5 * step},
            **{"time/execute_s": 1.0, "began_execute": 102.0 + 5 * step, "ended_execute": 103.0 + 5 * step},
            **{"time/wait_s": 2.5, "began_wait": 100.5 + 5 * step, "ended_wait": 103.0 + 5 * step},
            **{"time/update_s": 1.0, "began_update": 103.0 + 5 * step, "ended_update": 104.0 + 5 * step},
        }
        for step in range(2)
    ]
    jsonl.write_text(place(tmp_path, "rl"), "".join(json.dumps(line) + "\n" for line in lines))
    jsonl.write_text(place(tmp_path, "critic-0"), json.dumps({"step": 101, "time": 101.0, "rollout/busy": 0.75}) + "\n")
    jsonl.write_text(tmp_path / "rl" / "done.json", json.dumps({"stage": "rl", "wall_time_s": 11.0, "finished": 110.0}))
    return tmp_path


def test_events(run_dir):
    found = timeline.events(run_dir)
    names = {event["pid"]: event["args"]["name"] for event in found if event["ph"] == "M"}
    spans = {
        (names[event["pid"]], event["name"]): (event["ts"] / 1e6, event["dur"] / 1e6)
        for event in reversed(found)
        if event["ph"] == "X"
    }
    # seconds since the stage began, at 99
    assert spans["driver: stages", "rl"] == (0.0, 11.0)
    assert spans["trainer", "rl step 1"] == (1.5, 4.0)
    assert spans["collection of rollouts", "critic writes critiques"] == (1.0, 2.0)
    assert spans["collection of rollouts", "executors run tests"] == (3.0, 1.0)
    assert spans["trainer", "waits for rollouts"] == (1.5, 2.5)
    assert spans["trainer", "rl step 2"] == (6.5, 4.0)
    arrows = [(event["ph"], event["id"], event["ts"] / 1e6) for event in found if event["ph"] in "sf"]
    assert arrows == [("s", 0, 4.0), ("f", 0, 4.0), ("s", 1, 9.0), ("f", 1, 9.0)]
    (curve,) = [event for event in found if event["ph"] == "C"]
    assert (names[curve["pid"]], curve["name"], curve["ts"], curve["args"]) == (
        *("critic-0", "rollout/busy", 2_000_000),
        {"value": 0.75},
    )


def test_who_waited_for_whom(run_dir):
    assert [(share.what, share.seconds, share.share) for share in timeline.shares(run_dir)] == [
        ("waits for rollouts", 5.0, 0.625),
        ("update", 2.0, 0.25),
        ("critic writes critiques", 4.0, 0.5),
        ("executors run tests", 2.0, 0.25),
    ]


def test_the_command(run_dir, capsys):
    assert cli.main(["timeline", str(run_dir)]) == 0
    written = json.loads((run_dir / "report" / "timeline.json").read_text())
    assert written["traceEvents"] == timeline.events(run_dir)
    assert "waits for rollouts" in capsys.readouterr().out
    assert cli.main(["timeline", str(run_dir), "--out", str(run_dir / "config.yaml")]) == 2
    assert (run_dir / "config.yaml").read_text() == "{}\n"
    place(run_dir, "rl").unlink()
    place(run_dir, "critic-0").unlink()
    (run_dir / "rl" / "done.json").unlink()
    assert cli.main(["timeline", str(run_dir)]) == 2
    assert "no journals" in capsys.readouterr().err


def test_the_clock_tells_when_phases_began_and_ended():
    clock = Clock()
    with clock("wait"):
        with clock("update"):
            pass
        first = clock.take()
        assert {"time/update_s", "began_update", "ended_update"} == set(first)
        assert first["began_update"] <= first["ended_update"]
    second = clock.take()
    assert {"time/wait_s", "began_wait", "ended_wait"} == set(second)
    assert second["began_wait"] <= first["began_update"] <= second["ended_wait"]
    assert clock.take() == {}
