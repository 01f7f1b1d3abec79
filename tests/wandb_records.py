"""What wandb wrote offline, read back: its record files are LevelDB logs of protobuf records."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER_BYTES, BLOCK_BYTES = 7, 32768


def records(file: Path) -> Iterator[Any]:
    """The whole records of a ``.wandb`` file: blocks of 32 KiB; checksum, length, kind, data."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, part = file.read_bytes(), HEADER_BYTES, b""
    while True:
        left = BLOCK_BYTES - position % BLOCK_BYTES
        position += left if left < HEADER_BYTES else 0
        if position + HEADER_BYTES > len(data):
            return
        _, length, kind = struct.unpack_from("<IHB", data, position)
        part += data[position + HEADER_BYTES : position + HEADER_BYTES + length]
        position += HEADER_BYTES + length
        if position > len(data):
            return
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(part)
            part = b""


def pieces(run_dir: Path, name: str) -> list[Path]:
    """The record files of a journal's wandb run, or of a trial's, in the order of their starts."""
    return sorted(run_dir.glob(f"wandb/offline-run-*{name}/run-*{name}.wandb"))


def history(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a wandb run on disk, in the order in which a sync sends them."""
    rows = []
    for file in pieces(run_dir, name):
        for record in records(file):
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def summary(run_dir: Path, name: str) -> dict[str, Any]:
    """The summary of a wandb run on disk."""
    found: dict[str, Any] = {}
    for file in pieces(run_dir, name):
        for record in records(file):
            if record.WhichOneof("record_type") == "summary":
                items = record.summary.update
                found |= {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
    return found


def steps(run_dir: Path, name: str) -> list[int]:
    """The steps of a wandb run on disk."""
    return [row["step"] for row in history(run_dir, name) if "step" in row]
