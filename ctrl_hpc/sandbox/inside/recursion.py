"""Recursion through C as deep as the stack allows.

CPython 3.12 and 3.13 count calls that go through C (``lru_cache``, ``sum`` of a generator, ``sorted`` by a key,
``__lt__``, ...) against a constant of their own, which ``sys.setrecursionlimit`` does not reach: 500 to 3300 levels
where other versions, and so all judges, allow tens of thousands. The count is a field of the thread's state
(``c_recursion_remaining`` in ``Include/cpython/pystate.h``), beside the limit that can be set, by which it is found.
"""

from __future__ import annotations

import _thread
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_VERSIONS = ((3, 12), (3, 13))
_PROBED_LIMIT = 7919
_LARGEST_COUNT = 1 << 16
_SEARCHED_BYTES = 256
_PLENTY = 1 << 30
_INT_BYTES = 4
_PYTHON_API = 1 | 4  # FUNCFLAG_CDECL | FUNCFLAG_PYTHONAPI

_Int: Any = None
_state: Any = None
"""A C integer at an address, and the address of the running thread's state."""
_offset = 0
"""Of the count in a thread's state; 0 where it was not found, or there is none."""


def prepare() -> None:
    """Find the count; later calls of :func:`lift` cost next to nothing."""
    global _offset, _state, _Int
    if sys.version_info[:2] not in _VERSIONS:
        return
    import _ctypes as library

    _ctypes: Any = library

    class Int(_ctypes._SimpleCData):
        _type_ = "i"

    class Pointer(_ctypes._SimpleCData):
        _type_ = "P"

    class Function(_ctypes.CFuncPtr):
        _flags_ = _PYTHON_API
        _restype_ = Pointer

    _Int, _state = Int, Function(_ctypes.dlsym(_ctypes.dlopen(None, 0), "PyThreadState_Get"))
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(_PROBED_LIMIT)
    start = _state()
    ints = [Int.from_address(start + at).value for at in range(0, _SEARCHED_BYTES, _INT_BYTES)]
    sys.setrecursionlimit(before)
    # In this order: calls left, their limit, calls through C left.
    found = [
        index + 1
        for index in range(1, len(ints) - 1)
        if ints[index] == _PROBED_LIMIT
        and 0 < ints[index] - ints[index - 1] < _PROBED_LIMIT
        and 0 < ints[index + 1] < _LARGEST_COUNT
    ]
    if len(found) == 1:
        _offset = found[0] * _INT_BYTES


def lift() -> None:
    """Let this thread, and those that start later, recurse through C until the stack ends."""
    if not _offset:
        return
    _lift_here()
    start = _thread.start_new_thread

    def start_new_thread(function: Callable[..., Any], *rest: Any) -> int:
        return start(_lifted(function), *rest)

    _thread.start_new_thread = _thread.start_new = start_new_thread  # type: ignore[assignment]
    joinable = getattr(_thread, "start_joinable_thread", None)
    if joinable is not None:
        _thread.start_joinable_thread = lambda function, **rest: joinable(_lifted(function), **rest)  # type: ignore
    threading: Any = sys.modules.get("threading")
    if threading is not None:
        for name in ("start_new_thread", "start_joinable_thread"):
            if hasattr(threading, f"_{name}"):
                setattr(threading, f"_{name}", getattr(_thread, name))


def _lift_here() -> None:
    _Int.from_address(_state() + _offset).value = _PLENTY


def _lifted(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        _lift_here()
        return function(*args, **kwargs)

    return run
