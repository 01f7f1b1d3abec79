"""Running our code as an ordinary user from a test that runs as root."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from ctrl_hpc.sandbox import rootfs

UID = 54321
_REPOSITORY = Path(__file__).resolve().parents[2]


def run(code: str, *arguments: str, timeout_s: float = 900) -> str:
    """The output of Python code run as an ordinary user who sees this checkout and its installed packages.

    Root's interpreter may lie where others cannot read, so the jail root's copy of it is used. The user gets an empty
    home, which is the temporary folder too.
    """
    with tempfile.TemporaryDirectory(prefix="ctrl-hpc-user-") as home:
        os.chown(home, UID, UID)
        return _run(code, arguments, home, timeout_s)


def _run(code: str, arguments: tuple[str, ...], home: str, timeout_s: float) -> str:
    root = rootfs.ensure()
    command = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--"]
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": home,
        "TMPDIR": home,
        "LD_LIBRARY_PATH": str(root / "lib"),
        "PYTHONPATH": os.pathsep.join(map(str, [_REPOSITORY, Path(__file__).parent, sysconfig.get_path("purelib")])),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    done = subprocess.run(
        [*command, str(root) + rootfs.PYTHON_EXECUTABLE, "-c", code, *arguments],
        env=environment,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    if done.returncode != 0:
        raise AssertionError(f"exit code {done.returncode}: {done.stderr[-3000:]}")
    sys.stderr.write(done.stderr)
    return done.stdout
