"""The jail's own root: this Python and its standard library, copied once into a cache folder, and nothing else.

The folder is bound read-only as ``/`` of every jail, so a program sees neither the host's files nor other jobs'. It
must be readable by the jail's outside uid, which is why it does not lie in a home folder when the executor is root.
"""

from __future__ import annotations

import compileall
import contextlib
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

LAYOUT_VERSION = 2
"""Part of the cache key: raise it when the layout of the folder changes."""
PYTHON_EXECUTABLE = "/python/bin/python3"
RUNNER_DIR = "/runner"
INSIDE_DIR = Path(__file__).parent / "inside"

_COMPLETE = "complete"
"""The file written last, with the number of files."""
_KEPT_S = 30 * 24 * 3600
"""How long a root is kept that nothing is started with."""

_LEFT_OUT = {
    "__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "turtledemo",
    "ensurepip", "lib2to3", "pydoc_data", "venv",
}  # fmt: skip
_LEFT_OUT_EXTENSIONS = ("_tkinter", "_curses", "readline", "nis", "ossaudiodev", "_test", "_xxtest", "_dbm", "_gdbm")


def identity() -> str:
    """What the jail's contents depend on: Python build and runner sources. Part of the verdict cache's key."""
    digest = hashlib.sha256(f"{LAYOUT_VERSION} {sys.version} {sysconfig.get_platform()} {_base_python()}".encode())
    for path in sorted(INSIDE_DIR.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def default_parent() -> Path:
    """Where roots are kept unless told otherwise: a folder of this user's in the node's temporary folder."""
    return Path(tempfile.gettempdir()) / f"ctrl-hpc-{os.getuid()}"


def ensure(parent: Path | None = None) -> Path:
    """The folder of the jail's root, built when it is not there yet (about two seconds).

    Several processes may call this at once: each builds beside and one rename wins. A root that has lost files, as
    nodes sweep their temporary folders, is built anew. Raises ValueError when the folder cannot be trusted (another
    user's) or made.
    """
    parent = parent or default_parent()
    try:
        parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the jail's root folder in {parent}: {error.strerror}; set TMPDIR") from None
    _check_owner(parent)
    root = parent / f"jail-{identity()}"
    if _whole(root):
        os.utime(root / _COMPLETE)
    else:
        for old in [root, *_unused(parent)]:
            _remove(old)
        build = Path(tempfile.mkdtemp(prefix=".jail-", dir=parent))
        try:
            _build(build)
            try:
                build.rename(root)
            except OSError:
                if not _whole(root):
                    raise
        finally:
            if build.exists():
                shutil.rmtree(build)
    _check_owner(root)
    return root


def _files(root: Path) -> int:
    return sum(len(files) for _, _, files in os.walk(root))


def _whole(root: Path) -> bool:
    """Whether the root is there with as many files as when it was built."""
    try:
        return int((root / _COMPLETE).read_text()) == _files(root)
    except (FileNotFoundError, ValueError):
        return False


def _unused(parent: Path) -> list[Path]:
    """Roots of other versions that no executor has started with for a long time."""
    limit = time.time() - _KEPT_S
    return [path.parent for path in parent.glob(f"jail-*/{_COMPLETE}") if path.stat().st_mtime < limit]


def _remove(root: Path) -> None:
    """Take a root away at once, whoever else does the same, and then delete it."""
    aside = Path(tempfile.mkdtemp(prefix=".jail-old-", dir=root.parent))
    try:
        with contextlib.suppress(FileNotFoundError):
            root.rename(aside / root.name)
    finally:
        shutil.rmtree(aside)


def _check_owner(folder: Path) -> None:
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o022:
        raise ValueError(f"{folder} is not a folder that only this user can write; remove it or set TMPDIR")


def _base_python() -> Path:
    """The real interpreter behind a virtual environment."""
    return Path(getattr(sys, "_base_executable", sys.executable)).resolve()


def _build(root: Path) -> None:
    root.chmod(0o755)
    for name in ("dev", "tmp", "lib", "usr", "python/bin", "runner"):
        (root / name).mkdir(parents=True)
    (root / "dev/null").touch()
    for link in ("lib64", "usr/lib", "usr/lib64"):
        (root / link).symlink_to("/lib")
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    library = root / "python/lib" / version
    shutil.copytree(sysconfig.get_path("stdlib"), library, ignore=_ignore, symlinks=False)
    if not (library / "lib-dynload").is_dir():  # some distributions keep extension modules elsewhere
        shutil.copytree(sysconfig.get_config_var("DESTSHARED"), library / "lib-dynload", ignore=_ignore)
    shutil.copy2(_base_python(), root / "python/bin" / version)
    (root / PYTHON_EXECUTABLE[1:]).symlink_to(version)
    for path in INSIDE_DIR.glob("*.py"):
        shutil.copy2(path, root / RUNNER_DIR[1:] / path.name)
    _copy_libraries(root, [root / "python/bin" / version, *(library / "lib-dynload").glob("*.so")])
    _make_readable(root)
    for folder, where in ((library, f"/python/lib/{version}"), (root / "runner", RUNNER_DIR)):
        compileall.compile_dir(folder, quiet=2, stripdir=str(folder), prependdir=where, workers=1)
    (root / _COMPLETE).write_text(str(_files(root) + 1))


def _ignore(folder: str, names: list[str]) -> list[str]:
    return [
        name
        for name in names
        if name in _LEFT_OUT or name.startswith(("config-", *_LEFT_OUT_EXTENSIONS)) or name.endswith((".a", ".exe"))
    ]


def _copy_libraries(root: Path, binaries: list[Path]) -> None:
    """Copy every shared library that the binaries need, the dynamic loader among them, into ``/lib``."""
    command = ["ldd", *map(str, [_base_python(), *binaries])]
    listing = subprocess.run(command, capture_output=True, text=True, check=False)
    wanted: set[Path] = set()
    for line in listing.stdout.splitlines():
        path = line.split("=>")[-1].split(" (")[0].strip()
        if line.startswith(("\t", " ")) and path.startswith("/"):
            wanted.add(Path(path))
    if not wanted and "not a dynamic executable" not in listing.stderr + listing.stdout:
        raise ValueError(f"cannot list the libraries of {binaries[0]} with ldd: {listing.stderr.strip()[:200]}")
    for library in wanted:
        is_loader = library.name.startswith("ld-")
        is_elsewhere = is_loader and library.parent.name not in ("lib", "lib64")
        parent = root / str(library.parent)[1:] if is_elsewhere else root / "lib"
        parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(library.resolve(), parent / library.name)


def _make_readable(root: Path) -> None:
    for folder, _, files in os.walk(root):
        os.chmod(folder, 0o755)
        for name in files:
            file = os.path.join(folder, name)
            if not os.path.islink(file):
                os.chmod(file, 0o755 if os.access(file, os.X_OK) else 0o644)
