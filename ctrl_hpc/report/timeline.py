"""A run's timeline from its journals: who did what when, and who waited for whom, as a Chrome trace.

Events are those of the Trace Event Format (its "X" durations, "C" counters, "s"/"f" arrows, "M" names), which
ui.perfetto.dev and chrome://tracing show. Times are microseconds since the run's first event.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctrl_hpc.run import journal

PHASES = {
    "wait": "waits for rollouts",
    "advantages": "advantages",
    "logprobs": "log-probs",
    "reference": "reference's log-probs",
    "update": "update",
    "publish": "publishes weights",
    "save": "saves",
}
"""Phases of a trainer's step, in its own lane."""
COLLECTED = {
    "load": "critic's servers load weights",
    "rollout": "critic writes critiques",
    "revise": "generator revises",
    "execute": "executors run tests",
    "validate": "validation",
}
"""Phases of the collection of a step's rollouts, which may go on while the trainer trains on the step before."""
_DRIVER, _TRAINER, _COLLECTOR, _SERVICES = 1, 2, 3, 10
"""Process numbers of the trace; services have one each from the last on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What the steps of a stage were spent on."""

    stage: str
    what: str
    seconds: float
    share: float
    """Of all steps' seconds. Collection goes on beside training, so that shares may add up to more than 1."""


def events(run_dir: Path) -> list[dict[str, Any]]:
    """The events of a run, in the order of their times. Raises ValueError where nothing was journalled."""
    found = [*_stages(run_dir), *_steps(run_dir), *_services(run_dir)]
    if not any(event["ph"] in "XC" for event in found):
        raise ValueError(f"{run_dir}: no journals of a run there")
    start = min(event["ts"] for event in found if event["ph"] != "M")
    moved = [event if event["ph"] == "M" else event | {"ts": round(1e6 * (event["ts"] - start))} for event in found]
    return sorted(moved, key=lambda event: (event["ph"] != "M", event.get("ts", 0)))


def shares(run_dir: Path) -> list[Share]:
    """By stage, what its steps were spent on, the longest first within the trainer's own and the collection's."""
    out = []
    for stage in journal.STAGES:
        lines = journal.lines(journal.place(run_dir, stage))
        whole = sum(line.get("time/step_s", 0.0) for line in lines)
        for names in (PHASES, COLLECTED):
            spent = {name: sum(line.get(f"time/{name}_s", 0.0) for line in lines) for name in names}
            for name in sorted(spent, key=lambda name: -spent[name]):
                if whole > 0.0 and spent[name] > 0.0:
                    share = Share(stage=stage, what=names[name], seconds=spent[name], share=spent[name] / whole)
                    out.append(share)
    return out


def _named(pid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "pid": pid, "tid": 0, "name": "process_name", "args": {"name": name}}


def _span(pid: int, name: str, began: float, ended: float, **about: Any) -> dict[str, Any]:
    """A duration; ``began`` and ``ended`` in seconds of the day's clock."""
    length = round(1e6 * max(ended - began, 0.0))
    return {"ph": "X", "pid": pid, "tid": about.pop("tid", 0), "name": name, "ts": began, "dur": length, "args": about}


def _stages(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The driver's lane: every stage that is done."""
    yield _named(_DRIVER, "driver: stages")
    for file in sorted(run_dir.glob("*/done.json")):
        done = json.loads(file.read_text(encoding="utf-8"))
        if "finished" in done:
            yield _span(_DRIVER, done["stage"], done["finished"] - done["wall_time_s"], done["finished"])


def _steps(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The trainer's lane with its phases, the collection's, and an arrow from the latter to who waited for it."""
    yield _named(_TRAINER, "trainer")
    yield _named(_COLLECTOR, "collection of rollouts")
    for stage in journal.STAGES:
        for line in journal.lines(journal.place(run_dir, stage)):
            if "time/step_s" not in line:
                continue
            numbers = {name: value for name, value in journal.numbers(line).items() if not name.startswith("time/")}
            began = line["time"] - line["time/step_s"]
            yield _span(_TRAINER, f"{stage} step {line['step'] + 1}", began, line["time"], **numbers)
            yield from _phases(_TRAINER, PHASES, line)
            yield from _phases(_COLLECTOR, COLLECTED, line)
            yield from _arrow(line)


def _phases(pid: int, names: Mapping[str, str], line: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The phases of a step whose times the journal has; journals of earlier versions have their seconds alone."""
    for name, told in names.items():
        if f"began_{name}" in line and f"ended_{name}" in line:
            began, ended = line[f"began_{name}"], line[f"ended_{name}"]
            about = {"step": line["step"] + 1, "busy_s": line[f"time/{name}_s"]}
            yield _span(pid, told, began, ended, tid=1 if pid == _TRAINER else 0, **about)


def _arrow(line: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """From the end of a step's collection to the end of the trainer's wait for it."""
    ends = [line[f"ended_{name}"] for name in COLLECTED if f"ended_{name}" in line]
    if ends and "ended_wait" in line:
        about = {"name": "rollouts", "cat": "rollouts", "id": line["step"]}
        yield {"ph": "s", "pid": _COLLECTOR, "tid": 0, "ts": max(ends), **about}
        yield {"ph": "f", "bp": "e", "pid": _TRAINER, "tid": 1, "ts": max(line["ended_wait"], max(ends)), **about}


def _services(run_dir: Path) -> Iterator[dict[str, Any]]:
    """A lane for every service and node that journals: rates, queues and use as curves."""
    names = [name for name in journal.journals(run_dir) if name not in (*journal.STAGES, "report")]
    for number, name in enumerate(names):
        pid = _SERVICES + number
        yield _named(pid, name)
        for line in journal.lines(journal.place(run_dir, name)):
            for key, value in journal.numbers(line).items():
                yield {"ph": "C", "pid": pid, "tid": 0, "name": key, "ts": line["time"], "args": {"value": value}}
