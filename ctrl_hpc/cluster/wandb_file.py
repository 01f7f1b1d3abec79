"""wandb's record files: how much of one is whole, when its writer was killed or its disk was full.

The format is LevelDB's log after a header of seven bytes: blocks of 32 KiB; chunks with checksum, length and kind (4,
2, 1 bytes) before the data. A chunk never crosses a block, and the CRC-32 is that of kind and data.
"""

from __future__ import annotations

import os
import shutil
import struct
import zlib
from pathlib import Path

HEADER_BYTES, CHUNK_BYTES, BLOCK_BYTES = 7, 7, 32768
MAGIC = b":W&B"
WHOLE, LAST = 1, 4
"""Kinds of chunks with which a record ends."""


def whole_bytes(data: bytes) -> int:
    """The length of the longest prefix that is whole records; 0 when not even the header is whole."""
    if len(data) < HEADER_BYTES or not data.startswith(MAGIC):
        return 0
    position = whole = HEADER_BYTES
    while True:
        left = BLOCK_BYTES - position % BLOCK_BYTES
        if left < CHUNK_BYTES:
            position += left
        if position + CHUNK_BYTES > len(data):
            return whole
        checksum, length, kind = struct.unpack_from("<IHB", data, position)
        end = position + CHUNK_BYTES + length
        if end > len(data) or zlib.crc32(data[position + CHUNK_BYTES - 1 : end]) != checksum:
            return whole
        position = end
        if kind in (WHOLE, LAST):
            whole = end


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
