"""Sending a run's offline wandb files to the server: ``ctrl-hpc sync RUN``, from a node that reaches it."""

from __future__ import annotations

import base64
import json
import netrc
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from ctrl_hpc.cluster import wandb_file

CHECK_S = 20.0
"""Longest wait for the server's first answer."""
RETRIES = {f"WANDB_X_{part}_RETRY_MAX": "1000" for part in ("GRAPHQL", "FILE_STREAM", "FILE_TRANSFER")}
"""wandb marks a piece as sent although it gave up an upload, so that it must not give up: Ctrl-C leaves it unmarked."""
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

    The pieces of a run that was requeued become one run, in order. What a killed process left half written is cut off
    first. Raises RuntimeError, in one line, when the server cannot be reached or refuses; the same call then sends
    what is left, and what was sent is not sent again.
    """
    found = pieces(run_dir)
    todo = {id: [piece for piece in parts if again or not piece.sent] for id, parts in found.items()}
    for id, parts in found.items():
        todo[id] = [piece for piece in todo[id] if _readable(piece, say)]
        if not todo[id]:
            say(f"{id}: {'sent before' if all(piece.sent for piece in parts) else 'nothing to send'}")
    sent = 0
    for id, new in todo.items():
        if new:
            if not sent:
                check_server()
            say(f"{id}: sending {len(new)} of {len(found[id])} pieces, {contents(new)}")
            _send(id, new, again)
            sent += len(new)
    return sent


def contents(new: Sequence[Piece]) -> str:
    """What pieces hold, with sizes in MB: their own files, then each artifact.

    Raises RuntimeError in one line when a file of an artifact is not there.
    """
    own = sum(file.stat().st_size for piece in new for file in piece.folder.rglob("*") if file.is_file())
    sizes: dict[str, list[int]] = {}
    for piece in new:
        for artifact in wandb_file.artifacts(piece.file):
            if artifact.missing:
                raise RuntimeError(
                    f"{piece.id}: not sent: {artifact.type} {artifact.name}: {artifact.missing[0]} is not there (any "
                    "more); artifacts are sent from where the run wrote them"
                )
            # what wandb makes of a table is named after the run
            name = "tables" if artifact.type == "run_table" else f"{artifact.type} {artifact.name}"
            sizes.setdefault(name, []).append(artifact.size)
    words = [
        f"{sum(found) / 1e6:.1f} MB {name}" + (f" ({len(found)} versions)" if len(found) > 1 else "")
        for name, found in sizes.items()
    ]
    return f"{own / 1e6:.1f} MB" + (f", and artifacts: {', '.join(words)}" if words else "")


def _readable(piece: Piece, say: Callable[[str], None]) -> bool:
    """Whether there is anything in a piece to send, once what is not whole is cut off."""
    if piece.sent:
        return True
    try:
        cut = wandb_file.mend(piece.file)
    except OSError as error:
        raise RuntimeError(f"{piece.id}: {piece.file}: cannot be read: {error.strerror}") from None
    if cut:
        say(f"{piece.id}: {piece.file.name}: cut short when it was written; {cut} bytes of its end are left out")
    return piece.file.stat().st_size > wandb_file.HEADER_BYTES


def server_url() -> str:
    """Where wandb sends to: the environment's or the settings' server."""
    from wandb.sdk import wandb_setup  # wandb.setup() would start its service

    return str(wandb_setup.singleton().settings.base_url).rstrip("/")


def check_server() -> None:
    """Raises RuntimeError when the server cannot be reached, answers with an error, or does not take the key."""
    url = server_url()
    key = os.environ.get("WANDB_API_KEY") or _netrc_key(url)
    if not key:
        raise RuntimeError(f"not sent: no key for {url}; run `wandb login`, or set WANDB_API_KEY")
    query = json.dumps({"query": "query Viewer { viewer { id } }"}).encode()
    sign = base64.b64encode(f"api:{key}".encode()).decode()
    headers = {"authorization": f"Basic {sign}", "content-type": "application/json"}
    try:
        with urlopen(Request(f"{url}/graphql", data=query, headers=headers), timeout=CHECK_S) as answer:
            viewer = json.load(answer).get("data", {}).get("viewer")
    except HTTPError as error:
        refused = "does not take the key" if error.code in (401, 403) else "has a fault; try again later"
        raise RuntimeError(f"not sent: {url} {refused} (HTTP {error.code})") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise RuntimeError(f"not sent: {url} cannot be reached: {reason}") from None
    if not viewer:
        raise RuntimeError(f"not sent: {url} does not know the key; run `wandb login --relogin`")


def _netrc_key(url: str) -> str | None:
    file = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        known = netrc.netrc(file).authenticators(urlsplit(url).hostname or "")
    except FileNotFoundError:
        return None
    except (OSError, netrc.NetrcParseError) as error:
        raise RuntimeError(f"not sent: {file}: {error}") from None
    return known[2] if known else None


def _send(id: str, new: Sequence[Piece], again: bool) -> None:
    command = [sys.executable, "-m", "wandb", "sync", "--yes", *(["--include-synced"] if again else [])]
    environment = {name: value for name, value in os.environ.items() if name not in ("WANDB_MODE", "WANDB_SILENT")}
    folders = [str(piece.folder) for piece in new]
    done = subprocess.run([*command, *folders], capture_output=True, text=True, env=RETRIES | environment, check=False)
    if done.returncode != 0 or not (again or all(piece.sent for piece in new)):
        words = [line.strip() for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        told = words[-1].removeprefix("wandb: ").removeprefix("ERROR ")[:300] if words else "wandb sync printed nothing"
        if "no message" in told:  # wandb's words for a refusal
            told = "the server refused it"
        raise RuntimeError(f"{id}: not sent: {told}; the same command sends what is left")
