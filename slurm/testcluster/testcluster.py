"""A real one-host Slurm for tests: slurmctld, slurmdbd over a private MariaDB, munge, and a slurmd for each fake node.

Everything lies in one folder, listens on the loopback interface or on sockets in that folder (slurmdbd alone knows no
such setting; munge guards it), and ends without a trace. Needs root and Debian's packages slurmctld slurmd slurm-client
slurmdbd mariadb-server munge, and of Python only the standard library.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import cgroups
import daemons
import processes
import settings as configuration
from settings import Settings


def main() -> int:
    """Run a command; exit code 0 done, 2 the situation is wrong, 1 anything else."""
    options = _parse()
    try:
        if os.geteuid() != 0:
            raise ValueError("needs root (slurmd starts jobs and tracks their processes); try sudo")
        options.command(options)
    except ValueError as error:
        print(f"testcluster: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"testcluster: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("testcluster: interrupted", file=sys.stderr)
        return 1
    return 0


def _parse() -> argparse.Namespace:
    base = argparse.ArgumentParser(add_help=False)
    text = "folder of the cluster; several clusters side by side need a folder each (default: %(default)s)"
    base.add_argument("--base", type=Path, metavar="DIR", default=Path("/tmp/ctrl-hpc-testcluster"), help=text)
    parser = argparse.ArgumentParser(prog="testcluster", description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="{up,down,node}")
    start = commands.add_parser("up", parents=[base], help="start it")
    start.add_argument("--nodes", type=_positive, metavar="N", help="fake nodes (default: 4); the last half has GPUs")
    start.add_argument("--cpus", type=_positive, metavar="N", help="CPUs that a node claims to have (default: 16)")
    start.add_argument("--gpus", type=_natural, metavar="N", help="fake GPUs of a GPU node (default: 8)")
    start.add_argument("--port", type=_positive, metavar="P", help="first of N + 2 ports (default: free ones)")
    start.set_defaults(command=up)
    stop = commands.add_parser("down", parents=[base], help="end it and all of its jobs")
    stop.set_defaults(command=down)
    fault = commands.add_parser("node", parents=[base], help="stop, lose or start a node")
    fault.add_argument("what", choices=["stop", "lose", "start"], help="end slurmd, end it and its jobs, start slurmd")
    fault.add_argument("name", metavar="NODE")
    fault.set_defaults(command=node)
    options = parser.parse_args()
    options.base = options.base.absolute()
    return options


def _natural(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; a whole number")
    return int(text)


def _positive(text: str) -> int:
    if _natural(text) == 0:
        raise argparse.ArgumentTypeError("0 is not allowed; at least 1")
    return int(text)


def up(options: argparse.Namespace) -> None:
    """Start the cluster, unless it is up."""
    begin = time.monotonic()
    base = options.base
    there = configuration.read(base)
    if there is not None and _is_up(there, options):
        _say(f"{base} is up: {_describe(there)}")
        print(f"SLURM_CONF={there.conf}")
        return
    if there is not None:
        _say(f"{base}: what is left of an earlier cluster is removed")
        _remove(there)
    settings = _new(options)
    _say(f"{base}: {_describe(settings)}")
    if settings.proctrack == "linuxproc":
        _say("no writable cgroup v1: Slurm tracks jobs by parent process, and a daemonised child may outlive its job")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        configuration.write(settings)
        daemons.start_all(settings, _say)
    except BaseException:
        _remove(settings)
        raise
    _say(f"up after {time.monotonic() - begin:.1f} s; slurm/testcluster/down --base {base} ends it")
    print(f"SLURM_CONF={settings.conf}")


def down(options: argparse.Namespace) -> None:
    """End the cluster's daemons and jobs and remove its files and cgroups."""
    settings = configuration.read(options.base)
    if settings is None:
        _say(f"{options.base}: no test cluster there, nothing to do")
        return
    _remove(settings)
    _say(f"{options.base} is down")


def node(options: argparse.Namespace) -> None:
    """A fault of a node, or its end."""
    settings = configuration.read(options.base)
    if settings is None:
        raise ValueError(f"{options.base}: no test cluster there; slurm/testcluster/up starts one")
    if options.name not in settings.node_names:
        raise ValueError(f"{options.name!r} is not a node; allowed: {', '.join(settings.node_names)}")
    running = processes.daemons(settings).get(options.name)
    if options.what == "start":
        if running is None:
            daemons.start_node(settings, options.name)
        daemons.wait_for_nodes(settings, [options.name])
    elif options.what == "stop":
        processes.kill([running] if running else [])
    else:
        processes.end(lambda: processes.of_nodes(settings, [options.name]), grace_s=0.0)
    _say(f"{options.name}: {options.what} done")


def _is_up(settings: Settings, options: argparse.Namespace) -> bool:
    """Whether all daemons run. Raises ValueError when they do with other numbers than asked for, or are about to."""
    if processes.is_command(settings.starter, "testcluster.py", "up"):
        raise ValueError(f"{options.base}: process {settings.starter} is starting it; wait, or choose another --base")
    running = processes.daemons(settings)
    expected = {"munged", "mariadbd", "slurmdbd", "slurmctld", *settings.node_names}
    if expected - set(running):
        return False
    for name in ("nodes", "cpus", "gpus", "port"):
        asked, has = getattr(options, name), getattr(settings, name)
        if asked not in (None, has):
            raise ValueError(f"--{name} {asked}: {options.base} is up with {has}; slurm/testcluster/down ends it first")
    return True


def _new(options: argparse.Namespace) -> Settings:
    """Check the options, choose what they leave open, make the folder."""
    configuration.programs()
    base = options.base
    if len(str(base)) > configuration.LONGEST_BASE:
        raise ValueError(f"--base {base}: longer than {configuration.LONGEST_BASE} characters; sockets lie under it")
    if any(letter in str(base) for letter in " ,;[]%#='\""):
        raise ValueError(f"--base {base}: Slurm's configuration files cannot hold such a path; plain letters please")
    nodes = options.nodes or 4
    settings = Settings(
        base=str(base),
        nodes=nodes,
        cpus=options.cpus or 16,
        gpus=8 if options.gpus is None else options.gpus,
        port=configuration.free_ports(nodes + 2, options.port),
        proctrack=cgroups.tracking(),
        starter=os.getpid(),
    )
    if base.exists() and (not base.is_dir() or any(base.iterdir())):
        raise ValueError(f"--base {base}: not empty and not a test cluster's; choose another folder")
    base.mkdir(parents=True, exist_ok=True)
    settings.save()
    return settings


def _remove(settings: Settings) -> None:
    # the daemons keep nothing that outlives the folder; jobs are asked to end first
    processes.kill(processes.daemons(settings).values())
    processes.end(lambda: processes.of_cluster(settings))
    cgroups.remove(settings.node_names)
    shutil.rmtree(settings.base)


def _describe(settings: Settings) -> str:
    names = f"{settings.prefix}[1-{settings.nodes}]" if settings.nodes > 1 else settings.node_names[0]
    gpus = f"{settings.gpus} GPUs on the last {len(settings.gpu_node_names)}" if settings.gpus else "no GPUs"
    return f"{settings.nodes} nodes {names} of {settings.cpus} CPUs, {gpus}"


def _say(text: str) -> None:
    print(f"testcluster: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
