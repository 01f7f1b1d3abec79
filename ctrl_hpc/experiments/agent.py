"""A trial of a sweep under wandb's agent: a run in a directory of its own, shown in the trial's wandb run as it goes.

The agent's wandb run is told what the training stages journal (``eval/pass_at_1`` among it, every ``rl.eval_every``
steps, by which a server stops trials early), then the report; see :mod:`ctrl_hpc.tracking.mirror`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from ctrl_hpc import config as configuration
from ctrl_hpc import jsonl


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
    from ctrl_hpc import pipeline, preflight

    made = configuration.load(config, [*overrides, *group, f"run_dir={folder}"])
    preflight.check(made)
    pipeline.run(made)
    if file is not None:
        file.unlink(missing_ok=True)
    return folder


def end_by_signal() -> None:
    """End this process by SIGTERM, as a program without a handler would: an agent counts any exit code as a failure."""
    print("ctrl-hpc: the trial was told to stop", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGTERM)
