"""Records to JSON lines and back, strictly: an unknown, missing or ill-typed field names file, line and field."""

from __future__ import annotations

import functools
import gzip
import json
import os
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, SchemaSerializer, SchemaValidator

sys.set_int_max_str_digits(100_000)  # benchmarks hold integers of more than the interpreter's 4300 digits
_GZIP_LEVEL = 4
_EXPECTED = {"string_type": "str", "bool_type": "bool", "int_type": "int", "int_from_float": "int",
             "float_type": "float", "tuple_type": "a list", "dataclass_type": "an object"}  # fmt: skip


@functools.cache
def _schema(cls: Any) -> Any:
    return _as_written(TypeAdapter(cls).core_schema)


@functools.cache
def _writer(cls: Any) -> SchemaSerializer:
    return SchemaSerializer(_schema(cls))


@functools.cache
def _reader(cls: Any) -> SchemaValidator:
    return SchemaValidator(_schema(cls))


def _as_written(schema: Any) -> Any:
    """The schema of a record in JSON: types are exact, fields known, lists are tuples, None of "X | None" is absent."""
    if isinstance(schema, list):
        return [_as_written(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: _as_written(item) for key, item in schema.items()}
    if out.get("type") == "dataclass":
        out |= {"strict": False, "config": {"strict": True, "extra_fields_behavior": "forbid"}}
    elif out.get("type") == "tuple":
        out["strict"] = False
    elif out.get("type") == "dataclass-field":
        inner = out["schema"]["schema"] if out["schema"]["type"] == "default" else out["schema"]
        if inner["type"] == "nullable":
            out["schema"] = {"type": "default", "schema": inner, "default": None}
            out["serialization_exclude_if"] = _is_none
    return out


def _is_none(value: Any) -> bool:
    return value is None


def encode(value: Any) -> Any:
    """A record, or a list of them, as JSON-ready data; a None that says unknown is left out."""
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    cls: Any = type(value)
    return _writer(cls).to_python(value, by_alias=True, warnings=False)


def decode(cls: Any, data: Any, where: str = "") -> Any:
    """JSON data as a record of type ``cls``; raises ValueError naming the field (``where``) that does not fit."""
    try:
        return _reader(cls).validate_python(data)
    except ValidationError as error:
        raise ValueError(_told(cls, error, where)) from None


def _told(cls: Any, error: ValidationError, where: str) -> str:
    """The first thing that is wrong: where, what is expected, what is there."""
    first = error.errors(include_url=False)[0]
    kind, place, given = first["type"], first["loc"], first["input"]
    path, owner = _place(cls, place[:-1] if kind == "unexpected_keyword_argument" else place, where)
    if kind == "missing":
        return f"{path}: missing"
    if kind == "unexpected_keyword_argument":
        allowed = ", ".join(sorted(_fields(owner)))
        return f"{path + '.' if path else ''}{place[-1]}: unknown field; allowed: {allowed}"
    if kind.startswith("union_tag"):
        tag = given.get("kind") if isinstance(given, dict) else None
        return f"{path}.kind: {tag!r} is not one of {', '.join(_kinds(owner))}"
    if kind == "literal_error":
        return f"{path}: {given!r} is not one of {', '.join(_literals(owner))}"
    text = repr(given)
    there = f"got {type(given).__name__} {text if len(text) <= 40 else text[:37] + '...'}"
    if kind in _EXPECTED:
        return f"{path or cls.__name__}: expected {_EXPECTED[kind]}, {there}"
    return f"{path}: {first['msg'].removeprefix('Value error, ')}, {there}"


def _place(cls: Any, location: tuple[int | str, ...], path: str) -> tuple[str, Any]:
    """A location as a path from ``path`` on, and the type there."""
    here: Any = cls
    for part in location:
        if isinstance(part, int):
            path, here = f"{path}[{part}]", _bare(typing.get_args(here)[0])
        elif typing.get_origin(here) is None:
            path, here = f"{path}.{part}" if path else part, _bare(_fields(here)[part])
        else:  # a member of a union, named by its kind
            here = _kinds(here)[part]
    return path, here


def _bare(hint: Any) -> Any:
    """A type without annotations and None."""
    if typing.get_origin(hint) is Annotated:
        return _bare(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        return _bare(members[0]) if len(members) == 1 else hint
    return hint


@functools.cache
def _fields(cls: Any) -> dict[str, Any]:
    """Type of each field of a record, by its name in JSON."""
    out = {}
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        marks = typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()
        out[next((mark.alias for mark in marks if getattr(mark, "alias", None)), name)] = hint
    return out


def _kinds(union: Any) -> dict[str, Any]:
    """The members of a union of records, by their ``kind``."""
    members = [_bare(member) for member in typing.get_args(union)]
    return {_literals(_fields(member)["kind"])[0]: member for member in members}


def _literals(hint: Any) -> list[str]:
    out: list[str] = []
    for item in typing.get_args(hint):
        out.extend(_literals(item) if typing.get_origin(item) is typing.Literal else [str(item)])
    return out


def well_formed(text: str) -> str:
    """The text with surrogate pairs joined and lone surrogates replaced by U+FFFD, so that it can be encoded."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def iterate[R](cls: type[R], path: str | Path) -> Iterator[R]:
    """The records of a JSONL file, compressed where its name ends in ``.gz``; a byte order mark and blank lines are
    skipped.

    A bad line raises ValueError "FILE:LINE: field: ...".
    """
    zipped = str(path).endswith(".gz")
    with gzip.open(path, "rt", encoding="utf-8-sig") if zipped else open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = _parse(cls, line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from None
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
            yield record


def _parse(cls: Any, line: str) -> Any:
    try:
        return _reader(cls).validate_json(line)
    except ValidationError:  # a wrong line, or one with lone surrogates, which only ``json`` reads
        return decode(cls, _loads(line))


def _loads(line: str) -> Any:
    try:
        return json.loads(line)
    except RecursionError:
        raise ValueError("not JSON that can be read: nested too deeply") from None


def parse(cls: Any, content: bytes) -> Any:
    """JSON bytes as a record of type ``cls``; raises ValueError naming what does not fit."""
    return _parse(cls, content.decode("utf-8", "surrogatepass"))


def content(value: Any, cls: Any = None) -> bytes:
    """A record, or a value of type ``cls``, as JSON bytes; the same for equal values."""
    kind: Any = cls or type(value)
    writer = _writer(kind)
    try:
        return writer.to_json(value, by_alias=True, warnings=False)
    except (PydanticSerializationError, UnicodeEncodeError):  # lone surrogates, which only ``json`` writes
        data = writer.to_python(value, by_alias=True, warnings=False)
        return json.dumps(data, separators=(",", ":")).encode()


def read[R](cls: type[R], path: str | Path) -> list[R]:
    """All records of a JSONL file."""
    return list(iterate(cls, path))


def line(record: Any) -> str:
    """A record as one JSON line, newline included."""
    return json.dumps(encode(record), separators=(",", ":")) + "\n"


def write(path: str | Path, records: Iterable[Any]) -> None:
    """Write records so that the file is either whole or absent (written beside, then renamed).

    Compressed where the name ends in ``.gz``; equal records give equal bytes.
    """
    _write(path, map(line, records))


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically: synced beside its place, then renamed over it."""
    _write(path, [text])


def _write(path: str | Path, parts: Iterable[str]) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            lines = (text.encode() for text in parts)
            if path.suffix == ".gz":
                with gzip.GzipFile("", "wb", _GZIP_LEVEL, file, mtime=0) as zipped:
                    zipped.writelines(lines)
            else:
                file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def integer_keys(value: Any) -> Any:
    """A dictionary whose keys are all written as integers, with integers as its keys, which JSON forces to be text."""
    if not isinstance(value, dict):
        return value
    try:
        return {int(key): item for key, item in value.items()}
    except ValueError:
        return value
