"""Records written part by part, so that work that is killed loses at most the part in hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ctrl_hpc import jsonl


def in_parts[T, R](
    file: Path, record: type[R], items: Sequence[T], size: int, make: Callable[[Sequence[T], int], list[R]]
) -> list[R]:
    """The records of a file; when it is not there, ``make(items[i * size : (i + 1) * size], i)`` for every i, kept.

    Finished parts lie in ``FILE.parts/`` until all are; the records come back as they are read, so that a run that was
    killed and one that was not go on from the same data.
    """
    folder = file.with_name(file.name + ".parts")
    if not file.exists():
        records: list[Any] = []
        for number, start in enumerate(range(0, len(items), size)):
            part = folder / f"{number:05d}.jsonl"
            if part.exists():
                records += jsonl.read(record, part)
            else:
                made = make(items[start : start + size], number)
                if len(items) > size:
                    jsonl.write(part, made)
                records += made
        jsonl.write(file, records)
    if folder.exists():
        for part in folder.iterdir():
            part.unlink()
        folder.rmdir()
    return jsonl.read(record, file)
