"""The command line: ``ctrl-hpc run CONFIG.yaml [a.b.c=value ...]`` and a sub-command for each stage and service.

Exit codes: 0 done, 2 the user's input is wrong (one line says what, where and what is allowed), 1 anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctrl_hpc.commands import bench, config, data, init, report, sbatch
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
    except ValueError as error:
        if os.environ.get("CTRL_HPC_TRACEBACK"):
            raise
        print(f"ctrl-hpc: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if os.environ.get("CTRL_HPC_TRACEBACK"):
            raise
        print(f"ctrl-hpc: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        from ctrl_hpc.run import disk

        if os.environ.get("CTRL_HPC_TRACEBACK"):
            raise
        if error.errno not in disk.FULL:
            place = f"{error.filename}: " if error.filename else ""
            print(f"ctrl-hpc: {place}{error.strerror or error} (CTRL_HPC_TRACEBACK=1 shows where)", file=sys.stderr)
            return 1
        print(f"ctrl-hpc: {error}; make space: the same command continues where it stopped", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ctrl-hpc: stopped; the same command continues where it stopped", file=sys.stderr)
        return 1


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
    _serve_parsers(commands.add_parser("serve", help="one service by hand: an executor or a rollout server"))
    _run_parsers(commands)
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


def _run_parsers(commands: Any) -> None:
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
            about.add_argument("--lines", type=int, default=40, help="last lines of each log (default: 40)")
        if name == "status":
            about.add_argument("--json", action="store_true", help="as JSON, for programs")
            about.add_argument("--watch", action="store_true", help="again every two seconds, until Ctrl-C")


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


def _pair(text: str) -> tuple[str, str]:
    name, sign, place = text.partition("=")
    if not sign:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=FILE.py:FUNCTION")
    return name, place


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not allowed; it must be greater than 0")
    return number


_positive.__name__ = "int"  # argparse names the type of what is no number by it


def _serve_parsers(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(metavar="KIND", required=True)
    executor = kinds.add_parser("executor", help="SandboxFusion's routes over nsjail workers")
    executor.add_argument("--workers", type=_positive, default=2, help="jails; about one a core")
    executor.add_argument("--cache", type=place, default=None, help="folder of the verdict cache (default: none)")
    executor.add_argument(
        "--max-waiting", type=_positive, default=1024, help="executions that may wait (default: 1024)"
    )
    executor.add_argument("--max-body-mb", type=_positive, default=256, help="largest request (default: 256)")
    executor.add_argument(
        "--judge", action="append", default=[], type=_pair, metavar="NAME=FILE.py:FUNCTION", help="special judge"
    )
    executor.add_argument("--python", default="", help="interpreter that programs run with (default: this one)")
    executor.add_argument("--testlib", default="", metavar="FILE", help="testlib.h, for problems with a checker")
    executor.add_argument("--packages", default="numpy", help="its packages that programs may import (default: numpy)")
    executor.set_defaults(command=_serve_executor)
    rollout = kinds.add_parser("rollout", help="SGLang's and OpenAI's routes over a Hugging Face model")
    rollout.add_argument("--model", required=True, help="Hugging Face folder")
    rollout.add_argument("--threads", type=_positive, default=2, help="CPU threads")
    rollout.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: cuda if there is one")
    rollout.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: the weights' own where it pays"
    )
    rollout.add_argument("--batching", choices=["auto", "padded", "continuous"], default="auto")
    rollout.add_argument(
        "--max-batch-tokens", type=_positive, default=65536, help="largest padded batch (default: 65536)"
    )
    rollout.set_defaults(command=_serve_rollout)
    for kind in (executor, rollout):
        kind.add_argument("--host", default="127.0.0.1", help="address to listen on (default: loopback)")
        kind.add_argument("--token-env", default=None, help="environment variable with the bearer token to ask for")
        kind.add_argument("--port", type=int, required=True, help="port; 0: any free one")


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


def _serve_executor(options: argparse.Namespace) -> int:
    from ctrl_hpc.sandbox.server import serve

    with _token(options) as access:
        serve(
            host=options.host,
            port=options.port,
            workers=options.workers,
            cache_dir=options.cache,
            **access,
            judges=dict(options.judge),
            python=options.python,
            packages=[name for name in options.packages.split(",") if name],
            testlib=options.testlib,
            max_waiting=options.max_waiting,
            max_body_bytes=options.max_body_mb << 20,
        )
    return 0


def _serve_rollout(options: argparse.Namespace) -> int:
    from ctrl_hpc.config.machine import resolve_device
    from ctrl_hpc.rollout.server import serve

    with _token(options) as access:
        serve(
            options.model,
            host=options.host,
            port=options.port,
            threads=options.threads,
            device=resolve_device("--device", options.device),
            dtype=options.dtype,
            batching=options.batching,
            max_batch_tokens=options.max_batch_tokens,
            **access,
        )
    return 0


@contextlib.contextmanager
def _token(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Who may ask: whoever has the token in the variable named, or, on loopback, in a file that is made for it.

    That file is named once the service answers, so that a wrong argument is told in one line.
    """
    from ctrl_hpc.service import http

    variable = options.token_env
    if variable:
        token = os.environ.get(variable)
        if not token:
            raise ValueError(f"--token-env: the environment variable {variable} is not set")
        yield {"token": token, "on_ready": _say}
        return
    http.access(options.host, None)
    with tempfile.TemporaryDirectory(prefix="ctrl-hpc-serve-") as folder:
        file = Path(folder) / "token"

        def ready(url: str) -> None:
            print(f"this user's programs may ask; others need the bearer token in {file}", file=sys.stderr, flush=True)
            _say(url)

        yield {"token": http.token_in(file), "own_user": True, "on_ready": ready}


def _status(options: argparse.Namespace) -> int:
    from ctrl_hpc.cluster.status import status
    from ctrl_hpc.commands.status import show

    if options.json:
        print(json.dumps(status(options.run_dir), indent=1))
        return 0
    show(status(options.run_dir))
    while options.watch:
        time.sleep(2.0)
        show(status(options.run_dir), clear=True)
    return 0


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


def _say(url: str) -> None:
    print(f"listening on {url}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
