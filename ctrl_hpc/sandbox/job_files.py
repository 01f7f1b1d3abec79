"""What a job is given and what it leaves: anonymous files, handed to a jail as descriptors, and the result in them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ctrl_hpc.records import Limits, TestResult
from ctrl_hpc.sandbox import judge, languages
from ctrl_hpc.sandbox.jail import Ended, executable, memory_file, reopened
from ctrl_hpc.sandbox.languages import Built

_WRITABLE = (False, False, True, True, False, True)


class JobFiles:
    """A job's anonymous files: source, stdin, stdout, stderr[, request, reply]."""

    def __init__(self) -> None:
        self._own: list[int] = []
        self.given: list[int] = []
        """Descriptors for the jail, which may read the first two and the fifth, and write the others."""

    def add(self, content: bytes, writable: bool) -> None:
        """One more file."""
        self._own.append(memory_file("job", content))
        self.given.append(reopened(self._own[-1], writable))

    def give(self, fd: int) -> None:
        """Hand over a descriptor that is nobody else's."""
        self.given.append(fd)

    def contents(self, index: int, limit: int) -> tuple[bytes, int]:
        """The first ``limit`` bytes of a file, and its size."""
        size = os.fstat(self._own[index]).st_size
        return (os.pread(self._own[index], min(size, limit), 0) if size else b""), size

    def close(self) -> None:
        """Close them all."""
        for fd in [*self._own, *self.given]:
            os.close(fd)


@contextmanager
def job_files(source: bytes, stdin: bytes = b"", *channels: bytes) -> Iterator[JobFiles]:
    """A job's files: what it reads, two empty ones for its outputs, and its channels of request and reply."""
    files = JobFiles()
    try:
        for content, writable in zip((source, stdin, b"", b"", *channels), _WRITABLE, strict=False):
            files.add(content, writable)
        yield files
    finally:
        files.close()


@contextmanager
def program_files(source: bytes | Built, stdin: bytes) -> Iterator[JobFiles]:
    """The files of a program, as text or compiled, that reads ``stdin``."""
    with job_files(languages.BINARY.encode() if isinstance(source, Built) else source, stdin) as files:
        if isinstance(source, Built):
            assert source.binary is not None
            files.give(executable(source.binary))
        yield files


@contextmanager
def pipes(count: int) -> Iterator[list[tuple[int, int]]]:
    """So many pipes, each as its end to read and its end to write."""
    pairs = [os.pipe() for _ in range(count)]
    try:
        yield pairs
    finally:
        for fd in sum(pairs, ()):
            os.close(fd)


def encode(text: str) -> bytes:
    """Text as bytes: what JSON cannot say is said by surrogates, those that stand for no byte are kept as they are."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


def source_of(program: str, preamble: str = "") -> bytes:
    """What a jail takes as source: the preamble, which holds no zero byte, one such byte, the program."""
    return preamble.encode() + b"\0" + program.encode("utf-8", "surrogatepass")


def result_of(ended: Ended, files: JobFiles, limits: Limits) -> TestResult:
    """What the program did, ``accepted`` standing for "nothing wrong so far"."""
    stdout, stdout_size = files.contents(2, limits.output_bytes)
    stderr, stderr_size = files.contents(3, limits.output_bytes)
    return TestResult(
        status=judge.failure(ended, max(stdout_size, stderr_size), limits) or "accepted",
        stdout=stdout,
        stderr=stderr,
        exit_code=ended.exit_code,
        signal=ended.signal,
        cpu_s=ended.cpu_s,
        wall_s=ended.wall_s,
        peak_memory_mb=ended.peak_memory_mb,
    )
