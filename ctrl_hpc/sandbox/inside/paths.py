"""What programs may open though a jail has no such file: the standard streams by path, and their own source."""

from __future__ import annotations

import builtins
import io
import posix as os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import typing

PROGRAM_NAME = "solution.py"
_STREAMS = {
    f"{folder}{name}": fd
    for fd, stream in enumerate(("stdin", "stdout", "stderr"))
    for folder, name in (("/dev/", stream), ("/dev/fd/", fd), ("/proc/self/fd/", fd))
}


class Loader:
    """Where a program came from, as :mod:`inspect` and :mod:`linecache` ask for its source."""

    def __init__(self, source: bytes) -> None:
        self._source = source

    def get_source(self, name: str) -> str:
        """The program's text."""
        return self._source.decode("utf-8", "replace")


def serve(source: bytes) -> None:
    """Let ``open`` find the source where no file has its name, and the standard streams by path, as ``os.open`` too.

    The streams share their position with what is open already, as pipes do.
    """
    open_file, open_fd = io.open, os.open

    def open(file: typing.Any, mode: str = "r", *args: typing.Any, **options: typing.Any) -> typing.Any:
        if isinstance(file, str) and file in _STREAMS:
            return open_file(os.dup(_STREAMS[file]), mode, *args, **options)
        try:
            return open_file(file, mode, *args, **options)
        except FileNotFoundError:
            if file != PROGRAM_NAME:
                raise
            return io.BytesIO(source) if "b" in mode else io.StringIO(source.decode("utf-8", "replace"))

    def open_by_path(path: typing.Any, *args: typing.Any, **options: typing.Any) -> int:
        if isinstance(path, str) and path in _STREAMS:
            return os.dup(_STREAMS[path])
        return open_fd(path, *args, **options)

    builtins.open = io.open = open  # type: ignore[assignment]
    for module in (os, sys.modules.get("os")):
        if module is not None:
            module.open = open_by_path  # type: ignore[attr-defined]
