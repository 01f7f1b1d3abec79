"""The Python that programs run with: this one or another of the node's, and those of its packages that they may import.

Packages are those installed for that interpreter, so their versions are what its environment's lock file says.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

_OLDEST = (3, 11)
"""The oldest Python that the jail's runner works with."""
_ASK = """
import json, platform, sys, sysconfig
print(json.dumps({
    "implementation": platform.python_implementation(),
    "version": platform.python_version(),
    "tag": "python%d.%d" % sys.version_info[:2],
    "binary": getattr(sys, "_base_executable", None) or sys.executable,
    "library": sysconfig.get_path("stdlib"),
    "extensions": sysconfig.get_config_var("DESTSHARED"),
    "build": sys.version + sysconfig.get_platform(),
    "sites": [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))],
}))
"""
_ANSWER_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Interpreter:
    """A CPython."""

    version: str
    tag: str
    """As ``python3.12``: the name of its library's folder."""
    binary: Path
    """The real interpreter, behind a virtual environment's."""
    library: Path
    extensions: Path
    """Where extension modules of the standard library lie, if not below it."""
    sites: tuple[str, ...]
    """Folders of installed packages."""
    identity: str
    """The build, and where it lies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """An installed package."""

    name: str
    version: str
    folder: Path
    files: tuple[Path, ...]
    """Relative to the folder."""

    @property
    def extensions(self) -> list[Path]:
        """Its shared libraries."""
        return [self.folder / file for file in self.files if ".so" in file.suffixes]


@functools.cache
def interpreter(python: str = "") -> Interpreter:
    """What there is to know of an interpreter, this one or one by path or name; ValueError when it will not do."""
    executable = sys.executable if not python else shutil.which(os.path.expanduser(python))
    if executable is None:
        raise ValueError(f"executor.python: {python!r} is not an interpreter on this machine")
    try:
        told = subprocess.run(
            [executable, "-c", _ASK], capture_output=True, text=True, timeout=_ANSWER_S, check=True, cwd="/"
        )
        facts: dict[str, Any] = json.loads(told.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise ValueError(f"executor.python: {executable} does not run: {error}") from None
    version = tuple(map(int, facts["version"].rstrip("+").split(".")[:2]))
    if facts["implementation"] != "CPython" or version < _OLDEST:
        found = f"{facts['implementation']} {facts['version']}"
        raise ValueError(
            f"executor.python: {executable} is {found}; allowed: CPython {_OLDEST[0]}.{_OLDEST[1]} or newer"
        )
    binary = Path(facts["binary"]).resolve()
    return Interpreter(
        version=facts["version"],
        tag=facts["tag"],
        binary=binary,
        library=Path(facts["library"]),
        extensions=Path(facts["extensions"]),
        sites=tuple(facts["sites"]),
        identity=f"{facts['build']} {binary}",
    )


@functools.cache
def packages(python: Interpreter, wanted: tuple[str, ...]) -> tuple[Package, ...]:
    """Installed packages and all that they require, by name. Raises ValueError that names one which is not there."""
    there = reversed(list(metadata.distributions(path=list(python.sites))))  # the first of a name counts
    installed = {canonicalize_name(one.name): one for one in there}
    marks: dict[str, Any] = {**default_environment(), "python_version": python.tag[len("python") :], "extra": ""}
    todo, found = [canonicalize_name(name) for name in wanted], dict[str, metadata.Distribution]()
    while todo:
        name = todo.pop()
        if name in found:
            continue
        if name not in installed:
            raise ValueError(
                f"executor.packages: {name} is not installed for {python.binary} (Python {python.version}); install it "
                "there, name another interpreter with executor.python, or leave it out"
            )
        found[name] = installed[name]
        todo += [
            canonicalize_name(needed.name)
            for needed in map(_requirement, installed[name].requires or [])
            if needed is not None and (needed.marker is None or needed.marker.evaluate(marks))
        ]
    return tuple(_package(name, found[name]) for name in sorted(found))


def _requirement(text: str) -> Requirement | None:
    try:
        return Requirement(text)
    except InvalidRequirement:
        return None


def _package(name: str, found: metadata.Distribution) -> Package:
    folder = Path(str(found.locate_file("")))
    files = [Path(file) for file in found.files or []]
    kept = [file for file in files if ".." not in file.parts and not file.is_absolute() and (folder / file).is_file()]
    if not kept:
        raise ValueError(
            f"executor.packages: the files of {name} in {folder} are not recorded; install it with pip or uv"
        )
    return Package(name=name, version=found.version, folder=folder, files=tuple(kept))
