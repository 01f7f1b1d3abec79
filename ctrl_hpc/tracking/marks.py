"""How far each journal is told: its mark in a wandb run, and the lines that are due."""

from __future__ import annotations

import json
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ctrl_hpc import jsonl
from ctrl_hpc.run import journal


@dataclass(slots=True, kw_only=True)
class Mark:
    """How far a journal has got in a wandb run, kept beside the journal. Steps begin at 0; -1: none."""

    told: int = -1
    """The last step that is in wandb for certain: in a piece on disk that was ended, or at the server."""
    sent: int = -1
    """The last step that the server has for certain, with its files."""
    base: int | None = None
    """How many rows the server had of the run before the first of this journal."""
    after: int = -1
    """The step after which the journal was told to the server, a row a line."""
    pieces: list[str] = field(default_factory=list)
    """The mirror's offline folders of the run."""
    open: str | None = None
    """The one that is being written."""


def mark(file: Path, id: str) -> Mark:
    """The mark of a journal in a wandb run; a new one where there is none."""
    return Mark(**_marks(file).get(id, {}))


def set_mark(file: Path, id: str, new: Mark) -> None:
    """Write a mark, beside those of the journal in other runs."""
    jsonl.write_text(_place(file), json.dumps(_marks(file) | {id: asdict(new)}, indent=1) + "\n")


def _place(file: Path) -> Path:
    return file.with_name(f"{file.name}.mirror")


def _marks(file: Path) -> dict[str, Any]:
    return json.loads(_place(file).read_text(encoding="utf-8")) if _place(file).exists() else {}


def adopt(run_dir: Path, name: str, file: Path) -> None:
    """Take the rows of a journal that no mirror has seen for told, where pieces that the role wrote itself have them.

    So it is in run directories of earlier versions.
    """
    id = run_id(run_dir, name)
    line = journal.last(file)
    if id not in _marks(file) and line is not None and any((run_dir / "wandb").glob(f"*run-*-{id}")):
        set_mark(file, id, Mark(told=line["step"], sent=line["step"]))


def leave_out(run_dir: Path, name: str) -> None:
    """Take the lines of a journal for told: it is another run's, which tells them itself."""
    file = journal.place(run_dir, name)
    if (line := journal.last(file)) is not None:
        set_mark(file, run_id(run_dir, name), Mark(told=line["step"], sent=line["step"]))


def run_id(run_dir: Path, name: str) -> str:
    """The wandb id of a journal: the same for every start of its role in this run directory, and no other run's.

    What they have in common is drawn once, into ``RUN_DIR/wandb_id``.
    """
    file = run_dir / "wandb_id"
    if not file.exists():
        jsonl.write_text(file, secrets.token_hex(4))
    return f"{file.read_text(encoding='ascii').strip()}-{name}"


class Source:
    """A journal on its way into a wandb run."""

    def __init__(self, file: Path, id: str, online: bool) -> None:
        self.file, self.id, self._online = file, id, online
        self.mark = mark(file, id)
        self.told = self.certain
        self._tail = journal.Tail(file)
        self._read: list[dict[str, Any]] = []

    @property
    def certain(self) -> int:
        """The last step that need not be told any more, whatever becomes of wandb's process."""
        return self.mark.sent if self._online else self.mark.told

    def due(self) -> list[dict[str, Any]]:
        """The lines that are to be told; they stay due until :meth:`done`."""
        self._read = [line for line in (*self._read, *self._tail.new()) if line["step"] > self.told]
        return self._read

    def done(self, line: dict[str, Any]) -> None:
        """This line was told."""
        self.told = line["step"]

    def again(self, told: int) -> None:
        """Begin at the line after step ``told``."""
        self._tail.rewind()
        self._read, self.told = [], told

    def set(self, **changes: Any) -> None:
        """Change the mark, on disk too."""
        for name, value in changes.items():
            setattr(self.mark, name, value)
        set_mark(self.file, self.id, self.mark)
