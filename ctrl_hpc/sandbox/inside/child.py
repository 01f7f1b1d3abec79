"""What a forked child does before it becomes the program: limits, descriptors, streams, then the untrusted source.

Nothing in this process is trusted once the source runs: results are judged from the exit status and from files that
the executor made, and everything that could tell the right answer is elsewhere.
"""

from __future__ import annotations

import _signal as signal
import _sitebuiltins
import atexit
import builtins
import gc
import io
import mmap
import posix as os
import resource
import sys

import paths
import recursion

TYPE_CHECKING = False
if TYPE_CHECKING:
    import types
    import typing

RUN, SERVE, CHECK, PUT, FETCH, EXECUTE = range(6)
"""Kinds of jobs: a program with stdin; a solution whose functions are called; a test that calls them; files put into
/tmp; files fetched from it; a binary with arguments."""
PROGRAM_NAME = paths.PROGRAM_NAME
SCRATCH = "/tmp"
CANNOT_EXECUTE = 127
_ENVIRONMENT = {b"PATH": b"/usr/bin", b"HOME": b"/tmp", b"LANG": b"C.UTF-8", b"TMPDIR": b"/tmp"}
_HARNESS = "/runner"
_RAISE = compile("raise", "", "exec").co_code[2]
"""The code of a ``raise`` statement, which follows the two bytes that begin every function."""
_OPEN_FILES = 64
_PENDING_SIGNALS = 128
"""Queued signals and timers, which the kernel counts for all of a user's processes together."""
_BILLION = 10**9

for _name in ("exit", "quit"):
    setattr(builtins, _name, _sitebuiltins.Quitter(_name, "Ctrl-D (i.e. EOF)"))


def main(kind: int, fds: list[int], pending: mmap.mmap, note: mmap.mmap, limits: tuple[int, ...]) -> None:
    """Become the program; never returns.

    ``pending[0]`` is cleared, and the page given up, before anything depends on the program: whatever fails until then
    is the executor's fault, whatever fails later is the program's.
    """
    # Received descriptors are numbered upwards from 3, so no dup2 overwrites one still to be moved.
    source_fd = os.dup(fds[0])
    for target, fd in enumerate(fds[1:]):
        assert fd > target
        os.dup2(fd, target, inheritable=target < 3)
    os.closerange(len(fds) - 1, source_fd)
    _limit(*limits)
    pending[0] = 0
    pending.close()
    try:
        source = _read(source_fd)
    except MemoryError:
        note[0] = 1
        os._exit(1)
    os.closerange(source_fd, _OPEN_FILES)
    if kind == EXECUTE:
        _become(source, len(fds) > 4)
    _open_streams()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    gc.enable()
    if kind == CHECK:
        _module("checker").main(source)
    if kind in (PUT, FETCH):
        _move_files(kind, source)
    preamble, _, source = source.partition(b"\0")
    recursion.lift()
    paths.serve(source)
    serving = _module("solution") if kind == SERVE else None
    name = "__main__" if kind == RUN else "solution"
    module = type(sys)(name)
    module.__dict__.update(__builtins__=builtins, __file__=PROGRAM_NAME, __loader__=paths.Loader(source))
    sys.modules[name] = module
    sys.argv = [PROGRAM_NAME]
    _execute(preamble, source, module.__dict__, note, serving)


def _become(request: bytes, given: bool) -> None:
    """Become the binary that was given, as the fifth descriptor, or the file that the first argument names.

    The kernel reads the descriptor, which is closed as the binary begins: the jail's files hold no binary to execute.
    """
    arguments = request.split(b"\0")
    try:
        os.execve(3 if given else arguments[0], arguments, _ENVIRONMENT)
    except OSError as error:
        os.write(2, f"cannot execute: {error}\n".encode())
        os._exit(CANNOT_EXECUTE)


def _module(name: str) -> typing.Any:
    """A module of ours or of the library, never one that a program left in its folder."""
    sys.path[0] = _HARNESS
    try:
        return __import__(name)
    finally:
        sys.path[0] = SCRATCH


def _move_files(kind: int, request: bytes) -> None:
    files = _module("files")
    if kind == PUT:
        files.put(request)
    else:
        os.write(1, files.fetch(request))
    os._exit(0)


def _limit(cpu_ns: int, memory: int, file_size: int, processes: int, stack: int) -> None:
    cpu_s = -(-cpu_ns // _BILLION) + 1  # a backstop: the runner enforces the limit itself, to the millisecond
    for which, value in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_FSIZE, file_size),
        (resource.RLIMIT_NPROC, processes),
        (resource.RLIMIT_SIGPENDING, _PENDING_SIGNALS),
        (resource.RLIMIT_AS, memory),
    ):
        resource.setrlimit(which, (value, value))
    # The hard limit stays open, as judges leave it: programs raise their own. Memory is bounded otherwise.
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    resource.setrlimit(resource.RLIMIT_STACK, (stack if hard == resource.RLIM_INFINITY else min(stack, hard), hard))


def _read(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def _open_streams() -> None:
    # Newlines are left as they are ("\n" translates none), as an interpreter's own streams do here.
    stdin = _stream(io.BufferedReader, 0, "r", "stdin", "surrogateescape")
    stdout = _stream(io.BufferedWriter, 1, "w", "stdout", "surrogateescape")
    stderr = _stream(io.BufferedWriter, 2, "w", "stderr", "backslashreplace")
    vars(sys).update(stdin=stdin, __stdin__=stdin, stdout=stdout, __stdout__=stdout, stderr=stderr, __stderr__=stderr)


def _stream(kind: typing.Any, fd: int, mode: str, name: str, errors: str) -> io.TextIOWrapper:
    """A standard stream, with the ``mode`` and the name that an interpreter gives it (fast readers ask for them)."""
    raw = io.FileIO(fd, mode, closefd=False)
    raw.name = f"<{name}>"
    stream = io.TextIOWrapper(kind(raw), "utf-8", errors, "\n", line_buffering=fd == 2)
    vars(stream)["mode"] = mode
    return stream


def _execute(preamble: bytes, source: bytes, namespace: dict, note: mmap.mmap, serving: typing.Any) -> None:
    """Run the program as a script would be run, then leave as an interpreter would, without tearing it down.

    The preamble is trusted and comes first. With ``__any_exit__`` it says that no exit of the program is an error.
    """
    stdout, leave, any_exit = sys.stdout, os._exit, False
    try:
        if preamble:
            exec(compile(preamble, "preamble", "exec", dont_inherit=True), namespace)
            any_exit = namespace.pop("__any_exit__", False)
        given = dict(namespace)
        code = compile(source, PROGRAM_NAME, "exec", dont_inherit=True)
        exec(code, namespace)
        if serving is not None:
            serving.serve(namespace, given)
        status = 0
    except SystemExit as error:
        status = 0 if any_exit else _exit_status(error)
    except BaseException as error:  # noqa: BLE001 (whatever the program raises ends up in its stderr)
        status = 1
        _report(error, source, note)
    status = _finish(stdout, status)
    leave(status)


def _exit_status(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def _report(error: BaseException, source: bytes, note: mmap.mmap) -> None:
    tb = error.__traceback__.tb_next if error.__traceback__ else None
    if isinstance(error, MemoryError) and not _raised_by_program(tb):
        note[0] = 1
    try:
        _print(error, tb, source)
    except MemoryError:
        os.write(2, b"MemoryError\n")


def _print(error: BaseException, tb: types.TracebackType | None, source: bytes) -> None:
    traceback = _module("traceback")
    lines = source.decode("utf-8", "replace").splitlines(keepends=True)
    traceback.linecache.cache[PROGRAM_NAME] = (len(source), None, lines, PROGRAM_NAME)
    if sys.excepthook is not sys.__excepthook__:
        sys.excepthook(type(error), error, tb)
        return
    report = traceback.TracebackException(type(error), error, tb)
    own = [frame for frame in report.stack if not frame.filename.startswith(f"{_HARNESS}/")]
    report.stack = traceback.StackSummary.from_list(own)
    report.print()


def _raised_by_program(tb: types.TracebackType | None) -> bool:
    """Whether the innermost frame raised by a ``raise`` statement (or there is none), not by a failed allocation."""
    if tb is None:
        return False
    while tb.tb_next is not None:
        tb = tb.tb_next
    return tb.tb_frame.f_code.co_code[tb.tb_lasti] == _RAISE


def _finish(stdout: typing.TextIO, status: int) -> int:
    try:
        threading = sys.modules.get("threading")
        if threading is not None:
            threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        stdout.flush()
    except BaseException:  # noqa: BLE001 (as the interpreter does: a failed flush at exit is status 120)
        return status or 120
    try:
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001
        return status or 120
    return status
