"""What wandb wrote offline, read back, to know what it holds: a disk that was full takes nothing, and wandb goes on.

A ``.wandb`` file is a LevelDB log (https://github.com/google/leveldb/blob/main/doc/log_format.md) of protobuf records
behind a header of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

_HEADER_BYTES, _BLOCK_BYTES = 7, 32768
_WHOLE, _LAST = 1, 4
"""Kinds of parts that end a record."""


def parts(data: bytes) -> Iterator[bytes]:
    """The records that are whole, as bytes; it ends where the file is torn."""
    position, record = _HEADER_BYTES, b""
    while True:
        left = _BLOCK_BYTES - position % _BLOCK_BYTES
        position += left if left < _HEADER_BYTES else 0
        if position + _HEADER_BYTES > len(data):
            return
        _, length, kind = struct.unpack_from("<IHB", data, position)
        start, position = position + _HEADER_BYTES, position + _HEADER_BYTES + length
        if position > len(data) or kind == 0:
            return
        record += data[start:position]
        if kind in (_WHOLE, _LAST):
            yield record
            record = b""
