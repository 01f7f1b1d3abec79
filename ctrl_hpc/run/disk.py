"""A run directory whose disk is full: found out, reported, and waited for, so that the run continues."""

from __future__ import annotations

import errno
import re
import shutil
import time
import uuid
from pathlib import Path

from ctrl_hpc.progress import console

FULL = (errno.ENOSPC, errno.EDQUOT)
_NEEDED_MB = 16
"""There is space again when this much can be written."""
POLL_S = 2.0
_TOLD_EVERY_S = 45.0
_FULL_TEXT = re.compile(r"no space left on device|disk quota exceeded|os error 28|os error 122", re.IGNORECASE)


def says_full(text: str) -> bool:
    """Whether an error's text is that of a full disk."""
    return _FULL_TEXT.search(text) is not None


def is_full(folder: Path) -> bool:
    """Whether ``_NEEDED_MB`` cannot be written there now, for want of space or quota."""
    if shutil.disk_usage(folder).free < _NEEDED_MB << 20:
        return True
    probe = folder / f".space-{uuid.uuid4().hex}"
    try:
        with open(probe, "wb") as out:
            for _ in range(_NEEDED_MB):
                out.write(bytes(1 << 20))
    except OSError as error:
        if error.errno not in FULL:
            raise
        return True
    finally:
        probe.unlink(missing_ok=True)
    return False


def await_space(folder: Path, patience_s: float) -> None:
    """Return once there is space; what is missing is reported at once and then every ``_TOLD_EVERY_S``.

    Raises RuntimeError after ``patience_s``.
    """
    began, told = time.monotonic(), -_TOLD_EVERY_S
    while is_full(folder):
        waited = time.monotonic() - began
        free = shutil.disk_usage(folder).free >> 20
        if waited > patience_s:
            raise RuntimeError(f"{folder}: full for {waited:.0f} s ({free} MiB free); make space, run it again")
        if waited - told >= _TOLD_EVERY_S:
            told = waited
            console.print(f"{folder}: the disk is full ({free} MiB free); waiting for space", soft_wrap=True)
        time.sleep(POLL_S)
