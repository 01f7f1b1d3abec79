"""What a file or a folder holds, in a few letters: two places with one fingerprint hold the same models or problems."""

from __future__ import annotations

import hashlib
from pathlib import Path

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
