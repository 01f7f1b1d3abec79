"""Sending what the wandb server does not have of a run: ``ctrl-hpc sync RUN``, from a node that reaches it.

The journals are told to the server anew, each from where the server is (:mod:`ctrl_hpc.tracking.mirror`); the driver's
offline folders are then marked as sent, for `wandb sync` to leave them. Folders that the roles of earlier versions
wrote themselves are sent by `wandb sync`, in the order of their starts.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ctrl_hpc import config as configuration
from ctrl_hpc.config import Config
from ctrl_hpc.run import journal
from ctrl_hpc.tracking import marks, mirror, server

LOOK_S = 0.2
_SAY_S = 30.0
"""Seconds between lines about a server that fails."""
_FOLDER = re.compile(r"offline-run-\d{8}_\d{6}-(.+)")


def sync(run_dir: str | Path, say: Callable[[str], None] = print, *, again: bool = False) -> int:
    """Send what has not been sent yet (``again``: ask the server of all of it); returns how many journals and folders.

    Raises ValueError where there is nothing to send, RuntimeError, in one line, when the server cannot be reached or
    refuses; the same call then sends what is left, and what was sent is not sent again.
    """
    folder = Path(run_dir)
    old, journals = pieces(folder), journal.journals(folder)
    if not (folder / "config.yaml").is_file() or not (old or journals):
        raise ValueError(f"{folder}: no journals of a run there")
    for name, file in journals.items():
        marks.adopt(folder, name, file)
    todo = {name: file for name, file in journals.items() if again or _due(folder, name, file)}
    new = [piece for piece in old if again or not _sent_mark(piece).exists()]
    for name in sorted({*journals, *(_id_of(piece).partition("-")[2] for piece in old)} - {*todo}):
        if not any(_id_of(piece) == marks.run_id(folder, name) for piece in new):
            say(f"{marks.run_id(folder, name)}: sent before")
    if new or todo:
        try:
            server.check(mirror.server_url())
        except RuntimeError as error:
            raise RuntimeError(f"not sent: {error}") from None
    for piece in new:
        _send_piece(piece, say)
    for name, file in todo.items() if again else ():
        if (known := marks.mark(file, marks.run_id(folder, name))).base is not None:
            marks.set_mark(file, marks.run_id(folder, name), replace(known, sent=-1))
    config, failed, sent = configuration.load(folder / "config.yaml"), [], len(new)
    for name, file in todo.items():
        id = marks.run_id(folder, name)
        say(f"{id}: sending {_contents(_lines_due(folder, name, file))}")
        refused = _replay(config, folder, name, file, say)
        failed += [f"{id}: not sent whole: {words}" for words in refused]
        sent += not refused
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise RuntimeError(f"{failed[0]}{more}; the same command sends what is left")
    return sent


def pieces(run_dir: Path) -> list[Path]:
    """The offline folders that no mirror wrote, in the order of their starts."""
    own = {
        piece
        for name, file in journal.journals(run_dir).items()
        for piece in marks.mark(file, marks.run_id(run_dir, name)).pieces
    }
    found = sorted((run_dir / "wandb").glob("offline-run-*"))
    return [path for path in found if path.name not in own and list(path.glob("run-*.wandb"))]


def _id_of(piece: Path) -> str:
    match = _FOLDER.fullmatch(piece.name)
    return match[1] if match else piece.name


def _sent_mark(piece: Path) -> Path:
    """By this file wandb knows a folder that was sent."""
    return piece / f"run-{_id_of(piece)}.wandb.synced"


def _lines_due(run_dir: Path, name: str, file: Path) -> list[dict[str, Any]]:
    sent = marks.mark(file, marks.run_id(run_dir, name)).sent
    return [line for line in journal.lines(file) if line["step"] > sent]


def _due(run_dir: Path, name: str, file: Path) -> bool:
    return bool(_lines_due(run_dir, name, file))


def _contents(lines: Sequence[dict[str, Any]]) -> str:
    """What lines hold, with sizes in MB: how many there are, then each artifact."""
    sizes: dict[str, list[int]] = {}
    for item in (item for line in lines for item in line.get("artifacts", [])):
        sizes.setdefault(f"{item['type']} {item['name']}", []).append(sum(item["files"].values()))
    words = [
        f"{sum(found) / 1e6:.1f} MB {name}" + (f" ({len(found)} versions)" if len(found) > 1 else "")
        for name, found in sizes.items()
    ]
    return f"{len(lines)} steps" + (f", and artifacts: {', '.join(words)}" if words else "")


def _replay(config: Config, run_dir: Path, name: str, file: Path, say: Callable[[str], None]) -> list[str]:
    """Tell a journal to the server, in a thread, whose server is watched and which Ctrl-C ends; what was refused."""
    failures: list[Exception] = []
    refused: list[str] = []
    (run_dir / "wandb").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=run_dir / "wandb", prefix="sync-") as place:
        told = mirror.Mirror(config, run_dir, online=True, only=name, place=Path(place))

        ended = threading.Event()

        def work() -> None:
            try:
                refused.extend(told.close())
            except Exception as error:  # noqa: BLE001 - raised by the caller
                failures.append(error)
                told.forget()
            finally:
                ended.set()

        with mirror.environment(Path(place)):
            threading.Thread(target=work, name="sync", daemon=True).start()
            try:
                _watch(ended, Path(place), say)
            except KeyboardInterrupt:
                mirror.kill_wandb()
                ended.wait()
                raise
    id = marks.run_id(run_dir, name)
    if failures:
        raise RuntimeError(f"{id}: not sent: {mirror.line_of(failures[0])}; the same command sends what is left")
    for piece in marks.mark(file, id).pieces if not refused else ():
        if (run_dir / "wandb" / piece).is_dir():
            _sent_mark(run_dir / "wandb" / piece).touch()
    return refused


def _watch(ended: threading.Event, place: Path, say: Callable[[str], None]) -> None:
    """Wait for the end; say, at once and then every ``_SAY_S``, that the server fails and is asked again."""
    said, position = -_SAY_S, 0
    while not ended.wait(LOOK_S):
        for log in place.glob("wandb/run-*/logs/debug-internal.log"):
            with log.open("rb") as source:
                source.seek(position)
                new = source.read()
            position += len(new)
            found = re.findall(rb'"msg":"api: retrying.*?"(?:status|error)":"?([^",}]*)', new)
            if found and time.monotonic() - said >= _SAY_S:
                said = time.monotonic()
                url, why = mirror.server_url(), found[-1].decode()
                say(f"{url} fails ({why}); asking again, Ctrl-C ends it and the same command goes on")


def _send_piece(piece: Path, say: Callable[[str], None]) -> None:
    """Send a folder by `wandb sync`."""
    say(f"{_id_of(piece)}: sending {piece.name}")
    url = mirror.server_url()
    environment = {name: value for name, value in os.environ.items() if name not in ("WANDB_MODE", "WANDB_SILENT")}
    retries = {f"WANDB_X_{part}_RETRY_MAX": str(mirror.RETRIES) for part in ("GRAPHQL", "FILE_STREAM", "FILE_TRANSFER")}
    environment = retries | environment | {"WANDB_BASE_URL": url, "WANDB_DIR": str(piece.parent.parent)}
    command = [sys.executable, "-m", "wandb", "sync", "--yes", "--include-synced", str(piece)]
    logs = lambda: set(piece.parent.glob("logs/debug-sync.*.log"))  # noqa: E731
    before = logs()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not _sent_mark(piece).exists():
        words = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        told = words[-1].removeprefix("wandb: ").removeprefix("ERROR ")[:300] if words else "it printed nothing"
        raise RuntimeError(f"{_id_of(piece)}: not sent: {told}; the same command sends what is left")
    if refused := [words for log in sorted(logs() - before) for words in mirror.refused_by(log)]:
        _sent_mark(piece).unlink()
        raise RuntimeError(f"{_id_of(piece)}: not sent whole: {refused[0]}; the same command sends what is left")
