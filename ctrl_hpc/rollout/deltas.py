"""Weights as the difference to an earlier version: by tensor, compressed, checksummed, the same bits when applied.

A folder with differences holds ``delta.json`` and safetensors files of bytes. A tensor's difference is the exclusive or
of its bits with the earlier ones, cut into planes (all first bytes of its numbers, all second ones, ...), each
compressed: where few bits of few numbers change, most planes are zeros. A tensor that is not named has not changed.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_ABOUT = "delta.json"
_PLANE = struct.Struct("<Q")


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What a folder of weights is: whole, or a difference."""

    state: str
    """A name that these very weights alone have."""
    base: str | None = None
    """Name of the folder beside it that the difference is to; None: the folder is whole."""
    base_state: str | None = None
    tensors: dict[str, dict[str, Any]] | None = None
    """Of each changed tensor: its file, dtype, shape, and the checksum of its new bytes."""

    @classmethod
    def read(cls, folder: Path) -> About | None:
        """None for a folder that says nothing of itself: whole, and not the base of any other."""
        try:
            return cls(**json.loads((folder / _ABOUT).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder / _ABOUT}: cannot be read: {error}") from None

    def write(self, folder: Path) -> None:
        """Write it into the folder."""
        told = {"state": self.state, "base": self.base, "base_state": self.base_state, "tensors": self.tensors}
        (folder / _ABOUT).write_text(json.dumps(told), encoding="utf-8")


def _bits(tensor: Tensor) -> np.ndarray:
    """A tensor's bytes; one with no dimension has them too."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()


def pack(new: Tensor, old: Tensor) -> bytes | None:
    """The difference of two tensors of one dtype and shape, on the CPU; None where all bits are the same."""
    assert new.dtype == old.dtype and new.shape == old.shape, "two versions of one tensor"
    changed = _bits(new) ^ _bits(old)
    if not changed.any():
        return None
    planes = changed.reshape(-1, new.element_size()).T
    packed = [zlib.compress(np.ascontiguousarray(plane), 1) for plane in planes]
    return b"".join(_PLANE.pack(len(plane)) + plane for plane in packed)


def unpack(packed: bytes, old: Tensor) -> Tensor:
    """The tensor whose difference to ``old`` was packed. Raises ValueError where the bytes are no such difference."""
    size, at, planes = old.element_size(), 0, []
    try:
        for _ in range(size):
            (length,) = _PLANE.unpack_from(packed, at)
            at += _PLANE.size
            planes.append(np.frombuffer(zlib.decompress(packed[at : at + length]), dtype=np.uint8))
            at += length
        changed = np.stack(planes, axis=1).reshape(-1)
        bits = torch.from_numpy(_bits(old) ^ changed)
    except (zlib.error, struct.error, ValueError) as error:
        raise ValueError(f"broken difference: {error}") from None
    return bits.view(old.dtype).reshape(old.shape)


def write_part(
    tensors: Iterable[tuple[str, Tensor]], previous: dict[str, Tensor], file: Path
) -> dict[str, dict[str, Any]]:
    """Write the differences of some tensors to ``previous``, which becomes them; what ``delta.json`` says of each."""
    packed: dict[str, Tensor] = {}
    told: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors:
        difference = pack(tensor, previous[name])
        previous[name] = tensor
        if difference is not None:
            packed[name] = torch.frombuffer(bytearray(difference), dtype=torch.uint8)
            dtype = str(tensor.dtype).removeprefix("torch.")
            told[name] = {"file": file.name, "dtype": dtype, "shape": list(tensor.shape), "crc": checksum(tensor)}
    if packed:
        save_file(packed, file)
    return told


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's bytes."""
    return zlib.crc32(_bits(tensor))


def apply(folder: Path, about: About, state: dict[str, Tensor], held: dict[str, Tensor]) -> None:
    """Bring ``state`` to a folder's version; a tensor that is not in it yet is taken from ``held``.

    Raises ValueError where a tensor is missing, broken, or was not the base's; ``state`` is worthless then.
    """
    files: dict[str, Any] = {}
    for name, told in (about.tensors or {}).items():
        old = state[name] if name in state else held.get(name)
        if old is None or list(old.shape) != told["shape"]:
            raise ValueError(f"{folder}: weight {name} does not fit the served model")
        try:
            if told["file"] not in files:
                files[told["file"]] = safe_open(str(folder / told["file"]), framework="pt")
            packed = files[told["file"]].get_tensor(name).numpy().tobytes()
            state[name] = unpack(packed, old.detach().cpu().to(getattr(torch, told["dtype"])))
        except (SafetensorError, OSError, ValueError) as error:
            raise ValueError(f"{folder}: weight {name}: {error}") from None
        if checksum(state[name]) != told["crc"]:
            raise ValueError(f"{folder}: weight {name}: its checksum is wrong; the base was another, or the disk errs")
