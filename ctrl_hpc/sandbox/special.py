"""Special judges: functions of the user's that say whether an output is right where comparing texts cannot.

Each has a name, and a place ``FILE.py:FUNCTION``; the function is ``(stdout, expected, stdin) -> bool``, all bytes, as
those of :data:`ctrl_hpc.sandbox.judge.COMPARISONS`. It is trusted: it runs in the executor, outside the jail.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
from collections.abc import Mapping
from pathlib import Path

from ctrl_hpc.sandbox.judge import COMPARISONS, Comparison


def load(places: Mapping[str, str]) -> dict[str, Comparison]:
    """The judges by name, from their places; ValueError says which of them cannot be had and why."""
    return {name: _load(name, place) for name, place in places.items()}


def _load(name: str, place: str) -> Comparison:
    file, _, function = place.rpartition(":")
    if not name.isidentifier() or not function.isidentifier() or not file.endswith(".py"):
        raise ValueError(f"judge {name}: {place!r} is not FILE.py:FUNCTION")
    if name in COMPARISONS:
        raise ValueError(f"judge: {name} is a comparison already")
    path = Path(file).absolute()
    if not path.is_file():
        raise ValueError(f"judge {name}: there is no file {path}")
    found = importlib.util.spec_from_file_location(f"ctrl_hpc_judge_{name}", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"judge {name}: {path} fails: {type(error).__name__}: {error}") from error
    compare = getattr(module, function, None)
    if not callable(compare):
        raise ValueError(f"judge {name}: {path} defines no function {function}")
    return compare  # type: ignore[no-any-return]


def digest(judges: Mapping[str, Comparison]) -> str:
    """A hash of the judges' names and files, which verdicts depend on. Raises ValueError where a source is unknown."""
    total = hashlib.sha256()
    for name, compare in sorted(judges.items()):
        try:
            source = Path(inspect.getsourcefile(compare) or "").read_bytes()
        except (TypeError, OSError):
            raise ValueError(f"judge {name}: verdicts of a function without a source file cannot be cached") from None
        total.update(f"{name}={compare.__qualname__}:{len(source)}\n".encode() + source)
    return total.hexdigest()
