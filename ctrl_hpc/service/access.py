"""Whose a file or a folder is: what others could have written is not believed."""

from __future__ import annotations

import os
from pathlib import Path


def is_ours(info: os.stat_result) -> bool:
    """Whether a file belongs to this user, or to root: what others wrote is not believed."""
    return info.st_uid in (os.geteuid(), 0)


def make_private(folder: Path) -> None:
    """A folder that others cannot enter; one that is there keeps its readers, but no other may write."""
    if folder.is_dir():
        mode = folder.stat().st_mode
        if mode & 0o022:
            folder.chmod(mode & 0o7755)
    else:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
