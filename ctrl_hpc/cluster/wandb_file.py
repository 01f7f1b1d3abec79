"""wandb's record files: how much of one is whole, when its writer was killed or its disk was full; its artifacts.

The format is LevelDB's log after a header of seven bytes: blocks of 32 KiB; chunks with checksum, length and kind (4,
2, 1 bytes) before the data. A chunk never crosses a block, and the CRC-32 is that of kind and data.
"""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HEADER_BYTES, CHUNK_BYTES, BLOCK_BYTES = 7, 7, 32768
MAGIC = b":W&B"
WHOLE, LAST = 1, 4
"""Kinds of chunks with which a record ends."""


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

    @property
    def missing(self) -> list[Path]:
        """Files that are not there (any more)."""
        return [file for file in self.files if not file.is_file()]


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


def artifacts(file: Path) -> list[Artifact]:
    """The artifacts that a record file names, in order; their files lie where they were when they were logged."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for _, data in records(file.read_bytes()):
        record = Record.FromString(data)
        if record.WhichOneof("record_type") == "artifact":
            entries = [entry.local_path for entry in record.artifact.manifest.contents]
            files = tuple(Path(path) for path in entries if path)
            found.append(Artifact(type=record.artifact.type, name=record.artifact.name, files=files))
    return found


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
