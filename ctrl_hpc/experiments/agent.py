"""A trial of a sweep under wandb's agent: a run in a directory of its own, its course shown in the trial's wandb run.

The trainer's jobs have wandb runs of their own. The agent's is the driver's: it gets what they log while the trial runs
(``eval/pass_at_1`` among it, every ``rl.eval_every`` steps, by which a server stops trials early), then the report.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Self

from ctrl_hpc import config as configuration
from ctrl_hpc import jsonl
from ctrl_hpc.config import Config
from ctrl_hpc.run import directory
from ctrl_hpc.tracking.tracker import Tracker

LOOK_S = 1.0
"""Seconds between looks at what the trainer has logged."""
TRAINED = ("sft", "rl")


def run(config: str | None, overrides: Sequence[str], again: bool) -> Path:
    """Run a trial, as ``ctrl-hpc trial``; its wandb run and sweep are those that the environment names.

    What the trial is lies in the file that ``CTRL_HPC_TRIAL`` names until it has ended; with ``again`` it is read from
    there, so that a requeued job continues its trial. Raises ValueError where neither an agent nor a file says which.
    """
    file = Path(os.environ["CTRL_HPC_TRIAL"]) if "CTRL_HPC_TRIAL" in os.environ else None
    if again:
        if file is None or not file.is_file():
            raise ValueError("trial --again: CTRL_HPC_TRIAL names no file of a trial that was cut short")
        record = json.loads(file.read_text(encoding="utf-8"))
        os.environ.update(record["environment"])
        config, overrides = record["config"], record["overrides"]
    elif config is None:
        raise ValueError("trial: a configuration is needed, or --again")
    sweep, trial = (os.environ.get(name, "") for name in ("WANDB_SWEEP_ID", "WANDB_RUN_ID"))
    if not (sweep and trial):
        raise ValueError("trial: runs under `wandb agent`, which names the trial; see slurm/sweep.sbatch")
    if file is not None and not again:
        overrides = [*overrides, *os.environ.get("CTRL_HPC_TRIAL_OVERRIDES", "").split()]
        file.parent.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if name.startswith("WANDB_")}
        environment.pop("WANDB_API_KEY", None)  # a secret stays in the environment
        record = {"config": config, "overrides": list(overrides), "environment": environment}
        jsonl.write_text(file, json.dumps(record, indent=1) + "\n")
    loaded = configuration.load(config, overrides)
    folder = Path(loaded.run_dir or "").parent / "sweeps" / sweep / trial
    group = [] if loaded.wandb.group else [f"wandb.group={trial}"]  # the trial's jobs, apart from other trials'
    run_stages(configuration.load(config, [*overrides, *group, f"run_dir={folder}"]))
    if file is not None:
        file.unlink(missing_ok=True)
    return folder


def run_stages(config: Config) -> None:
    """The stages of a trial; all but the report, which logs to the trial's run itself, with a :class:`Mirror`."""
    from ctrl_hpc import pipeline, preflight

    preflight.check(config)
    folder = directory.prepare(config)
    stages = [name for name in config.stages if name != "report"]
    training = any(name in stages and not directory.is_done(folder, name) for name in TRAINED)
    with Mirror(config, folder) if training else nullcontext():
        pipeline.run(config, stages)
    if "report" in config.stages:
        pipeline.run(config, ("report",))


def end_by_signal() -> None:
    """End this process by SIGTERM, as a program without a handler would: an agent counts any exit code as a failure."""
    print("ctrl-hpc: the trial was told to stop", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)


class Mirror:
    """Logs to the trial's wandb run what the trainer writes to its ``metrics.jsonl``, each step once.

    How far it came is kept in ``RUN_DIR/trial.json``: steps that a trial repeats, because it was cut short after its
    last checkpoint, are not logged again.
    """

    def __init__(self, config: Config, folder: Path) -> None:
        self._folder, self._file = folder, folder / "trial.json"
        self._next: dict[str, int] = json.loads(self._file.read_text()) if self._file.exists() else {}
        self._closed = threading.Event()
        self._tracker = Tracker(config, folder, "trial")
        self._thread = threading.Thread(target=self._follow, name="trial-mirror", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        self._closed.set()
        self._thread.join()
        self._tracker.close(exit_code=0 if kind is None else 1)

    def _follow(self) -> None:
        ended = False
        while not ended:
            ended = self._closed.wait(LOOK_S)
            for stage in TRAINED:
                self._take(stage)

    def _take(self, stage: str) -> None:
        file = self._folder / stage / "metrics.jsonl"
        if not file.exists():
            return
        start = self._next.get(stage, 0)
        for row in whole_rows(file.read_text(encoding="utf-8")):
            step = int(row.pop("step"))
            if step >= self._next.get(stage, 0):
                self._tracker.log(row, step)
                self._next[stage] = step + 1
        if self._next.get(stage, 0) > start:
            jsonl.write_text(self._file, json.dumps(self._next) + "\n")


def whole_rows(text: str) -> list[dict[str, float]]:
    """The records of a metrics file; the last line may still be in writing."""
    whole, _, _ = text.rpartition("\n")
    return [json.loads(line) for line in whole.splitlines() if line]
