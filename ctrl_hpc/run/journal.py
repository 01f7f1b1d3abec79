"""The journals of a run: what every role has to tell, as JSON lines that it appends to a file of its own.

A line is a step: ``step`` (an integer that grows from line to line: a trainer's step; of a service or a node, the time
of day in seconds) and ``time`` beside numbers by metric name (``rl/reward``). It may name files of the run directory:
``tables`` and ``images`` by metric name, ``artifacts``; and tell facts of the whole run, ``summary``. Whatever shows
a run (status, progress, curves, report, wandb) reads the journals; the roles know of none of them.

A training stage's journal is ``RUN/STAGE/metrics.jsonl``, any other ``RUN/journals/ROLE[-ELEMENT].jsonl``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctrl_hpc import jsonl

STAGES = ("sft", "rl")
"""Stages that train, step by step."""
type Numbers = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows for people to read."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A file, or a folder's files, to be kept with the run. It stays where it is: nothing is copied."""

    name: str
    type: str
    path: Path


def _name_of(role: str, element: int | None = None) -> str:
    """What a role's journal is called, and an element's."""
    return role if element is None else f"{role}-{element}"


def place(run_dir: str | Path, name: str) -> Path:
    """Where the journal of this name lies."""
    folder = Path(run_dir)
    return folder / name / "metrics.jsonl" if name in STAGES else folder / "journals" / f"{name}.jsonl"


def journals(run_dir: str | Path) -> dict[str, Path]:
    """The journals that are there, by name."""
    folder = Path(run_dir)
    found = {file.stem: file for file in sorted((folder / "journals").glob("*.jsonl"))}
    return {name: place(folder, name) for name in STAGES if place(folder, name).is_file()} | found


class Journal:
    """The journal of one role, to be written by one process at a time; a later start of the role goes on with it.

    ``start``: the step that comes next; lines of it and later, which a start left that died after its last checkpoint,
    are removed, so that every step is there once. Half a line at the end is removed in any case.
    """

    def __init__(self, run_dir: str | Path, role: str, element: int | None = None, *, start: int | None = None) -> None:
        self._run_dir = Path(run_dir)
        self.file = place(run_dir, _name_of(role, element))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        before = self.file.read_text(encoding="utf-8") if self.file.exists() else ""
        kept = [line for line in lines(self.file) if start is None or line["step"] < start]
        text = "".join(map(_text, kept))
        if text != before:
            jsonl.write_text(self.file, text)
        self.next: int = kept[-1]["step"] + 1 if kept else 0

    def log(
        self,
        step: int,
        numbers: Numbers,
        *,
        tables: Mapping[str, Table] | None = None,
        images: Iterable[Path] = (),
        artifacts: Iterable[Artifact] = (),
        summary: Mapping[str, float | str] | None = None,
        **about: float,
    ) -> None:
        """Append a line; it is on the disk, or not at all. ``images`` are shown under their names without the ending.

        Raises OSError where there is no space.
        """
        line: dict[str, Any] = {"step": step, "time": time.time(), **about, **numbers}
        line["tables"] = {name: self._table(name, step, table) for name, table in (tables or {}).items() if table.rows}
        line["images"] = {image.stem: self._relative(image) for image in images}
        line["artifacts"] = [self._artifact(item) for item in artifacts]
        line["summary"] = dict(summary or {})
        self._append(_text({key: value for key, value in line.items() if value not in ({}, [])}).encode())
        self.next = step + 1

    def _append(self, data: bytes) -> None:
        """Opened for each line, so that other nodes see it."""
        descriptor = os.open(self.file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(descriptor).st_size
            try:
                written = os.write(descriptor, data)
                while written < len(data):  # the disk is full: the next write says so
                    written += os.write(descriptor, data[written:])
            except OSError:
                os.ftruncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)

    def _table(self, name: str, step: int, table: Table) -> str:
        file = self.file.parent / "tables" / f"{name.replace('/', '-')}-{step:06d}.json"
        data = {"columns": list(table.columns), "data": [list(row) for row in table.rows]}
        jsonl.write_text(file, json.dumps(data) + "\n")
        return self._relative(file)

    def _artifact(self, item: Artifact) -> dict[str, Any]:
        found = sorted(file for file in item.path.rglob("*") if file.is_file()) if item.path.is_dir() else [item.path]
        base = item.path if item.path.is_dir() else item.path.parent
        files = {str(file.relative_to(base)): file.stat().st_size for file in found}
        return {"name": item.name, "type": item.type, "path": self._relative(item.path), "files": files}

    def _relative(self, path: Path) -> str:
        return os.path.relpath(path.absolute(), self._run_dir.absolute())


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps(line) + "\n"


def _parsed(data: bytes) -> Iterator[dict[str, Any]]:
    for text in data.splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue  # what a killed writer left
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            yield line


def lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a journal; none where there is no file."""
    data = file.read_bytes() if file.exists() else b""
    return list(_parsed(data[: data.rfind(b"\n") + 1]))


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line by metric name."""
    return {key: value for key, value in line.items() if "/" in key}


def last(file: Path, tail: int = 1 << 16) -> dict[str, Any] | None:
    """The last whole line of a journal; None where there is none."""
    try:
        with file.open("rb") as source:
            size = source.seek(0, os.SEEK_END)
            source.seek(max(0, size - tail))
            data = source.read()
    except FileNotFoundError:
        return None
    found = list(_parsed(data[: data.rfind(b"\n") + 1]))
    return last(file, 16 * tail) if not found and tail < size else found[-1] if found else None


def progress(run_dir: str | Path, stage: str) -> dict[str, Any]:
    """How far a training stage has come: ``step`` steps of ``steps`` are done, the last one's ``metrics``.

    Empty before the first step. Journals of earlier versions do not tell ``steps``; their progress.json does.
    """
    line = last(place(run_dir, stage))
    if line is None:
        return {}
    found = {"step": line["step"] + 1, "metrics": numbers(line)}
    if "steps" in line:
        return found | {"steps": line["steps"], "time": line["time"]}
    file = Path(run_dir) / stage / "progress.json"
    return found | ({"steps": json.loads(file.read_text(encoding="utf-8"))["steps"]} if file.is_file() else {})


class Tail:
    """Reads a journal as it grows."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._position, self._inode = 0, 0

    def rewind(self) -> None:
        """Begin at its first line again."""
        self._position = 0

    def new(self) -> list[dict[str, Any]]:
        """The whole lines that came since the last call; all of them where the file was written anew."""
        try:
            with self.file.open("rb") as source:
                about = os.fstat(source.fileno())
                if about.st_ino != self._inode or about.st_size < self._position:
                    self._inode, self._position = about.st_ino, 0
                source.seek(self._position)
                data = source.read()
        except FileNotFoundError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._position += len(whole)
        return list(_parsed(whole))
