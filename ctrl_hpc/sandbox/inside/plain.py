"""Plain data as JSON lines between a solution and its judge, inside the jail and outside; standard library only.

What crosses: None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, range, deque, Decimal,
Fraction, numpy's scalars, the plain types themselves and finite iterators. Subclasses cross as their plain base, so no
method of the sender ever runs at the receiver. Everything else raises :class:`Unsupported`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

MAX_DEPTH = 60
MAX_ITEMS = 1_000_000
_BIG = 1 << 62
_TYPES = (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict)


class Unsupported(Exception):
    """A value that cannot cross, or a message that is not well formed."""


def dumps(value: object) -> str:
    """A value as one line of JSON."""
    return json.dumps(encode(value), separators=(",", ":"))


def loads(text: str | bytes) -> object:
    """The value of one line of JSON, made of exact built-in types only; raises Unsupported on anything else."""
    try:
        return decode(json.loads(text))
    except (ValueError, TypeError, KeyError, ArithmeticError, RecursionError, AttributeError) as error:
        raise Unsupported(f"malformed value: {type(error).__name__}") from None


class NumpyBool(int):
    """numpy's bool where numpy is not: it equals True or False, and is neither."""

    __slots__ = ()

    def __str__(self) -> str:
        return str(bool(self))

    def __repr__(self) -> str:
        return f"np.{self}_"


def encode(value: object, depth: int = 0) -> object:
    """A value as JSON data; what JSON lacks becomes ``{"TAG": ...}``, and every dictionary is tagged."""
    if depth > MAX_DEPTH:
        raise Unsupported("nested too deeply")
    if value is None or value is True or value is False:
        return value
    if isinstance(value, NumpyBool):
        return {"numpy_bool": bool(value)}
    if isinstance(value, int):
        number = int(value)
        return number if -_BIG < number < _BIG else {"int": hex(number)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {type(value).__name__ if type(value) is bytearray else "bytes": value.hex()}
    if isinstance(value, dict):
        return {"dict": [[encode(key, depth + 1), encode(item, depth + 1)] for key, item in dict.items(value)]}
    return _encode_collection(value, depth)


def _encode_collection(value: Any, depth: int) -> object:
    base: Any
    for base in (list, tuple, set, frozenset):
        if isinstance(value, base):
            items = [encode(item, depth + 1) for item in base.__iter__(value)]
            return items if base is list else {base.__name__: items}
    name = type(value).__name__
    if isinstance(value, type) and value in _TYPES:
        return {"type": value.__name__}
    if isinstance(value, range):
        return {"range": [encode(value.start), encode(value.stop), encode(value.step)]}
    if name == "deque":
        return {"deque": [encode(item, depth + 1) for item in value]}
    if name in ("Decimal", "Fraction"):
        return {name: str(value)}
    if name in ("dict_keys", "dict_values", "dict_items"):
        return {name: [encode(item, depth + 1) for item in value]}
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        item = value.item()
        return {"numpy_bool": item} if item is True or item is False else encode(item, depth + 1)
    if hasattr(type(value), "__next__"):
        return {"iterator": [encode(item, depth + 1) for item in _bounded(value)]}
    raise Unsupported(f"a value of type {name} cannot cross")


def _bounded(iterator: Iterator[Any]) -> Iterator[Any]:
    for count, item in enumerate(iterator):
        if count >= MAX_ITEMS:
            raise Unsupported(f"an iterator of more than {MAX_ITEMS} items")
        yield item


def decode(data: object) -> object:
    """The inverse of :func:`encode`; iterators come back as one-shot iterators over their items."""
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    if isinstance(data, list):
        return [decode(item) for item in data]
    if not isinstance(data, dict) or len(data) != 1:
        raise Unsupported("malformed value")
    ((tag, body),) = data.items()
    if tag not in _DECODERS:
        raise Unsupported(f"unknown tag {tag[:20]!r}")
    return _DECODERS[tag](body)


def _items(body: Any) -> list[Any]:
    if not isinstance(body, list):
        raise Unsupported("malformed value")
    return [decode(item) for item in body]


def _integer(body: Any) -> int:
    return int(body, 16)


def _deque(body: Any) -> object:
    from collections import deque

    return deque(_items(body))


def _decimal(body: Any) -> object:
    from decimal import Decimal

    if not isinstance(body, str) or len(body) > 4000:
        raise Unsupported("malformed value, or a number too long")
    return Decimal(body)


def _fraction(body: Any) -> object:
    from fractions import Fraction

    if not isinstance(body, str) or len(body) > 4000 or "e" in body.lower():
        raise Unsupported("malformed value, or a number too long")
    return Fraction(body)


_DECODERS: dict[str, Callable[[Any], object]] = {
    "int": _integer,
    "type": lambda body: {kind.__name__: kind for kind in _TYPES}[body],
    "numpy_bool": lambda body: NumpyBool(body is True),
    "complex": lambda body: complex(*body),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "dict": lambda body: {decode(key): decode(item) for key, item in body},
    "tuple": lambda body: tuple(_items(body)),
    "set": lambda body: set(_items(body)),
    "frozenset": lambda body: frozenset(_items(body)),
    "range": lambda body: range(*_items(body)),
    "deque": _deque,
    "Decimal": _decimal,
    "Fraction": _fraction,
    "dict_keys": lambda body: dict.fromkeys(_items(body)).keys(),
    "dict_values": lambda body: dict(enumerate(_items(body))).values(),
    "dict_items": lambda body: dict(_items(body)).items(),
    "iterator": lambda body: iter(_items(body)),
}
