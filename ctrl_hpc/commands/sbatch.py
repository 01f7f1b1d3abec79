"""``ctrl-hpc sbatch``: a run whose driver is a Slurm job, from a checkout or an installed package."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from ctrl_hpc.commands.parser import add_file, add_overrides

if TYPE_CHECKING:
    from ctrl_hpc.config import Config


def add(parser: argparse.ArgumentParser) -> None:
    """The command's arguments; options of the form ``--name=value`` are sbatch's."""
    parser.description = (
        "Options of the form --name=value, such as --partition=cpu, are sbatch's, for the driver's job."
    )
    add_file(parser, "config", "CONFIG")
    add_overrides(parser)
    parser.set_defaults(command=run, sbatch_options=[])


def run(options: argparse.Namespace) -> int:
    """Check, submit, and say where the driver's log is."""
    from ctrl_hpc import preflight
    from ctrl_hpc.config import load

    overrides = list(options.overrides)
    config = load(options.config, overrides)
    if config.cluster == "local" and not any(text.startswith("cluster=") for text in overrides):
        overrides.append("cluster=slurm")
        config = load(options.config, overrides)
    if shutil.which("sbatch") is None:
        raise ValueError("sbatch: there is no such command here; submit from a login node (or `ctrl-hpc run` here)")
    folder = preflight.check(config)
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    words = command(config, options.config, overrides, options.sbatch_options)
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | environment())
    if done.returncode != 0:
        raise ValueError(f"sbatch refuses the driver's job: {' '.join(done.stderr.split())}")
    print(f"job {done.stdout.strip()}: {folder}; its log: {folder / 'logs' / 'driver.log'}")
    return 0


def command(config: Config, file: str, overrides: list[str], own: list[str]) -> list[str]:
    """The call of sbatch; account and QoS are the profile's, unless ``own``, which come last, say otherwise."""
    from ctrl_hpc.config import SHARE
    from ctrl_hpc.config.load import find

    launch = config.launch
    told = {"account": launch.account, "qos": launch.qos, "job-name": f"driver-{config.name}"}
    told["output"] = str(Path(config.run_dir or "") / "logs" / "driver.log")
    told_words = [f"--{name}={value}" for name, value in told.items() if value]
    if not any(text.startswith("cluster=") for text in overrides):  # else the script's own default would win
        overrides = [*overrides, f"cluster={config.cluster}"]
    script = [str(SHARE / "slurm" / "run.sbatch"), str(find(file).resolve()), *overrides]
    return ["sbatch", "--parsable", *told_words, *own, *script]


def environment() -> Mapping[str, str]:
    """Where the script finds this program, and the guard."""
    from ctrl_hpc.config import SHARE

    own = Path(sys.executable).with_name("ctrl-hpc")
    program = os.environ.get("CTRL_HPC_PROGRAM") or (str(own) if own.exists() else "ctrl-hpc")
    return {"CTRL_HPC_SLURM": str(SHARE / "slurm"), "CTRL_HPC_PROGRAM": program}
