"""Files put into /tmp before a program runs, and fetched after it has ended with all its processes.

Fetching trusts nothing that the program left: it opens each name component by component without following links, and
takes regular files only, so neither a link, a pipe nor ``..`` leads anywhere else.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import stat

_FOLDER = "/tmp"
_ROOTS = ("tmp", "mnt")
"""Where absolute paths may lead: ``/mnt`` is the same folder under the name that SandboxFusion's images have."""
_MAX_FILE_BYTES = 16 << 20
"""Of one file, and of all that are fetched together."""


def parts(path: str) -> list[str]:
    """The components of a path below /tmp, relative to it or absolute; ValueError when it leads elsewhere."""
    whole = os.path.normpath(os.path.join(_FOLDER, path))
    names = whole.split("/")[2:]
    if whole.split("/")[1] not in _ROOTS or not names or any("\0" in name or len(name) > 255 for name in names):
        raise ValueError(f"{path!r} is not a path below the working folder")
    return names


def put(request: bytes) -> None:
    """Write the files of ``{path: base64}``."""
    for path, content in json.loads(request).items():
        names = parts(path)
        folder = os.path.join(_FOLDER, *names[:-1])
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, names[-1]), "wb") as file:
            file.write(base64.b64decode(content))


def fetch(request: bytes) -> bytes:
    """``{path: base64}`` of those files of ``[path, ...]`` that are there, as JSON; what is too large is left out."""
    found: dict[str, str] = {}
    left = _MAX_FILE_BYTES
    for path in json.loads(request):
        try:
            content = _read(parts(path), left)
        except OSError:  # absent, a link, a pipe, unreadable, too large: nothing to fetch
            continue
        left -= len(content) + len(path)
        found[path] = base64.b64encode(content).decode("ascii")
    return json.dumps(found).encode()


def _read(names: list[str], most: int) -> bytes:
    fd = os.open(_FOLDER, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in names[:-1]:
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
            os.close(fd)
            fd = inner
        file = os.open(names[-1], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=fd)
    finally:
        os.close(fd)
    try:
        info = os.fstat(file)
        if not stat.S_ISREG(info.st_mode) or info.st_size > most:
            raise OSError("not a plain file of moderate size")
        return os.pread(file, info.st_size, 0)
    finally:
        os.close(file)


def check(files: dict[str, str], names: list[str]) -> None:
    """ValueError names a path or content that cannot be used."""
    for path in [*files, *names]:
        parts(path)
    for path, content in files.items():
        try:
            base64.b64decode(content)  # newlines and the like are passed over
        except (binascii.Error, ValueError):
            raise ValueError(f"files: the content of {path!r} is not base64") from None
