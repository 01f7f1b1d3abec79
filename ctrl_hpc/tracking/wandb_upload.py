"""`wandb sync` as a process whose log is followed: it reports success even where uploads were refused."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOOK_S = 0.2
SAY_S = 30.0
"""Seconds between lines about a server that fails."""
RETRIES = {f"WANDB_X_{part}_RETRY_MAX": "20" for part in ("GRAPHQL", "FILE_STREAM", "FILE_TRANSFER")}
"""wandb waits 2 s, 4 s, 8 s ... and at most a minute between them: a quarter of an hour."""
_ARTIFACT_FILE = "FileKind: 2,"
"""In the log, of a file of an artifact: wandb tries those that were refused again, so that only the artifact counts."""
_ARTIFACT_LOST = "sender: failed to log artifact"
_TASK = re.compile(r" Name: (.*?), Url: ")
_STATUS = re.compile(r"\b[45]\d\d [A-Z][A-Za-z ]+")


@dataclass(slots=True, kw_only=True)
class Upload:
    """What became of the record files that one `wandb sync` was to send."""

    code: int = 0
    """The exit status of `wandb sync`."""
    told: str = ""
    """Its last words."""
    lost: dict[Path, list[str]] = field(default_factory=dict)
    """By record file what the server did not take, in words."""
    refused: dict[Path, str] = field(default_factory=dict)
    """By record file the last file of an artifact that was refused, perhaps to be taken when it was tried again."""


def upload(files: Sequence[Path], url: str, folder: Path, say: Callable[[str], None]) -> Upload:
    """Send record files, in order, to the server at ``url``; wandb's logs go to ``folder``/wandb/logs.

    Says, at once and then every ``SAY_S``, that the server fails and is asked again. On Ctrl-C the process is ended.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("WANDB_MODE", "WANDB_SILENT")}
    environment = RETRIES | environment | {"WANDB_BASE_URL": url, "WANDB_DIR": str(folder)}
    # --include-synced: which are to be sent has been decided
    command = [sys.executable, "-m", "wandb", "sync", "--yes", "--include-synced", *map(str, files)]
    known = set(_logs(folder))
    made, last_said = Upload(), -math.inf
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            for row in _rows(process, folder, known):
                failure = _retried(row)
                if failure and time.monotonic() - last_said >= SAY_S:
                    last_said = time.monotonic()
                    say(f"{url} fails ({failure}); asking again, Ctrl-C ends it and the same command goes on")
                _note(row, made)
        finally:
            process.terminate()
            process.wait()
        made.code = process.returncode
        output.seek(0)
        lines = [line.strip() for line in output if line.strip()]
    made.told = lines[-1].removeprefix("wandb: ").removeprefix("ERROR ")[:300] if lines else "it printed nothing"
    return made


def _logs(folder: Path) -> list[Path]:
    return sorted((folder / "wandb" / "logs").glob("debug-sync.*.log"))


def _rows(process: subprocess.Popen[bytes], folder: Path, known: set[Path]) -> Iterator[Mapping[str, Any]]:
    """The records of the process's log as they come, until it has ended."""
    log, position, ended = None, 0, False
    while not ended:
        try:
            process.wait(LOOK_S)
            ended = True
        except subprocess.TimeoutExpired:
            pass
        log = log or next((file for file in _logs(folder) if file not in known), None)
        if log is None:
            continue
        with log.open("rb") as file:
            file.seek(position)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        position += len(whole)
        for line in whole.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # a panic's trace among the records
            yield row


def _retried(row: Mapping[str, Any]) -> str | None:
    """The failure that a log record says is tried again, in words."""
    if row.get("msg") == "api: retrying error":
        return str(row.get("error", "")).removeprefix("unexpected ")
    if row.get("msg") == "api: retrying HTTP error":
        return f"HTTP status {row.get('status')}"
    return None


def _note(row: Mapping[str, Any], made: Upload) -> None:
    """Add to ``lost`` what a log record says was given up."""
    message, task, file = str(row.get("msg", "")), str(row.get("task", "")), Path(str(row.get("sync_path", "")))
    if row.get("level") != "ERROR" or message == "api: HTTP error":
        return
    name, status = _TASK.search(task), _STATUS.search(message)
    what = " ".join((status[0] if status else message).split())[:500]
    what = f"{name[1]}: {what}" if name else what
    if _ARTIFACT_FILE in task:
        made.refused[file] = what
    elif message.startswith(_ARTIFACT_LOST):
        reason = what.removeprefix(f"{_ARTIFACT_LOST}: ")
        made.lost.setdefault(file, []).append(f"a file of an artifact: {made.refused.get(file, reason)}")
    else:
        made.lost.setdefault(file, []).append(what)
