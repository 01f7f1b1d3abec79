"""Starting the daemons of a test cluster, in order, each as soon as the one before it answers."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from processes import MARK
from settings import PATH, Settings, programs

START_TIMEOUT_S = 120.0
"""Longest wait for a daemon; they take a second each on an idle machine."""


def start_all(settings: Settings, say: Callable[[str], None]) -> None:
    """Start everything and return when all nodes are idle.

    Raises RuntimeError with the end of its log when a daemon does not come up.
    """
    base, found = settings.folder, programs()
    munge = base / "munge"
    keys = [f"--key-file={munge}/key", f"--socket={munge}/socket", f"--seed-file={munge}/seed"]
    where = [f"--pid-file={base}/run/munged.pid", f"--log-file={base}/log/munged.log"]
    _start(settings, "munged", [found["munged"], "--foreground", "--force", *keys, *where])
    _make_database(settings)
    options = {
        "datadir": f"{base}/db",
        "tmpdir": f"{base}/tmp",
        "socket": f"{base}/run/mariadb.socket",
        "pid-file": f"{base}/run/mariadbd.pid",
        "user": "root",
        # the data need not outlive this host
        "innodb-flush-log-at-trx-commit": "0",
        "innodb-flush-method": "nosync",
        "innodb-doublewrite": "0",
        "innodb-buffer-pool-size": "32M",
        "innodb-lock-wait-timeout": "900",
    }
    flags = [
        "--no-defaults",
        "--skip-networking",
        "--skip-log-bin",
        *(f"--{key}={text}" for key, text in options.items()),
    ]
    _start(settings, "mariadbd", [found["mariadbd"], *flags])
    _wait(settings, "munged", lambda: _answers(f"{munge}/socket"))
    _wait(settings, "mariadbd", lambda: _answers(f"{base}/run/mariadb.socket"))
    say("munged and a private mariadbd are up")
    _start(settings, "slurmdbd", [found["slurmdbd"], "-D"])
    _wait(settings, "slurmdbd", lambda: _answers(("127.0.0.1", settings.port + 1)))
    _register(settings)
    _start(settings, "slurmctld", [found["slurmctld"], "-D", "-f", str(settings.conf)])
    for node in settings.node_names:
        start_node(settings, node)
    _wait(settings, "slurmctld", lambda: _answers(("127.0.0.1", settings.port)))
    wait_for_nodes(settings, settings.node_names)


def start_node(settings: Settings, node: str) -> None:
    """Start the slurmd of a node."""
    _start(settings, node, [programs()["slurmd"], "-D", "-N", node, "-f", str(settings.conf)])


def wait_for_nodes(settings: Settings, nodes: list[str]) -> None:
    """Return when Slurm can use the nodes."""

    def usable() -> bool:
        command = [programs()["sinfo"], "-h", "-N", "-n", ",".join(nodes), "-o", "%N %t"]
        out = subprocess.run(command, env=environment(settings), capture_output=True, text=True).stdout
        states = dict(line.split() for line in out.splitlines())
        return all(states.get(node) in {"idle", "mix", "alloc", "comp"} for node in nodes)

    for node in nodes:
        address = ("127.0.0.1", settings.slurmd_ports[node])
        _wait(settings, node, lambda address=address: _answers(address))
    _wait(settings, nodes[0], usable)


def environment(settings: Settings) -> dict[str, str]:
    """The environment of the daemons: nothing of the shell, or of a job, that ``up`` is called from."""
    return {
        "PATH": PATH,
        "LANG": "C.UTF-8",
        "HOME": "/root",
        "SLURM_CONF": str(settings.conf),
        "MYSQL_UNIX_PORT": f"{settings.base}/run/mariadb.socket",
        MARK: settings.base,
    }


def _register(settings: Settings) -> None:
    """Make the cluster known to the accounting, without which slurmctld does not start, an account and a QOS to use."""
    lines = [
        f"add cluster testcluster{settings.port}",
        "add qos urgent priority=100",
        "add account research qos=normal,urgent",
        "add user root account=research",
    ]
    command = [programs()["sacctmgr"], "--immediate", "--quiet"]
    done = subprocess.run(
        command, env=environment(settings), input="\n".join(lines) + "\n", capture_output=True, text=True
    )
    if done.returncode or "error:" in done.stderr:
        raise RuntimeError(f"sacctmgr failed: {' '.join(done.stderr.split())}")


def _make_database(settings: Settings) -> None:
    command = [
        programs()["mariadb-install-db"],
        "--no-defaults",
        "--user=root",
        f"--datadir={settings.base}/db",
        f"--tmpdir={settings.base}/tmp",
        "--auth-root-authentication-method=socket",
        "--skip-name-resolve",
        "--skip-test-db",
        "--innodb-flush-method=nosync",
        "--innodb-log-file-size=8M",
    ]
    with open(settings.folder / "log" / "mariadb-install-db.log", "wb") as log:
        if subprocess.run(command, env=environment(settings), stdout=log, stderr=log).returncode:
            raise RuntimeError(f"mariadb-install-db failed: {_last_line(Path(log.name))}")


def _start(settings: Settings, name: str, command: list[str]) -> None:
    """Start a daemon in a session of its own; what it prints goes to ``log/NAME.out``."""
    with open(settings.folder / "log" / f"{name}.out", "ab") as out:
        daemon = subprocess.Popen(
            command,
            cwd=settings.base,
            env=environment(settings),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    (settings.folder / "run" / f"{name}.daemon").write_text(f"{daemon.pid}\n")
    _children[name] = daemon


_children: dict[str, subprocess.Popen[bytes]] = {}
"""Daemons that this process started: a parent learns at once, and for sure, that one has died."""


def _wait(settings: Settings, name: str, ready: Callable[[], bool]) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while not ready():
        code = _children[name].poll() if name in _children else None
        if code is not None or time.monotonic() > end:
            what = f"ended with exit code {code}" if code is not None else f"is not up after {START_TIMEOUT_S:.0f} s"
            logs = [settings.folder / "log" / f"{name}.{kind}" for kind in ("log", "out")]
            last = next(filter(None, map(_last_line, logs)), "it printed nothing")
            raise RuntimeError(f"{name} {what}: {last}")
        time.sleep(0.05)


def _last_line(log: Path) -> str:
    """The last line, or better the last fatal one: it may be followed by details."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    fatal = [line for line in lines if "fatal" in line]
    return (fatal or lines or [""])[-1]


def _answers(address: str | tuple[str, int]) -> bool:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(address)
        except OSError:
            return False
    return True
