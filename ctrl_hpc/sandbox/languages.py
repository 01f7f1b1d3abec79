"""Languages other than Python: how a program becomes a binary, and where binaries are kept.

A language is one entry of :data:`LANGUAGES`. Its compiler runs in a jail of its own, which sees the host's ``/usr``
and the program's files and nothing else; what it makes is a binary that needs no file of the host, and is executed in a
jail that has none. Binaries are kept by a hash of all that they depend on.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ctrl_hpc.records import Limits, TestResult
from ctrl_hpc.sandbox import rootfs

BINARY = "program"
"""The file that a compiler makes, in its working folder."""
_KEPT_FAILURES = 256
_INCLUDES_TESTLIB = re.compile(r'#\s*include\s*["<]testlib\.h[">]')
_MAX_MB = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Language:
    """A language whose programs are compiled to a binary without dependencies."""

    compiler: str
    """Its name below ``/usr/bin``."""
    package: str
    """The Debian package that has it."""
    source: str
    """The file that the compiler reads."""
    options: tuple[str, ...]
    """Arguments before the source's name; :data:`BINARY` is what it has to make."""
    aliases: tuple[str, ...]
    """What fences of answers call it."""
    proof: str
    """A program that compiles where the compiler and its static libraries are whole."""
    memory_mb: int = 1024
    """What the compiler may use."""

    @property
    def command(self) -> tuple[str, ...]:
        """The compiler's arguments, itself first."""
        return (f"/usr/bin/{self.compiler}", *self.options, self.source)


LANGUAGES: dict[str, Language] = {
    "cpp": Language(
        compiler="g++",
        package="g++",
        source="main.cpp",
        options=("-std=c++17", "-O2", "-static", "-pipe", "-fmax-errors=20", "-I.", "-o", BINARY),
        aliases=("cpp", "c++", "C++", "Cpp", "CPP"),
        proof="#include <iostream>\nint main() { std::cout << 1; }\n",
    ),
}
"""Languages by name, as problems and requests give it. Python, which is not compiled, is not among them."""
PYTHON = "python"
CHECKERS = "cpp"
"""What checkers are written in."""
COMPILE_S = 10.0
"""Wall-clock seconds a compiler has unless a request says otherwise; SandboxFusion's."""


def language(name: str | None) -> Language | None:
    """The entry of that name, None for Python; ValueError lists the names, or says what is to be installed."""
    if name is None or name == PYTHON:
        return None
    if name not in LANGUAGES:
        raise ValueError(f"language: {name!r} is not supported; allowed: {', '.join([PYTHON, *LANGUAGES])}")
    toolchain(name)
    return LANGUAGES[name]


@functools.cache
def toolchain(name: str) -> str:
    """The version of a language's compiler; ValueError where there is none, or one that makes no programs.

    What the compiler lacks must not be taken for a program's fault.
    """
    entry = LANGUAGES[name]
    command = f"/usr/bin/{entry.compiler}"
    try:
        told = subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / entry.source).write_text(entry.proof)
            subprocess.run(entry.command, cwd=folder, capture_output=True, text=True, check=True)
    except OSError:
        raise ValueError(f"language: {name} needs {command}; install the package {entry.package}") from None
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no word of why"])[-1][:200]
        fix = f"install the package {entry.package} whole, static libraries too"
        raise ValueError(f"language: {name}: {command} compiles no program: {last}; {fix}") from None
    return told.partition("\n")[0].strip()


TESTLIB = Path("/usr/include/testlib.h")
"""Where a package would put it."""


def testlib(path: str | Path) -> str:
    """The text of ``testlib.h``: of the given file, else of the system's, else ""; ValueError if it cannot be read."""
    place = Path(path) if path else TESTLIB
    if not path and not place.is_file():
        return ""
    try:
        return place.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(f"executor.testlib: cannot read {place}: {error.strerror}") from None


def check_checker(source: str | None, library: str) -> None:
    """ValueError where a checker cannot be compiled: without a compiler, or the ``testlib.h`` that it includes."""
    if source is None:
        return
    language(CHECKERS)
    if _INCLUDES_TESTLIB.search(source) and not library:
        raise ValueError("checker: it includes testlib.h; say where that is: executor.testlib (--testlib)")


def limits(entry: Language, timeout_s: float | None) -> Limits:
    """What a compiler may use."""
    wall_s = max(COMPILE_S if timeout_s is None else timeout_s, 0.001)
    return Limits(cpu_s=wall_s * 4, wall_s=wall_s, memory_mb=entry.memory_mb, output_bytes=1 << 16, processes=16)


def key(name: str, program: str, files: Mapping[str, str], timeout_s: float | None) -> str:
    """The hash of all that a binary depends on, and of the time that its compiler had."""
    told = [name, toolchain(name), LANGUAGES[name].command, LANGUAGES[name].memory_mb, program, dict(files), timeout_s]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """What came of a compilation: a binary, or why there is none."""

    compiled: TestResult
    """What the compiler did: ``accepted``, ``compile_error`` or ``sandbox_error``; its words are in ``stderr``."""
    binary: bytes | None = None


class Binaries:
    """Binaries by hash, on this node's disk, for all workers; at most about ``max_mb``, the longest unused go first."""

    def __init__(self, folder: Path, max_mb: int = _MAX_MB) -> None:
        self.folder, self._max_bytes = folder, max_mb << 20
        self._lock = threading.Lock()
        self._building: dict[str, threading.Lock] = {}
        self._failures: OrderedDict[str, Built] = OrderedDict()
        self.compiled = 0
        """Programs compiled, for tests and metrics."""

    @contextlib.contextmanager
    def building(self, name: str) -> Iterator[None]:
        """Held by the one who builds; others wait, and find what it made."""
        with self._lock:
            mine = self._building.setdefault(name, threading.Lock())
        try:
            with mine:
                yield
        finally:
            with self._lock:
                self._building.pop(name, None)

    def get(self, name: str) -> Built | None:
        """What is known of a program: its binary, or that it does not compile."""
        with self._lock:
            if name in self._failures:
                return self._failures[name]
        path = self.folder / name
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        return Built(compiled=TestResult(status="accepted", exit_code=0), binary=content)

    def put(self, name: str, built: Built) -> None:
        """Keep a binary, or that there is none; a fault, or a limit of time, is not kept. A full disk costs nothing."""
        self.compiled += 1
        if built.binary is None:
            if built.compiled.status == "compile_error" and built.compiled.exit_code is not None:
                with self._lock:
                    self._failures[name] = built
                    if len(self._failures) > _KEPT_FAILURES:
                        self._failures.popitem(last=False)
            return
        with contextlib.suppress(OSError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            rootfs.check_owner(self.folder)
            self._make_room(len(built.binary))
            draft = self.folder / f".{name}.{os.getpid()}.{threading.get_ident()}"
            draft.write_bytes(built.binary)
            draft.rename(self.folder / name)

    def _make_room(self, needed: int) -> None:
        with os.scandir(self.folder) as listing:
            entries = sorted((entry.stat().st_mtime, entry.stat().st_size, entry.path) for entry in listing)
        excess = sum(size for _, size, _ in entries) + needed - self._max_bytes
        for _, size, path in entries:
            if excess <= 0:
                return
            Path(path).unlink(missing_ok=True)
            excess -= size

    def clear(self) -> None:
        """Forget everything."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._failures.clear()
