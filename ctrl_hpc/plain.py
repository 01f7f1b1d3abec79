"""Plain data of Python as JSON that people read and write: what JSON lacks is tagged, all else is as it is.

This is the form of problem files. What crosses between a hostile program and its judge has a stricter one, in which
every dictionary is tagged (:mod:`ctrl_hpc.sandbox.inside.plain`).
"""

from __future__ import annotations

import base64
from typing import Any

_COLLECTIONS = {"__tuple__": tuple, "__set__": set, "__frozenset__": frozenset}


def encode_plain(value: Any) -> Any:
    """As JSON data: tuples, sets, complex, bytes and non-string keys tagged; raises ValueError for anything else."""
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if isinstance(value, list):
        return [encode_plain(item) for item in value]
    if isinstance(value, (tuple, set, frozenset)):
        items = value if isinstance(value, tuple) else sorted(value, key=repr)
        return {"__" + type(value).__name__ + "__": [encode_plain(item) for item in items]}
    if isinstance(value, bytes):
        return {"__bytes__": base64.b64encode(value).decode("ascii")}
    if isinstance(value, complex):
        return {"__complex__": [value.real, value.imag]}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("__") for key in value):
            return {key: encode_plain(item) for key, item in value.items()}
        return {"__dict__": [[encode_plain(key), encode_plain(item)] for key, item in value.items()]}
    raise ValueError(f"a {type(value).__name__} cannot be an argument or result of a function test")


def decode_plain(value: Any) -> Any:
    """The inverse of :func:`encode_plain`."""
    if isinstance(value, list):
        return [decode_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        ((tag, items),) = value.items()
        if tag == "__bytes__":
            return base64.b64decode(items)
        if tag == "__complex__":
            return complex(*items)
        if tag == "__dict__":
            return {decode_plain(key): decode_plain(item) for key, item in items}
        if tag in _COLLECTIONS:
            return _COLLECTIONS[tag](decode_plain(item) for item in items)
    return {key: decode_plain(item) for key, item in value.items()}
