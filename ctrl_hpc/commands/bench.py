"""``ctrl-hpc bench``: measurements of this machine, which the plan's figures can be held against."""

from __future__ import annotations

import argparse
import runpy
import sys

from ctrl_hpc.commands import bench_critic, bench_rates
from ctrl_hpc.commands.output import check_file, place


def add(parser: argparse.ArgumentParser) -> None:
    """A sub-command for each thing that is measured."""
    kinds = parser.add_subparsers(metavar="WHAT", required=True)
    executor = kinds.add_parser("executor", help="speed of the executor against bare Python (bench/executor.py)")
    executor.add_argument("--seconds", type=float, default=10.0, help="seconds a row (default: 10)")
    executor.add_argument("--workers", type=int, default=2)
    executor.add_argument("--beside", metavar="URL", help="another server of SandboxFusion's routes, measured too")
    executor.set_defaults(command=_bench_executor)
    trainer = kinds.add_parser("trainer", help="memory beside the plan's estimate, tokens/s, MFU; random weights")
    trainer.add_argument("--model", default="200M", help="200M, a known model's name or a folder (default: 200M)")
    trainer.add_argument("--tokens", type=int, default=1024, help="of a micro-batch (default: 1024)")
    trainer.add_argument("--micro-batches", type=int, default=1, help="a step (default: 1)")
    trainer.add_argument("--steps", type=int, default=1, help="steps timed; 0: memory alone (default: 1)")
    trainer.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    trainer.add_argument("--recompute", choices=["none", "selective", "full"], default="none")
    trainer.add_argument("--peak-tflops", type=float, default=None, help="the device's bf16 peak, for MFU")
    group = "RL's update on RESPONSES of TOKENS that share a PROMPT, computed once and for each, as 400 8 100"
    trainer.add_argument("--group", type=int, nargs=3, metavar=("PROMPT", "RESPONSES", "TOKENS"), help=group)
    trainer.add_argument("--out", type=place, default=None, help="file for the numbers, as JSON")
    trainer.set_defaults(command=_bench_trainer)
    bench_rates.add(kinds.add_parser("rates", help="what this site's machines do in a second, for the plan"))
    bench_critic.add(
        kinds.add_parser("critic", help="a critic on benchmarks of critics: accuracy, calibration, best of n")
    )


def _bench_executor(options: argparse.Namespace) -> int:
    from ctrl_hpc.config import SHARE

    script = SHARE / "bench" / "executor.py"
    beside = ["--beside", options.beside] if options.beside else []
    sys.argv = [str(script), "--seconds", str(options.seconds), "--workers", str(options.workers), *beside]
    runpy.run_path(str(script), run_name="__main__")
    return 0


def _bench_trainer(options: argparse.Namespace) -> int:
    from dataclasses import fields

    from ctrl_hpc.train.measure import Options, bench

    if options.out is not None:
        check_file(options.out, "--out")
    bench(Options(**{field.name: getattr(options, field.name) for field in fields(Options)}), options.out)
    return 0
