"""The command line: ``ctrl-hpc run CONFIG.yaml [a.b.c=value ...]`` and a sub-command for each stage and service.

Exit codes: 0 done, 2 the user's input is wrong (one line says what, where and what is allowed), 1 anything else.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctrl_hpc.commands import bench, calibrate, config, data, init, prompts, report, sbatch, serve, status, track
from ctrl_hpc.commands.output import place
from ctrl_hpc.commands.parser import Parser, add_file, add_help, add_overrides, complete, name_leaves, version
from ctrl_hpc.config.stages import STAGES

if TYPE_CHECKING:
    from ctrl_hpc.config import Config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    # spinning threads of several processes on few cores slow each other down thirty-fold
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    options = _parse(arguments)
    options.is_program = arguments is None
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except (ValueError, RuntimeError, OSError) as error:
        if os.environ.get("CTRL_HPC_TRACEBACK"):
            raise
        print(f"ctrl-hpc: {error if isinstance(error, (ValueError, RuntimeError)) else _told(error)}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        print("ctrl-hpc: stopped; the same command continues where it stopped", file=sys.stderr)
        return 1


def _told(error: OSError) -> str:
    """What the system refuses, in one line."""
    from ctrl_hpc.run import disk

    if error.errno in disk.FULL:
        return f"{error}; make space: the same command continues where it stopped"
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error} (CTRL_HPC_TRACEBACK=1 shows where)"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options and overrides may come in any order, which argparse's sub-commands do not allow by themselves."""
    parser = _parser()
    complete(parser)
    given = sys.argv[1:] if arguments is None else arguments
    options, rest = parser.parse_known_args(given or ["help"])
    if hasattr(options, "sbatch_options"):
        options.sbatch_options = [text for text in rest if text.startswith("--") and "=" in text]
        rest = [text for text in rest if text not in options.sbatch_options]
    wrong = [text for text in rest if text.startswith("-") or "=" not in text or not hasattr(options, "overrides")]
    if wrong:
        options.parser.refuse(wrong)
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def _parser() -> Parser:
    parser = Parser(
        prog="ctrl-hpc",
        description="Train code critics with reinforcement learning (CTRL).",
        epilog="ctrl-hpc help COMMAND tells more; the whole pipeline in miniature: ctrl-hpc run tiny",
    )
    parser.add_argument("--version", action=_Version)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    init.add(commands.add_parser("init", help="a configuration for your model, your problems, your machines"))
    run = commands.add_parser("run", help="all stages of a configuration; what is done is skipped")
    _configured(run, _run)
    run.add_argument("--dry-run", action="store_true", help="print the configuration and the plan: memory, times, jobs")
    run.add_argument(
        "--redo", choices=list(STAGES), help="do this stage and those after it anew; what they had made is kept"
    )
    for name, stage in STAGES.items():
        if name != "report":
            one = commands.add_parser(name, help=stage.about)
            _configured(one, _stage(name))
            one.add_argument(
                "--redo", action="store_true", help="put its records, and those of later stages, aside first"
            )
    report.add(commands.add_parser("report", help=STAGES["report"].about), _stage("report"))
    sbatch.add(commands.add_parser("sbatch", help="run as a Slurm job: the driver, too, which submits the others"))
    suite = commands.add_parser("suite", help="many runs one after the other, then one report of all")
    add_file(suite, "suite", "SUITE", folder="suite")
    add_overrides(suite, help="for every run, after the suite's own")
    suite.add_argument("--only", action="append", default=[], metavar="NAME", help="run this variant (again: more)")
    suite.add_argument("--dry-run", action="store_true", help="check every configuration and list the runs")
    suite.set_defaults(command=_suite)
    data.add(commands.add_parser("data", help="a data set's problems as JSONL, counted and decontaminated"))
    config.add(commands.add_parser("config", help="what a key means and allows; where the values of a file come from"))
    prompts.add(commands.add_parser("prompts", help="templates of prompts from a checkout of the paper's code"))
    serve.add(commands.add_parser("serve", help="one service by hand: an executor, a rollout server, a judge"))
    calibrate.add(commands.add_parser("calibrate", help="make a judge's probabilities those of a development set"))
    status.add(commands)
    track.add(commands)
    _sweep_parsers(commands)
    sync = commands.add_parser("sync", help="send to the wandb server what it lacks of a run")
    sync.add_argument("run_dir", metavar="RUN", help="run directory")
    sync.add_argument("--again", action="store_true", help="ask of what was sent before, too")
    sync.set_defaults(command=_sync)
    doctor = commands.add_parser("doctor", help="what this machine can do for ctrl-hpc, each gap with its fix")
    doctor.add_argument("run_dir", nargs="?", default="runs", help="where runs are kept (default: runs)")
    doctor.set_defaults(command=_doctor)
    _convert_parsers(
        commands.add_parser("convert", help="weights between Hugging Face folders and Megatron checkpoints")
    )
    bench.add(commands.add_parser("bench", help="measure: executor, trainer"))
    add_help(commands, parser)
    name_leaves(parser)
    return parser


class _Version(argparse.Action):
    """``--version``: which code this is."""

    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, help="version, code and place of this program")

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(version())
        parser.exit()


def _configured(parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], int]) -> None:
    add_file(parser, "config", "CONFIG")
    add_overrides(parser)
    parser.set_defaults(command=command)


def _sweep_parsers(commands: Any) -> None:
    sweep = commands.add_parser("sweep", help="trials over configuration keys, here or on a wandb server")
    add_file(sweep, "file", "SWEEP", folder="sweep")
    add_overrides(sweep, help="for every trial")
    sweep.add_argument("--local", action="store_true", help="grid or random search here, without a server")
    sweep.add_argument("--count", type=int, default=None, help="trials (default: the whole grid)")
    sweep.add_argument("--seed", type=int, default=0, help="of a random search")
    sweep.set_defaults(command=_sweep)
    agent = commands.add_parser("trial", help="one trial, as wandb's agent starts it")
    agent.add_argument("config", nargs="?", metavar="CONFIG.yaml")
    add_overrides(agent)
    agent.add_argument("--again", action="store_true", help="continue the trial that CTRL_HPC_TRIAL names")
    agent.set_defaults(command=_trial)


def _convert_parsers(parser: argparse.ArgumentParser) -> None:
    directions = parser.add_subparsers(metavar="DIRECTION", required=True)
    for direction, text in (
        ("hf-to-megatron", "a Hugging Face folder to a Megatron checkpoint"),
        ("megatron-to-hf", "a Megatron checkpoint, a trainer's too, to a Hugging Face folder"),
    ):
        one = directions.add_parser(direction, help=text)
        one.add_argument("source", metavar="SRC", type=place)
        one.add_argument("target", metavar="DST", type=place, help="must not exist")
        one.add_argument("--tp", type=int, default=1, help="tensor-parallel processes (default: 1)")
        one.add_argument("--pp", type=int, default=1, help="pipeline-parallel processes (default: 1)")
        one.set_defaults(command=_convert, direction=direction)


def _run(options: argparse.Namespace) -> int:
    from ctrl_hpc.config import dump, load

    config = load(options.config, options.overrides)
    if options.dry_run and options.redo:
        raise ValueError("--redo: changes the run directory, which --dry-run does not")
    if options.redo:
        return _redo(config, options)
    if options.dry_run:
        lacking = _lacking(config)
        print(dump(config), end="")
        _print_scripts(config)
        _plan(config)
        print("".join(f"# missing here: {text}\n" for text in lacking), end="")
        return 0
    _begin(config, "run", options)
    from ctrl_hpc import pipeline
    from ctrl_hpc.run import directory

    before = directory.is_done(Path(config.run_dir or ""), "report")  # else the stage itself says where it is
    with _logged(config, options):
        folder = pipeline.run(config)
    if before:
        print(f"report: {folder / 'report' / 'index.html'}")
    return 0


def _redo(config: Config, options: argparse.Namespace) -> int:
    """The run again, from a stage on; its folder is as it was when nothing can be started."""
    from ctrl_hpc import preflight
    from ctrl_hpc.pipeline import redo
    from ctrl_hpc.run import directory

    moves = redo(config, options.redo)
    try:
        preflight.check(config)
    except BaseException:
        directory.put_back(moves)
        raise
    options.redo = None
    return _run(options)


def _print_scripts(config: Config) -> None:
    """What would be submitted to Slurm, as comments, so that the output stays a configuration."""
    if config.launch.engine == "slurm":
        from ctrl_hpc.cluster.jobs import scripts

        for role, text in scripts(config).items():
            print("\n".join([f"# batch script of {role}:", *(f"#   {line}" for line in text.splitlines())]))


def _lacking(config: Config) -> list[str]:
    """What this machine lacks for a run. Raises ValueError for what is wrong anywhere."""
    from ctrl_hpc import preflight

    lacking = []
    for finding in preflight.findings(config):
        if not finding.here:
            raise ValueError(finding.text)
        lacking.append(finding.text)
    return lacking


def _plan(config: Config) -> None:
    """Print the plan as comments, so that the output stays a configuration. Raises ValueError when it does not fit."""
    _plan_benchmarks(config)
    if not {"sft", "rl"} & set(config.stages):
        print("# plan: no stage of this configuration trains")
        return
    from ctrl_hpc.plan.plan import plan

    found = plan(config)
    print("# plan:")
    for line in found.lines():
        print(f"#   {line}")
    if found.fits is False:
        raise ValueError(f"does not fit: {found.verdict()}")


def _plan_benchmarks(config: Config) -> None:
    """What the critics are asked in benchmarks of critics."""
    asked = config.eval.critic_benchmarks
    if "eval" not in config.stages or not asked.sources:
        return
    from ctrl_hpc.data import critic_benchmarks
    from ctrl_hpc.plan import costs
    from ctrl_hpc.plan.plan import trainer_device
    from ctrl_hpc.plan.rates import rates

    sizes = {}
    for source, path in asked.sources.items():
        name, split = asked.parts(source)
        sizes[source] = critic_benchmarks.size(name, path or None, split, asked.n_questions)
    for line in costs.critic_benchmarks(config, sizes, rates(config, trainer_device(config))):
        print(f"# {line}")


def _stage(name: str) -> Callable[[argparse.Namespace], int]:
    def command(options: argparse.Namespace) -> int:
        from ctrl_hpc.config import load

        config = load(options.config, options.overrides)
        if options.redo:
            from ctrl_hpc.pipeline import redo

            redo(config, name)
        _begin(config, name, options)
        from ctrl_hpc import pipeline

        with _logged(config, options):
            pipeline.run(config, stages=(name,))
        return 0

    return command


def _logged(config: Config, options: argparse.Namespace) -> AbstractContextManager[None]:
    """Where this is a program of its own: what it prints is kept in the run's folder, too."""
    if not options.is_program:
        return nullcontext()
    from ctrl_hpc.run import driver_log

    return driver_log.kept(config.run_dir or "")


def _begin(config: Config, command: str, options: argparse.Namespace) -> None:
    """The check before anything starts; what a program of its own imports later is the code as it is now (or was)."""
    from ctrl_hpc import preflight
    from ctrl_hpc.run import snapshot

    if options.is_program and config.launch.snapshot == "keep":
        snapshot.continue_kept(config, command, options.overrides)
    preflight.check(config, None if command == "run" else (command,))
    if options.is_program:
        copy = snapshot.take(config.run_dir or "", config.launch.snapshot)
        if copy is not None and snapshot.own(config.run_dir or "") is None:
            snapshot.import_from(copy)


def _suite(options: argparse.Namespace) -> int:
    from ctrl_hpc.experiments import suite

    if options.dry_run:
        from rich.console import Console

        from ctrl_hpc.commands.status import fold

        read = suite.read(options.suite)
        members = suite.members(read, options.suite, options.overrides)
        Console().print(fold(suite.plan_table(read, members)))
        for told in suite.check(members, dry=True):
            print(f"missing here: {told}")
        return 0
    suite.run(options.suite, options.overrides, options.only)
    return 0


def _sweep(options: argparse.Namespace) -> int:
    from ctrl_hpc.config.load import find
    from ctrl_hpc.experiments import sweep

    if options.local:
        print(f"trials: {sweep.run_here(options.file, options.overrides, count=options.count, seed=options.seed)}")
        return 0
    sweep.read(options.file)
    file = str(find(options.file, "sweep"))
    return subprocess.run([sys.executable, "-m", "wandb", "sweep", file], check=False).returncode


def _trial(options: argparse.Namespace) -> int:
    from ctrl_hpc.experiments import agent

    try:
        print(f"trial: {agent.run(options.config, options.overrides, options.again)}")
    except KeyboardInterrupt:
        agent.end_by_signal()
    return 0


def _sync(options: argparse.Namespace) -> int:
    from ctrl_hpc.tracking.sync import sync

    print(f"{sync(options.run_dir, again=options.again)} sent")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from ctrl_hpc.cluster.doctor import checks

    found = checks(options.run_dir)
    table = Table("check", "state", "found", "fix")
    for column in table.columns:
        column.overflow = "fold"
    for check in found:
        table.add_row(check.name, check.state, check.found, check.fix)
    Console().print(table)
    return 1 if any(check.state == "missing" for check in found) else 0


def _convert(options: argparse.Namespace) -> int:
    from ctrl_hpc.megatron import convert

    convert.launch(options.direction, options.source, options.target, options.tp, options.pp)
    print(options.target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
