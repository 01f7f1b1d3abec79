"""Where commands may write: never onto an input, never over what is not theirs; told before any work is done."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path


def place(text: str) -> Path:
    """A path of the command line; ``~`` is the home folder, in quotes too."""
    return Path(text).expanduser()


def check_folder(folder: Path, key: str, *, ours: str) -> None:
    """Raises ValueError unless a folder can be written: new, empty, or one that holds the file ``ours``."""
    _check_parents(folder, key)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / ours).is_file():
        raise ValueError(
            f"{key}: {folder} is not empty and holds no {ours}: nothing was overwritten; name another folder"
        )


def check_file(file: Path, key: str, *, inputs: Iterable[str | Path | None] = (), beside: str | None = None) -> None:
    """Raises ValueError unless a file can be written: it is no input and, where it exists, one of ours.

    ``beside``: the ending of the file that stands beside one of ours; None: any file may be written over.
    """
    for source in inputs:
        if source and file.exists() and Path(source).expanduser().exists() and file.samefile(Path(source).expanduser()):
            raise ValueError(f"{key}: {file} is an input: nothing was overwritten; name another file")
    if file.is_dir():
        raise ValueError(f"{key}: {file} is a folder; name a file")
    _check_parents(file.absolute().parent, key)
    if beside is not None and file.exists() and not file.with_name(file.name + beside).exists():
        raise ValueError(f"{key}: {file} exists and is not of this command: nothing was overwritten; name another file")


def _check_parents(folder: Path, key: str) -> None:
    above = folder.absolute()
    while not above.exists():
        above = above.parent
    if not above.is_dir():
        raise ValueError(f"{key}: {above} is a file, not a folder")
    if not os.access(above, os.W_OK) or shutil.disk_usage(above).total == 0:
        raise ValueError(f"{key}: {above} is not writable")
