"""The code of a run: a copy of our packages in its directory, which jobs import, whatever becomes of the checkout.

``RUN/code/HASH`` holds ``ctrl_hpc`` and ``ctrl_kernels`` as they were when the driver started; the hash is of names and
contents. ``RUN/code/starts.jsonl`` tells which code every start of the driver had; jobs get that of the last one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from ctrl_hpc import jsonl
from ctrl_hpc.config import ROOT, SHARE, Config

_Mode = Literal["new", "keep", "none"]
PACKAGES = ("ctrl_hpc", "ctrl_kernels")
_DATA = ("configs/models.json",)
"""Files beside the packages that they read; the configurations and models of an installed package are not copied."""
_ORIGIN = "origin.json"
ASKED = "config.yaml"
"""Beside the copies: the whole configuration that was asked for from Python, paths made absolute."""
STARTS = "starts.jsonl"
_LEFT_OVER_S = 3600.0
"""A copy that has not been finished for so long belongs to a process that was killed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """Which code it is, as ``versions.json`` and the driver's starts tell."""

    code: str
    """Hash of the packages' files."""
    git_commit: str | None
    """Of the checkout it was copied from; None for an installed package."""
    git_dirty: bool | None
    """Whether that checkout held changes that were not committed."""

    def __str__(self) -> str:
        commit = f" (commit {self.git_commit[:9]}{', changed' if self.git_dirty else ''})" if self.git_commit else ""
        return f"{self.code}{commit}"


def identity() -> Code:
    """Which code this process runs: read from the copy it belongs to, else of the packages as they lie there now."""
    origin = ROOT / _ORIGIN
    if origin.is_file():
        return _code(json.loads(origin.read_text(encoding="utf-8")))
    return _identity(_digest(_contents()))


def _identity(digest: str) -> Code:
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return Code(code=digest, git_commit=commit or None, git_dirty=None if commit is None else bool(changes))


def _code(record: dict[str, Any]) -> Code:
    return Code(**{name: record[name] for name in ("code", "git_commit", "git_dirty")})


def _git(*words: str) -> str | None:
    """What git says of the checkout; None where there is none (an installed package may lie within another's)."""
    if not (ROOT / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def folder_of(run_dir: str | Path) -> Path:
    """Where the copies of a run lie."""
    return Path(run_dir).absolute() / "code"


def own(run_dir: str | Path) -> Path | None:
    """The copy of this run that this very process runs from; None when it runs from anywhere else."""
    return ROOT if ROOT.parent == folder_of(run_dir).resolve() else None


def place(run_dir: str | Path, mode: _Mode) -> Path | None:
    """Where the jobs of a run that is started now would find their code; copies nothing."""
    if mode == "none":
        return None
    kept = latest(run_dir) if mode == "keep" else None
    return own(run_dir) or kept or folder_of(run_dir) / _digest(_contents())


def take(run_dir: str | Path, mode: _Mode) -> Path | None:
    """:func:`place`, copied there if it is not there yet: at once and whole, or not at all."""
    if mode == "none":
        return None
    found = own(run_dir) or (latest(run_dir) if mode == "keep" else None)
    return found or _copy(folder_of(run_dir))


def begin(run_dir: str | Path, mode: _Mode) -> str | None:
    """A driver's start: jobs get :func:`take`'s code from now on, and copies that nothing uses are removed.

    Called by the only driver. Returns a line to print when the code is another than that of the last start.
    """
    folder = folder_of(run_dir)
    copy = take(run_dir, mode)
    now = identity() if copy is None else _code(json.loads((copy / _ORIGIN).read_text(encoding="utf-8")))
    starts = _starts(run_dir)
    before = _code(starts[-1]) if starts else None
    if not starts or before != now or starts[-1]["copied"] != (copy is not None):
        starts.append({"time": round(time.time(), 3), "copied": copy is not None, **asdict(now)})
        jsonl.write_text(folder / STARTS, "".join(json.dumps(start) + "\n" for start in starts))
    made = _made_by(run_dir)
    _prune(folder, {now.code, *made.values()})
    if before is None or before.code == now.code:
        return None
    stages = ", ".join(name for name, code in made.items() if code != now.code)
    return f"code: {now} now, {before} at the last start{f'; made by other code: {stages}' if stages else ''}"


def continue_kept(config: Config, command: str, overrides: Sequence[str]) -> None:
    """With ``keep``: replace this process by the same command of the code of the run's last start, as its jobs have it.

    It reads the configuration of that start, with these overrides. Returns where there is no such code, or where this
    process runs from it already.
    """
    folder = Path(config.run_dir or "").absolute()
    kept = latest(folder)
    if kept is None or own(folder) is not None:
        return
    words = [text for text in overrides if not text.startswith("cluster=")]  # that file holds the profile's values
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(
        sys.executable, [sys.executable, str(kept), "-m", "ctrl_hpc.cli", command, str(folder / "config.yaml"), *words]
    )


def import_from(copy: Path) -> None:
    """What this process imports of our packages from now on comes from the copy, whatever becomes of the checkout."""
    for name, module in list(sys.modules.items()):
        top = name.partition(".")[0]
        if top in PACKAGES and hasattr(module, "__path__"):
            module.__path__ = [str(copy.joinpath(*name.split(".")))]
    sys.path.insert(0, str(copy))


def latest(run_dir: str | Path) -> Path | None:
    """The copy that the last start of the driver gave to jobs; None when they import from where it does."""
    starts = _starts(run_dir)
    if not starts or not starts[-1]["copied"]:
        return None
    found = folder_of(run_dir) / starts[-1]["code"]
    return found if found.is_dir() else None


def last_code(run_dir: str | Path) -> str | None:
    """The hash of the code of the last start."""
    starts = _starts(run_dir)
    return starts[-1]["code"] if starts else None


def _starts(run_dir: str | Path) -> list[dict[str, Any]]:
    file = folder_of(run_dir) / STARTS
    if not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _made_by(run_dir: str | Path) -> dict[str, str]:
    """The code that finished each stage, in the order of finishing."""
    records = [json.loads(file.read_text(encoding="utf-8")) for file in Path(run_dir).glob("*/done.json")]
    records = sorted((record for record in records if "code" in record), key=lambda record: record["finished"])
    return {record["stage"]: record["code"] for record in records}


def _sources() -> dict[str, Path]:
    """The files of our packages by their place in a copy, in order."""
    found = {}
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None, name
        top = Path(spec.origin).parent
        for file in top.rglob("*"):
            inside = file.relative_to(top)
            left_out = inside.parts[0] == "share" or any(part.startswith(".") for part in inside.parts)
            if file.is_file() and file.suffix != ".pyc" and not left_out:
                found[f"{name}/{inside.as_posix()}"] = file
    found |= {name: SHARE / name for name in _DATA}
    return dict(sorted(found.items()))


def _contents() -> dict[str, bytes]:
    return {name: file.read_bytes() for name, file in _sources().items()}


def _digest(contents: dict[str, bytes]) -> str:
    total = hashlib.sha256()
    for name, content in contents.items():
        total.update(f"{name}\0{len(content)}\0".encode())
        total.update(content)
    return total.hexdigest()[:16]


def _copy(folder: Path) -> Path:
    sources = _sources()
    times = {name: file.stat().st_mtime_ns for name, file in sources.items()}  # before reading: see below
    contents = {name: file.read_bytes() for name, file in sources.items()}
    digest = _digest(contents)
    target = folder / digest
    if target.is_dir():
        return target
    part = folder / f".{digest}.{os.uname().nodename}.{os.getpid()}.part"
    shutil.rmtree(part, ignore_errors=True)
    for name, content in contents.items():
        file = part / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        os.utime(file, ns=(times[name], times[name]))
        _copy_compiled(sources[name], file)
    shutil.copyfile(sources["ctrl_hpc/run/copied_main.py"], part / "__main__.py")
    origin = {**asdict(_identity(digest)), "from": str(ROOT), "time": round(time.time(), 3)}
    jsonl.write_text(part / _ORIGIN, json.dumps(origin, indent=1) + "\n")
    try:
        part.rename(target)
    except OSError:
        shutil.rmtree(part)
        if not target.is_dir():  # else another driver of this run was quicker
            raise
    return target


def _copy_compiled(source: Path, copy: Path) -> None:
    """The byte code, so that the first jobs need not compile; Python itself ignores it unless size and time of the
    source are those it was compiled from."""
    if source.suffix != ".py":
        return
    compiled = Path(importlib.util.cache_from_source(str(source)))
    if compiled.is_file():
        there = Path(importlib.util.cache_from_source(str(copy)))
        there.parent.mkdir(exist_ok=True)
        shutil.copyfile(compiled, there)


def _prune(folder: Path, used: set[str]) -> None:
    for entry in folder.iterdir() if folder.is_dir() else ():
        unfinished = entry.name.startswith(".") and time.time() - entry.stat().st_mtime > _LEFT_OVER_S
        if entry.is_dir() and (unfinished or not (entry.name.startswith(".") or entry.name in used)):
            shutil.rmtree(entry, ignore_errors=True)
