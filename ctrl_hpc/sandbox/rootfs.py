"""The jail's own root: a Python, its standard library and chosen packages, copied once into a cache folder; no more.

The folder is bound read-only as ``/`` of every jail, so a program sees neither the host's files nor other jobs'. It
must be readable by the jail's outside uid, which is why it does not lie in a home folder when the executor is root.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tzdata

from ctrl_hpc.sandbox.interpreter import Interpreter, Package, interpreter, packages

_LAYOUT_VERSION = 4
"""Part of the cache key: raise it when the layout of the folder changes."""
PYTHON_EXECUTABLE = "/python/bin/python3"
RUNNER_DIR = "/runner"
_PACKAGES_DIR = "/python/packages"
_INSIDE_DIR = Path(__file__).parent / "inside"
DEFAULT_PACKAGES = ("numpy",)
"""Packages that programs may import unless told otherwise."""

_COMPLETE = "complete"
"""The file written last, with the number of files."""
_NUMPY_HOOK = "numpy/_distributor_init_local.py"
"""What numpy imports first, for distributors to fill."""
_ONE_THREAD = 'import os\n\nos.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # or it starts one a core\n'
_LOCALES = (Path("/usr/lib/locale/C.utf8"), Path("/usr/lib/locale/C.UTF-8"))
_KEPT_S = 30 * 24 * 3600
"""How long a root is kept that nothing is started with."""

_LEFT_OUT = {
    "__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "tkinter", "turtledemo",
    "ensurepip", "lib2to3", "pydoc_data", "venv",
}  # fmt: skip
_LEFT_OUT_EXTENSIONS = ("_tkinter", "_curses", "readline", "nis", "ossaudiodev", "_test", "_xxtest", "_dbm", "_gdbm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What programs find in a jail."""

    python: Interpreter
    packages: tuple[Package, ...]

    def identity(self) -> str:
        """A hash of all that verdicts depend on here: the Python's build, the packages, the runner's sources."""
        told = [str(_LAYOUT_VERSION), self.python.identity, tzdata.IANA_VERSION]
        told += [f"{package.name}=={package.version}" for package in self.packages]
        digest = hashlib.sha256("\n".join(told).encode())
        for path in sorted(_INSIDE_DIR.glob("*.py")):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
        return digest.hexdigest()[:16]

    def named(self) -> dict[str, str]:
        """The versions, by name, as ``versions.json`` and ``doctor`` give them."""
        return {"python": self.python.version, **{package.name: package.version for package in self.packages}}


def contents(python: str = "", wanted: Sequence[str] = DEFAULT_PACKAGES) -> Contents:
    """What a jail holds with that interpreter ("": this one) and those of its packages, with all that they need.

    Raises ValueError for an interpreter that cannot be used, or a package that it lacks.
    """
    found = interpreter(python)
    return Contents(python=found, packages=packages(found, tuple(wanted)))


def default_parent() -> Path:
    """Where roots are kept unless told otherwise: a folder of this user's in the node's temporary folder."""
    return Path(tempfile.gettempdir()) / f"ctrl-hpc-{os.getuid()}"


def ensure(parent: Path | None = None, holds: Contents | None = None) -> Path:
    """The folder of the jail's root, built when it is not there yet (some seconds).

    Several processes may call this at once: each builds beside and one rename wins. A root that has lost files, as
    nodes sweep their temporary folders, is built anew. Raises ValueError when the folder cannot be trusted (another
    user's) or made.
    """
    parent, holds = parent or default_parent(), holds or contents()
    try:
        parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot make the jail's root folder in {parent}: {error.strerror}; set TMPDIR") from None
    check_owner(parent)
    root = parent / f"jail-{holds.identity()}"
    if _whole(root):
        os.utime(root / _COMPLETE)
    else:
        for old in [root, *_unused(parent)]:
            _remove(old)
        build = Path(tempfile.mkdtemp(prefix=".jail-", dir=parent))
        try:
            _build(build, holds)
            try:
                build.rename(root)
            except OSError:
                if not _whole(root):
                    raise
        finally:
            if build.exists():
                shutil.rmtree(build)
    check_owner(root)
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


def check_owner(folder: Path) -> None:
    """ValueError when a folder is not one that this user alone can write."""
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o022:
        raise ValueError(f"{folder} is not a folder that only this user can write; remove it or set TMPDIR")


def _build(root: Path, holds: Contents) -> None:
    python = holds.python
    root.chmod(0o755)
    for name in ("dev/shm", "tmp", "lib/locale", "usr/share", "python/bin", "runner", _PACKAGES_DIR[1:]):
        (root / name).mkdir(parents=True)
    (root / "dev/null").touch()
    for link in ("lib64", "usr/lib", "usr/lib64"):
        (root / link).symlink_to("/lib")
    (root / "mnt").symlink_to("/tmp")  # SandboxFusion's images let programs write there
    library = root / "python/lib" / python.tag
    shutil.copytree(python.library, library, ignore=_ignore, symlinks=False)
    if not (library / "lib-dynload").is_dir():  # some distributions keep extension modules elsewhere
        shutil.copytree(python.extensions, library / "lib-dynload", ignore=_ignore)
    shutil.copy2(python.binary, root / "python/bin" / python.tag)
    (root / PYTHON_EXECUTABLE[1:]).symlink_to(python.tag)
    for path in _INSIDE_DIR.glob("*.py"):
        shutil.copy2(path, root / RUNNER_DIR[1:] / path.name)
    _copy_packages(root / _PACKAGES_DIR[1:], holds.packages)
    _copy_system_data(root)
    extensions = [path for package in holds.packages for path in package.extensions]
    _copy_libraries(root, python, [*(library / "lib-dynload").glob("*.so"), *extensions])
    _make_readable(root)
    for folder, where in (
        (library, f"/python/lib/{python.tag}"),
        (root / "runner", RUNNER_DIR),
        (root / _PACKAGES_DIR[1:], _PACKAGES_DIR),
    ):
        command = [str(python.binary), "-I", "-m", "compileall", "-qq", "-s", str(folder), "-p", where, str(folder)]
        subprocess.run(command, check=False, stdout=subprocess.DEVNULL)  # a library may hold files that do not compile
    (root / _COMPLETE).write_text(str(_files(root) + 1))


def _copy_packages(target: Path, wanted: Sequence[Package]) -> None:
    for package in wanted:
        for file in package.files:
            if not set(file.parts) & _LEFT_OUT and file.suffix != ".a":
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(package.folder / file, target / file)
    if (target / "numpy").is_dir():
        (target / _NUMPY_HOOK).write_text(_ONE_THREAD)


def _copy_system_data(root: Path) -> None:
    """Time zones, the same on every node, and the locale that the environment names, where the node has it."""
    shutil.copytree(Path(tzdata.__file__).parent / "zoneinfo", root / "usr/share/zoneinfo", ignore=_ignore)
    locale = next((path for path in _LOCALES if path.is_dir()), None)
    if locale is not None:
        shutil.copytree(locale, root / "lib/locale/C.utf8")


def _ignore(folder: str, names: list[str]) -> list[str]:
    return [
        name
        for name in names
        if name in _LEFT_OUT or name.startswith(("config-", *_LEFT_OUT_EXTENSIONS)) or name.endswith((".a", ".exe"))
    ]


def _copy_libraries(root: Path, python: Interpreter, binaries: list[Path]) -> None:
    """Copy every shared library that the binaries need, the dynamic loader among them, into ``/lib``.

    Libraries that lie beside the binaries themselves, as packages bring some, are found there.
    """
    command = ["ldd", *map(str, [python.binary, *binaries])]
    listing = subprocess.run(command, capture_output=True, text=True, check=False)
    wanted: set[Path] = set()
    for line in listing.stdout.splitlines():
        path = line.split("=>")[-1].split(" (")[0].strip()
        if line.startswith(("\t", " ")) and path.startswith("/") and "/site-packages/" not in path:
            wanted.add(Path(path))
    if not wanted and "not a dynamic executable" not in listing.stderr + listing.stdout:
        raise ValueError(f"cannot list the libraries of {python.binary} with ldd: {listing.stderr.strip()[:200]}")
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
