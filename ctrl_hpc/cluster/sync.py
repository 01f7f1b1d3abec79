"""Sending a run's offline wandb files to the server: ``ctrl-hpc sync RUN``, from a node that reaches it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

_FOLDER = re.compile(r"offline-run-(\d{8}_\d{6})-(.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One start of a wandb run, as it lies in ``RUN/wandb``."""

    folder: Path
    id: str
    started: str
    """YYYYMMDD_HHMMSS."""

    @property
    def file(self) -> Path:
        """The record file."""
        return self.folder / f"run-{self.id}.wandb"

    @property
    def sent(self) -> bool:
        """Whether an earlier sync sent it."""
        return Path(f"{self.file}.synced").exists()


def pieces(run_dir: str | Path) -> dict[str, list[Piece]]:
    """The pieces of every wandb run of a run directory, by id, each in the order of their starts.

    Raises ValueError when there are none.
    """
    folder = Path(run_dir) / "wandb"
    found: dict[str, list[Piece]] = {}
    for path in sorted(folder.glob("offline-run-*")):
        match = _FOLDER.fullmatch(path.name)
        if match is not None:
            piece = Piece(folder=path, id=match[2], started=match[1])
            if piece.file.exists():
                found.setdefault(piece.id, []).append(piece)
    if not found:
        raise ValueError(f"{folder}: no offline wandb runs there (wandb.mode=offline writes them)")
    return found


def sync(run_dir: str | Path, say: Callable[[str], None] = print, *, again: bool = False) -> int:
    """Send what has not been sent yet (``again``: everything); returns how many pieces were.

    The pieces of a run that was requeued become one run, in order. Raises RuntimeError when the server refuses one.
    """
    sent = 0
    for id, parts in pieces(run_dir).items():
        new = [piece for piece in parts if again or not piece.sent]
        if not new:
            say(f"{id}: sent before")
            continue
        size = sum(file.stat().st_size for piece in new for file in piece.folder.rglob("*") if file.is_file())
        say(f"{id}: sending {len(new)} of {len(parts)} pieces, {size / 1e6:.1f} MB")
        _send(id, new, again)
        sent += len(new)
    return sent


def _send(id: str, new: Sequence[Piece], again: bool) -> None:
    command = [sys.executable, "-m", "wandb", "sync", "--yes", *(["--include-synced"] if again else [])]
    environment = {name: value for name, value in os.environ.items() if name not in ("WANDB_MODE", "WANDB_SILENT")}
    folders = [str(piece.folder) for piece in new]
    done = subprocess.run([*command, *folders], capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0 or not (again or all(piece.sent for piece in new)):
        words = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise RuntimeError(f"{id}: not sent: {words[-1][:300] if words else 'wandb sync printed nothing'}")
