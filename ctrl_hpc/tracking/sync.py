"""Sending a run's offline wandb files to the server: ``ctrl-hpc sync RUN``, from a node that reaches it."""

from __future__ import annotations

import base64
import json
import netrc
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from ctrl_hpc.tracking import wandb_file
from ctrl_hpc.tracking.wandb_upload import upload

CHECK_S = 20.0
"""Longest wait for the server's first answer."""
REST = "rest-"
"""How the names of record files begin that hold what a cut short sync left, while that is sent."""
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
    def begun(self) -> bool:
        """Whether an earlier sync began to send it: the server may have some of it, or all."""
        return Path(f"{self.file}.syncstate").exists()

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
    failed: list[str] = []
    for id, new in todo.items():
        if new:
            if not sent and not failed:
                check_server()
            say(f"{id}: sending {len(new)} of {len(found[id])} pieces, {contents(new)}")
            try:
                _send(Path(run_dir).absolute(), server_url(), found[id], new, say)
                sent += len(new)
            except Refused as error:
                failed.append(str(error))
    if failed:
        raise RuntimeError(failed[0] + (f" (and {len(failed) - 1} more runs)" if len(failed) > 1 else ""))
    return sent


class Refused(RuntimeError):
    """A run of which the server took all but some uploads."""


def contents(new: Sequence[Piece]) -> str:
    """What pieces hold, with sizes in MB: their own files, then each artifact."""
    own = sum(file.stat().st_size for piece in new for file in piece.folder.rglob("*") if file.is_file())
    sizes: dict[str, list[int]] = {}
    for piece in new:
        for artifact in wandb_file.artifacts(piece.file):
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
    viewer = _ask(url, "query Viewer { viewer { id } }", {}).get("viewer")
    if not viewer:
        raise RuntimeError(f"not sent: {url} does not know the key; run `wandb login --relogin`")


def _ask(url: str, query: str, given: Mapping[str, str | None]) -> dict[str, Any]:
    key = os.environ.get("WANDB_API_KEY") or _netrc_key(url)
    if not key:
        raise RuntimeError(f"not sent: no key for {url}; run `wandb login`, or set WANDB_API_KEY")
    body = json.dumps({"query": query, "variables": given}).encode()
    sign = base64.b64encode(f"api:{key}".encode()).decode()
    headers = {"authorization": f"Basic {sign}", "content-type": "application/json"}
    try:
        with urlopen(Request(f"{url}/graphql", data=body, headers=headers), timeout=CHECK_S) as answer:
            return json.load(answer).get("data") or {}
    except HTTPError as error:
        refused = "does not take the key" if error.code in (401, 403) else "has a fault; try again later"
        raise RuntimeError(f"not sent: {url} {refused} (HTTP {error.code})") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise RuntimeError(f"not sent: {url} cannot be reached: {reason}") from None


def _netrc_key(url: str) -> str | None:
    file = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
    try:
        known = netrc.netrc(file).authenticators(urlsplit(url).hostname or "")
    except FileNotFoundError:
        return None
    except (OSError, netrc.NetrcParseError) as error:
        raise RuntimeError(f"not sent: {file}: {error}") from None
    return known[2] if known else None


def _send(run_dir: Path, url: str, parts: Sequence[Piece], new: Sequence[Piece], say: Callable[[str], None]) -> None:
    """Send pieces of one run in their order; what an earlier call began goes first, without what has arrived.

    Raises RuntimeError in one line: :class:`Refused` where the server took all but some uploads.
    """
    begun = [piece for piece in new if piece.begun]
    lost: list[str] = []
    for batch in [*([piece] for piece in begun), [piece for piece in new if not piece.begun]]:
        if not batch:
            continue
        files = {piece: piece.file for piece in batch}
        try:
            for piece in batch:
                if piece.begun:
                    later = any(other.sent for other in parts[parts.index(piece) + 1 :])
                    files[piece] = _rest(piece, url, summary=not later)
            made = upload(list(files.values()), url, run_dir, say)
            for piece, file in files.items():
                failures = made.lost.get(file, [])
                lost += failures
                marked = Path(f"{file}.synced").exists()
                _mark(piece, sent=marked and not failures)
                if made.code != 0 or not marked:
                    told = "the server refused it" if "no message" in made.told else made.told  # wandb's words for that
                    raise RuntimeError(f"{piece.id}: not sent: {told}; the same command sends what is left")
        finally:
            for leftover in (path for piece in begun for path in piece.folder.glob(f"{REST}*")):
                leftover.unlink()
    if lost:
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise Refused(f"{new[0].id}: not sent whole: {lost[0]}{more}; the same command tries again")


def _mark(piece: Piece, *, sent: bool) -> None:
    """Let the next sync know whether a piece is to be sent."""
    mark = Path(f"{piece.file}.synced")
    if sent:
        mark.touch()
    else:
        mark.unlink(missing_ok=True)


def _rest(piece: Piece, url: str, *, summary: bool) -> Path:
    """A record file beside a piece's, of what the server does not have of it."""
    state = Path(f"{piece.file}.syncstate")
    start = int(json.loads(state.read_text(encoding="utf-8"))["starting_step"])
    entity, project, id = wandb_file.run_of(piece.file)
    query = (
        "query Lines($project: String, $entity: String, $name: String!) { model(name: $project, entityName: $entity) "
        "{ bucket(name: $name, missingOk: true) { historyLineCount } } }"
    )
    given = {"project": project, "entity": entity or None, "name": id}
    bucket = (_ask(url, query, given).get("model") or {}).get("bucket") or {}
    target = piece.folder / f"{REST}{piece.file.name}"
    wandb_file.rest(piece.file, target, int(bucket.get("historyLineCount") or 0) - start, summary=summary)
    shutil.copyfile(state, f"{target}.syncstate")
    return target
