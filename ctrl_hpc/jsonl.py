"""Records to JSON lines and back, strictly: an unknown, missing or ill-typed field names file, line and field."""

from __future__ import annotations

import base64
import dataclasses
import functools
import json
import os
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ctrl_hpc.records import AssertTest, FunctionTest, StdinTest

sys.set_int_max_str_digits(100_000)  # benchmarks hold integers of more than the interpreter's 4300 digits
KINDS: dict[str, type] = {"stdin": StdinTest, "assert": AssertTest, "function": FunctionTest}
"""The ``kind`` of a test case in a problem file."""
_RENAMED: dict[tuple[type, str], str] = {(StdinTest, "expected_stdout"): "stdout"}
_FREE_FORM: set[tuple[type, str]] = {(FunctionTest, "args"), (FunctionTest, "expected")}


def encode(value: Any) -> Any:
    """A record as JSON-ready data. Bytes become base64 under ``{"base64": ...}``; None fields are left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        out: dict[str, Any] = {}
        for kind, cls in KINDS.items():
            if isinstance(value, cls):
                out["kind"] = kind
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            key = _RENAMED.get((type(value), field.name), field.name)
            if (type(value), field.name) in _FREE_FORM:
                out[key] = encode_plain(list(item) if field.name == "args" else item)
            elif item is not None:
                out[key] = encode(item)
        return out
    if isinstance(value, bytes):
        return {"base64": base64.b64encode(value).decode("ascii")}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return value


def encode_plain(value: Any) -> Any:
    """Function arguments and results: JSON, with tuples, sets, complex, bytes and non-string keys tagged."""
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
        if tag in ("__tuple__", "__set__", "__frozenset__"):
            make = {"__tuple__": tuple, "__set__": set, "__frozenset__": frozenset}[tag]
            return make(decode_plain(item) for item in items)
    return {key: decode_plain(item) for key, item in value.items()}


def decode(cls: Any, data: Any, where: str = "") -> Any:
    """JSON data as a value of type ``cls``; raises ValueError naming the field (``where``) that does not fit."""
    origin = typing.get_origin(cls)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(cls, data, where)
    if origin is typing.Literal:
        allowed = _literals(cls)
        if data not in allowed:
            raise ValueError(f"{where}: {data!r} is not one of {', '.join(map(str, allowed))}")
        return data
    if origin is tuple:
        if not isinstance(data, list):
            raise ValueError(f"{where}: expected a list, got {_short(data)}")
        element = typing.get_args(cls)[0]
        return tuple(decode(element, item, f"{where}[{i}]") for i, item in enumerate(data))
    if dataclasses.is_dataclass(cls):
        return _decode_record(cls, data, where)
    if cls is bytes:
        if not (isinstance(data, dict) and set(data) == {"base64"}):
            raise ValueError(f"{where}: expected base64 bytes, got {_short(data)}")
        return base64.b64decode(data["base64"])
    if cls is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if cls is Any:
        return data
    if not isinstance(data, cls) or (cls is int and isinstance(data, bool)):
        raise ValueError(f"{where}: expected {cls.__name__}, got {_short(data)}")
    return data


def _literals(cls: Any) -> list[Any]:
    out: list[Any] = []
    for item in typing.get_args(cls):
        out.extend(_literals(item) if typing.get_origin(item) is typing.Literal else [item])
    return out


def _short(data: Any) -> str:
    text = repr(data)
    return f"{type(data).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


def _decode_union(cls: Any, data: Any, where: str) -> Any:
    members = [member for member in typing.get_args(cls) if member is not type(None)]
    if data is None and type(None) in typing.get_args(cls):
        return None
    if len(members) == 1:
        return decode(members[0], data, where)
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind not in KINDS:
        raise ValueError(f"{where}.kind: {kind!r} is not one of {', '.join(KINDS)}")
    return _decode_record(KINDS[kind], {key: item for key, item in data.items() if key != "kind"}, where)


@functools.cache
def _type_hints(cls: Any) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _decode_record(cls: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{where or cls.__name__}: expected an object, got {_short(data)}")
    hints = _type_hints(cls)
    values: dict[str, Any] = {}
    known = set()
    for field in dataclasses.fields(cls):
        key = _RENAMED.get((cls, field.name), field.name)
        known.add(key)
        path = f"{where}.{key}" if where else key
        if key not in data:
            if type(None) in typing.get_args(hints[field.name]):
                values[field.name] = None  # None fields are left out when written
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                raise ValueError(f"{path}: missing")
        elif (cls, field.name) in _FREE_FORM:
            plain = decode_plain(data[key])
            if field.name == "args" and not isinstance(plain, list):
                raise ValueError(f"{path}: expected a list, got {_short(plain)}")
            values[field.name] = tuple(plain) if field.name == "args" else plain
        else:
            values[field.name] = decode(hints[field.name], data[key], path)
    unknown = sorted(set(data) - known)
    if unknown:
        raise ValueError(
            f"{where + '.' if where else ''}{unknown[0]}: unknown field; allowed: {', '.join(sorted(known))}"
        )
    return cls(**values)


def iterate[R](cls: type[R], path: str | Path) -> Iterator[R]:
    """The records of a JSONL file; blank lines are skipped; a bad line raises ValueError "FILE:LINE: field: ..."."""
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                data = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from None
            try:
                yield decode(cls, data)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None


def read[R](cls: type[R], path: str | Path) -> list[R]:
    """All records of a JSONL file."""
    return list(iterate(cls, path))


def line(record: Any) -> str:
    """A record as one JSON line, newline included."""
    return json.dumps(encode(record), separators=(",", ":")) + "\n"


def write(path: str | Path, records: Iterable[Any]) -> None:
    """Write records so that the file is either whole or absent (written beside, then renamed)."""
    write_text(path, "".join(map(line, records)))


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically: synced beside its place, then renamed over it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with open(part, "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(part, path)
