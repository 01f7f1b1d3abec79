"""wandb's record files: how much of one is whole, when its writer was killed or its disk was full; its artifacts.

The format is LevelDB's log after a header of seven bytes: blocks of 32 KiB; chunks with checksum, length and kind (4,
2, 1 bytes) before the data. A chunk never crosses a block, and the CRC-32 is that of kind and data.
"""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HEADER_BYTES, CHUNK_BYTES, BLOCK_BYTES = 7, 7, 32768
MAGIC = b":W&B"
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4
"""Kinds of chunks: a whole record, or its parts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """An artifact that a record file asks to be uploaded, and the files of it."""

    type: str
    name: str
    files: tuple[Path, ...]

    @property
    def size(self) -> int:
        """Bytes of those of its files that are there."""
        return sum(file.stat().st_size for file in self.files if file.is_file())


def records(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The whole records of a record file's bytes, in order, each with the position of its end."""
    if len(data) < HEADER_BYTES or not data.startswith(MAGIC):
        return
    position, parts = HEADER_BYTES, b""
    while True:
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < CHUNK_BYTES:
            position += left
        if position + CHUNK_BYTES > len(data):
            return
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        end = position + CHUNK_BYTES + length
        if end > len(data) or zlib.crc32(data[position + CHUNK_BYTES - 1 : end]) != checksum:
            return
        parts += data[position + CHUNK_BYTES : end]
        position = end
        if kind in (WHOLE, LAST):
            yield end, parts
            parts = b""


def whole_bytes(data: bytes) -> int:
    """The length of the longest prefix that is whole records; 0 when not even the header is whole."""
    whole = HEADER_BYTES if len(data) >= HEADER_BYTES and data.startswith(MAGIC) else 0
    for end, _ in records(data):
        whole = end
    return whole


def of_run(run_dir: str | Path, id: str) -> list[Path]:
    """The offline record files of one wandb run of a run directory, in the order of their starts."""
    return sorted(Path(run_dir).glob(f"wandb/offline-run-*-{id}/run-{id}.wandb"))


def _of_kind(file: Path, kind: str) -> Iterator[Any]:
    """The whole records of one kind in a record file, in order; none where there is no file."""
    from wandb.proto.wandb_internal_pb2 import Record

    for _, data in records(file.read_bytes() if file.exists() else b""):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == kind:
            yield getattr(record, kind)


def artifacts(file: Path) -> list[Artifact]:
    """The artifacts that a record file names, in order; their files lie where they were when they were logged."""
    found = []
    for artifact in _of_kind(file, "artifact"):
        files = tuple(Path(entry.local_path) for entry in artifact.manifest.contents if entry.local_path)
        found.append(Artifact(type=artifact.type, name=artifact.name, files=files))
    return found


def write(target: Path, header: bytes, payloads: Iterable[bytes]) -> None:
    """Write a record file: the header of another one, and records."""
    out = bytearray(header[:HEADER_BYTES])
    for payload in payloads:
        rest, begun = payload, False
        while True:
            left = BLOCK_BYTES - len(out) % BLOCK_BYTES
            if left < CHUNK_BYTES:
                out += bytes(left)
                left = BLOCK_BYTES
            part, rest = rest[: left - CHUNK_BYTES], rest[left - CHUNK_BYTES :]
            kind = (MIDDLE if begun else FIRST) if rest else (LAST if begun else WHOLE)
            out += struct.pack("<IHB", zlib.crc32(bytes([kind]) + part), len(part), kind) + part
            begun = True
            if not rest:
                break
    target.write_bytes(out)


def run_of(file: Path) -> tuple[str, str, str]:
    """Entity ("" where the account's default is meant), project and id of the run that a record file is of."""
    for run in _of_kind(file, "run"):
        return run.entity, run.project, run.run_id
    return "", "", ""


def rows(file: Path) -> list[int | None]:
    """The ``step`` of every whole row of history that a record file holds, None for those that have none.

    Empty where there is no file.
    """
    found: list[int | None] = []
    for row in _of_kind(file, "history"):
        values = {".".join(item.nested_key) or item.key: item.value_json for item in row.item}
        found.append(int(values["step"]) if "step" in values else None)
    return found


def rest(file: Path, target: Path, rows: int, *, summary: bool) -> None:
    """Write to ``target`` the record file without its first ``rows`` rows of history; ``summary``: with the summary."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, kept, seen = file.read_bytes(), [], 0
    for _, payload in records(data):
        kind = Record.FromString(payload).WhichOneof("record_type")
        seen += kind == "history"
        if not (kind == "history" and seen <= rows) and (summary or kind != "summary"):
            kept.append(payload)
    write(target, data, kept)


def mend(file: Path) -> int | None:
    """Cut what is not whole off the end of a record file; the file as it was stays beside it, as ``.damaged``.

    The bytes cut off; None when there was nothing to cut.
    """
    data = file.read_bytes()
    whole = whole_bytes(data)
    if whole == len(data):
        return None
    part = file.with_name(f".{file.name}.part")
    part.write_bytes(data[:whole])
    shutil.copyfile(file, f"{file}.damaged")
    os.replace(part, file)
    return len(data) - whole
