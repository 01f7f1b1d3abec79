"""``ctrl-hpc report``: of a configuration's run, of a run directory, or of many runs beside each other."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from ctrl_hpc.commands.output import check_folder, place
from ctrl_hpc.config.load import packaged


def add(parser: argparse.ArgumentParser, stage: Callable[[argparse.Namespace], int]) -> None:
    """The command's arguments; ``stage`` runs the stage ``report`` of a configuration."""
    parser.add_argument("targets", nargs="+", metavar="CONFIG.yaml|RUN", help="a configuration, or run directories")
    parser.add_argument("--out", type=place, default=None, help="folder of the report of several runs")
    parser.add_argument("--title", default="Several runs", help="title of that report")
    parser.add_argument("--json", action="store_true", help="of run directories: print results.json, for programs")
    parser.set_defaults(command=lambda options: run(options, stage), overrides=[], redo=False)


def run(options: argparse.Namespace, stage: Callable[[argparse.Namespace], int]) -> int:
    """Tell the forms apart: folders are runs, a YAML file is a configuration with its overrides."""
    targets = [text for text in options.targets if "=" not in text or Path(text).exists()]
    overrides = [text for text in options.targets if text not in targets] + options.overrides
    if not targets:
        raise ValueError(f"report: {overrides[0]!r} is an override; name a configuration or a run directory first")
    if targets[0].endswith((".yaml", ".yml")) or (not Path(targets[0]).exists() and packaged(targets[0])):
        if len(targets) > 1 or options.out is not None:
            raise ValueError("report: one configuration at a time, without --out; several runs by their directories")
        if options.json:
            raise ValueError("report: --json: goes with run directories, not with a configuration")
        options.config, options.overrides = targets[0], overrides
        return stage(options)
    if overrides:
        raise ValueError(f"report: {overrides[0]!r}: overrides go with a configuration, not with run directories")
    with redirect_stdout(sys.stderr) if options.json else nullcontext():  # the tables are for people
        results = _runs(targets, options.out, options.title)
    if options.json:
        print(json.dumps(results, indent=1, allow_nan=False))
    return 0


def _runs(folders: list[str], out: Path | None, title: str) -> dict[str, Any]:
    if out is not None:
        from ctrl_hpc.report import combined

        check_folder(out, "--out", ours="results.json")
        return combined.write(folders, out, title)
    if len(folders) > 1:
        raise ValueError("report: --out: missing; the report of several runs needs a folder of its own")
    from ctrl_hpc.config import load
    from ctrl_hpc.report import page

    folder = Path(folders[0])
    if not (folder / "config.yaml").is_file():
        raise ValueError(f"{folder}: is not a run directory (it holds no config.yaml)")
    return page.write(load(folder / "config.yaml"), folder)
