"""What ``ctrl-hpc status`` prints: the jobs of a run, its stages, and its last errors."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

SHOWN = ("sft/loss", "rl/reward", "rl/kl", "executor/runs_per_s", "rollout/tokens_per_s")
"""Metrics of the last step that are worth a glance."""


def show(status: dict[str, Any], *, clear: bool = False) -> None:
    """Print what :func:`ctrl_hpc.cluster.status.status` found."""
    console = Console()
    if clear:
        console.clear()
    console.print(f"{status['run_dir']}: {'running' if status['running'] else 'not running'}")
    jobs = Table("role", "state", "host", "job", "process", "last beat", "log")
    for job in status["jobs"]:
        beat = "" if job["since_beat_s"] is None else f"{job['since_beat_s']:.0f} s ago"
        cells = (job["role"], job["state"], job["host"], job["job_id"], job["pid"], beat, job["log"])
        jobs.add_row(*("" if cell is None else str(cell) for cell in cells))
    fold(jobs)
    if status["jobs"]:
        console.print(jobs)
    stages = Table("stage", "state", "step", "seconds", "last metrics")
    for name, stage in status["stages"].items():
        step = f"{stage['step']}/{stage['steps']}" if "steps" in stage else ""
        metrics = stage.get("metrics", {})
        told = ", ".join(f"{key} {metrics[key]:.3f}" for key in SHOWN if key in metrics)
        seconds = f"{stage['wall_time_s']:.1f}" if "wall_time_s" in stage else ""
        stages.add_row(name, stage["state"], step, seconds, told)
    fold(stages)
    console.print(stages)
    for error in status["errors"]:
        console.print(f"error: {error}", highlight=False)


def fold(table: Table) -> Table:
    """A table whose cells go on in a second line where the terminal is narrow, instead of losing their ends."""
    for column in table.columns:
        column.overflow = "fold"
    return table
