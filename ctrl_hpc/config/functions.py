"""Functions of the user's own, which a key names as FILE.py:FUNCTION."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any


def is_function(place: str) -> bool:
    """Whether a place is FILE.py:FUNCTION of a file that exists and names it at its top; the file is not run."""
    file, _, function = place.rpartition(":")
    if not (file.endswith(".py") and Path(file).is_file() and function.isidentifier()):
        return False
    try:
        body = ast.parse(Path(file).read_bytes()).body
    except (SyntaxError, ValueError):
        return False
    return any(name in (function, "*") for node in body for name in _names(node))


def _names(node: ast.stmt) -> list[str]:
    """What a statement defines or imports; ``*`` where that is not told."""
    match node:
        case ast.FunctionDef() | ast.ClassDef():
            return [node.name]
        case ast.Import() | ast.ImportFrom():
            return [alias.asname or alias.name for alias in node.names]
        case ast.Assign():
            return [name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case ast.If() | ast.Try() | ast.With() | ast.For():
            return ["*"]
    return []


@cache
def load_function(key: str, place: str) -> Callable[..., Any]:
    """As :func:`read_function`; the file is run once in a process."""
    return read_function(key, place)


def read_function(key: str, place: str) -> Callable[..., Any]:
    """The function at a place, FILE.py:FUNCTION, that a key names, by the file as it is now.

    Raises ValueError, with the key, where there is none.
    """
    file, _, name = place.rpartition(":")
    found = importlib.util.spec_from_file_location(f"ctrl_hpc_{re.sub(r'\W', '_', key)}", file)
    if found is None or found.loader is None or not Path(file).is_file():
        raise ValueError(f"{key}: {place} is not FILE.py:FUNCTION of a file that exists")
    module = importlib.util.module_from_spec(found)
    try:
        found.loader.exec_module(module)
    except Exception as error:
        raise ValueError(f"{key}: {file} fails: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{key}: {file} defines no function {name}")
    return function  # type: ignore[no-any-return]
