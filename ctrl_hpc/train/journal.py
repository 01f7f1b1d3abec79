"""What a training stage tells the outside: metrics.jsonl, progress.json, wandb, and how long each phase took."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from ctrl_hpc import jsonl
from ctrl_hpc.config import Config
from ctrl_hpc.tracking.tracker import Tracker


class Clock:
    """Seconds spent in the phases of a step. Threads may share it: a phase that several are in is counted once."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._inside: dict[str, int] = {}
        self._since: dict[str, float] = {}
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the block under ``time/PHASE_s``."""
        key = f"time/{phase}_s"
        with self._lock:
            self._inside[key] = self._inside.get(key, 0) + 1
            if self._inside[key] == 1:
                self._since[key] = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._inside[key] -= 1
                if self._inside[key] == 0:
                    self._seconds[key] = self._seconds.get(key, 0.0) + time.perf_counter() - self._since[key]

    def take(self) -> dict[str, float]:
        """The seconds since the last call, of phases that are over."""
        with self._lock:
            taken, self._seconds = self._seconds, {}
        return taken


class Journal:
    """The log of one stage, written by rank 0; on the other ranks it does nothing.

    ``start`` is the step that comes next: records of it and later, left by a run that died after its last checkpoint,
    are removed, so that every step is there once. So it is in wandb: what it has of them is not logged again, and what
    it lacks of the steps before (its process was killed too) is.
    """

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        stage: str,
        *,
        steps: int,
        start: int,
        main: bool,
        engine: dict[str, str] | None = None,
    ) -> None:
        """``engine``: what computes, in words by name; printed, and part of ``progress.json`` and wandb's summary."""
        self._engine = engine or {}
        self._folder, self._stage, self._steps, self._main = run_dir / stage, stage, steps, main
        self._exit = ExitStack()
        self._tracker: Tracker | None = None
        self._repeated: set[int] = set()
        if main:
            self._folder.mkdir(parents=True, exist_ok=True)
            file = self._folder / "metrics.jsonl"
            before, removed = truncate(file, start)
            self._metrics = self._exit.enter_context(file.open("a", encoding="utf-8"))
            self._tracker = self._exit.enter_context(Tracker(config, run_dir, stage))
            logged = self._tracker.logged()
            if logged is not None:
                self._repeated = removed.intersection(logged)
                first = min(logged, default=-1)  # earlier steps are in files that were sent and are gone
                for step, metrics in before.items():
                    if step > first and step not in logged:
                        self._tracker.log(metrics, step)
            self._tracker.summary({f"trainer/{name}": word for name, word in self._engine.items()})
            told = ", ".join(f"{name} {word}" for name, word in self._engine.items())
            print(f"{stage}: from step {start} of {steps}; {told}", flush=True)
            self._progress(start, {})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._exit.__exit__(*exception)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Step ``step`` (from 0) is done."""
        if self._tracker is None:
            return
        self._metrics.write(_line(step, metrics))
        self._metrics.flush()
        if step not in self._repeated:
            self._tracker.log(metrics, step)
        self._progress(step + 1, metrics)

    def keep(self, folder: Path, name: str) -> None:
        """A critic's folder, as an artifact."""
        if self._tracker is not None:
            self._tracker.artifact(folder, "model", name)

    def table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Rows for people to read."""
        if self._tracker is not None and rows:
            self._tracker.table(name, columns, rows)

    def _progress(self, done: int, metrics: dict[str, float]) -> None:
        record = {"stage": self._stage, "step": done, "steps": self._steps, "metrics": metrics, "time": time.time()}
        record["engine"] = self._engine
        part = self._folder / ".progress.json.part"
        part.write_text(json.dumps(record), encoding="utf-8")
        os.replace(part, self._folder / "progress.json")


def truncate(file: Path, start: int) -> tuple[dict[int, dict[str, float]], set[int]]:
    """Keep of a metrics file the whole records of steps before ``start``.

    What is kept, as metrics by step, and the steps that are removed.
    """
    kept: dict[int, dict[str, float]] = {}
    removed = set()
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue  # the line that was being written when the run was killed
        step = record.pop("step")
        if step < start:
            kept[step] = record
        else:
            removed.add(step)
    if file.exists():
        jsonl.write_text(file, "".join(_line(step, metrics) for step, metrics in kept.items()))
    return kept, removed


def _line(step: int, metrics: dict[str, float]) -> str:
    return json.dumps({"step": step, **metrics}) + "\n"
