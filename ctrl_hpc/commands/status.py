"""``ctrl-hpc status``, ``logs`` and ``stop``: what looks at a run, or ends it."""

from __future__ import annotations

import argparse
import json
import time
from typing import TYPE_CHECKING, Any

from ctrl_hpc.commands.output import check_file, place

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = ("sft/loss", "rl/reward", "rl/kl", "executor/runs_per_s", "rollout/tokens_per_s")
"""Metrics of the last step that are worth a glance."""


def add(commands: Any) -> None:
    """What looks at a run, or ends it."""
    for name, text, command in (
        ("status", "jobs, stages, steps and the last errors of a run", _status),
        ("logs", "the logs of a run, or of one role", _logs),
        ("stop", "end a run and everything it started", _stop),
    ):
        about = commands.add_parser(name, help=text)
        about.add_argument("run_dir", metavar="RUN", help="run directory")
        about.set_defaults(command=command)
        if name == "logs":
            about.add_argument(
                "role", nargs="?", default=None, help="driver, trainer (or sft, rl), executor, generator, critic"
            )
            about.add_argument("--lines", type=_lines, default=40, help="last lines of each log (default: 40)")
        if name == "status":
            about.add_argument("--json", action="store_true", help="as JSON, for programs")
            about.add_argument("--watch", action="store_true", help="again every two seconds, until Ctrl-C")
            about.add_argument("--targets", metavar="FILE", help="write its services for Prometheus (file_sd_configs)")


def _lines(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{count} is not allowed; it must be greater than 0")
    return count


_lines.__name__ = "int"  # as argparse tells what was expected


def show(status: dict[str, Any], *, clear: bool = False) -> None:
    """Print what :func:`ctrl_hpc.cluster.status.status` found."""
    from rich.console import Console
    from rich.table import Table

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


def _status(options: argparse.Namespace) -> int:
    from ctrl_hpc.cluster.status import status

    if options.targets is not None:
        return _targets(options)
    if options.json:
        print(json.dumps(status(options.run_dir), indent=1))
        return 0
    show(status(options.run_dir))
    while options.watch:
        time.sleep(2.0)
        show(status(options.run_dir), clear=True)
    return 0


def _targets(options: argparse.Namespace) -> int:
    from ctrl_hpc import jsonl
    from ctrl_hpc.cluster.status import targets

    file = place(options.targets)
    found = targets(options.run_dir)
    known = file.is_file() and file.read_text(encoding="utf-8").lstrip()[:1] in ("", "[")
    check_file(file, "--targets", beside=None if known else ".")  # written over is a list of targets alone
    while True:
        jsonl.write_text(file, json.dumps(found, indent=1) + "\n")
        if not options.watch:
            print(f"targets: {len(found)} services in {file}")
            return 0
        time.sleep(2.0)
        found = targets(options.run_dir)


def _logs(options: argparse.Namespace) -> int:
    from ctrl_hpc.cluster.status import logs

    for file in logs(options.run_dir, options.role):
        print(f"==> {file} <==")
        print("\n".join(file.read_text(errors="replace").splitlines()[-options.lines :]))
    return 0


def _stop(options: argparse.Namespace) -> int:
    from ctrl_hpc.cluster.status import stop

    print("\n".join(stop(options.run_dir)) or f"{options.run_dir}: nothing was running")
    return 0
