"""The solution's side of a call: reads requests, calls the solution's functions, writes plain data back.

This side is untrusted, as the solution can replace anything in its process: the receiver believes nothing but data.

Requests: ``{"name"}`` asks what a global is, with ``"args"`` and ``"kwargs"`` calls it; ``"object"`` beside them means
an attribute of an instance made before, ``"method"`` one of the class ``Solution`` where there is such a method.
``"modules"`` asks whether it is that of one of these modules, whose name is then the reply's ``library``.
``"set"`` sets that attribute. Replies: one of ``value``, ``callable``, ``class`` and ``raise`` (with the ``bases`` of
exceptions), ``module``, ``object`` (the number of what stays here), ``missing``, ``unsupported``; beside what a call
gave, ``changed`` holds the arguments that it changed in place.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections import deque
from typing import Any

import plain

_REQUEST_FD, _REPLY_FD = 3, 4
_CHANGEABLE = (list, dict, set, bytearray, deque)
_NOTHING = object()
_KEPT = ("solution", "re")
"""Modules whose classes' instances may stay here while the test holds their numbers."""


def serve(namespace: dict[str, Any], given: dict[str, Any]) -> None:
    """Answer requests, one JSON line each, until the other side closes.

    ``given`` is what the namespace held before the program ran: a name that still means the same is not the solution's.
    """
    instances: list[Any] = []
    own = {name: value for name, value in namespace.items() if name not in given or given[name] is not value}
    with open(_REQUEST_FD, "rb") as requests, open(_REPLY_FD, "wb") as replies:
        for line in requests:
            reply = _answer(own, instances, json.loads(line))
            replies.write(json.dumps(reply, separators=(",", ":")).encode() + b"\n")
            replies.flush()


def _answer(namespace: dict[str, Any], instances: list[Any], request: dict[str, Any]) -> dict[str, Any]:
    try:
        found, value = _lookup(namespace, instances, request)
        if "set" in request:
            setattr(instances[request["object"]], request["name"], _received(request["set"], instances))
            return {"value": None}
        if not found:
            return {"missing": request["name"]}
        for module in request.get("modules", ()):
            if getattr(sys.modules.get(module), request["name"], _NOTHING) is value:
                return {"library": module}
        if "args" in request:
            return _called(value, request, instances)
        if isinstance(value, type):
            return {"class": True, **({"bases": _bases(value)} if issubclass(value, Exception) else {})}
        if isinstance(value, type(json)):
            return {"module": value.__name__}
        return {"callable": True} if callable(value) else _told(value, instances)
    except plain.Unsupported as error:
        return {"unsupported": str(error)}
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 (the caller raises it again)
        return _raised(error)


def _called(value: Any, request: dict[str, Any], instances: list[Any]) -> dict[str, Any]:
    """What calling gives, or raises, and what became of arguments that it changed."""
    sent = {**dict(enumerate(request["args"])), **request.get("kwargs", {})}
    given = {key: _received(item, instances) for key, item in sent.items()}
    arguments = [given[index] for index in range(len(request["args"]))]
    keywords = {key: item for key, item in given.items() if isinstance(key, str)}
    try:
        result = value(*arguments, **keywords)
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 (the caller raises it again)
        reply = _raised(error)
    else:
        reply = _told(result, instances, always=isinstance(value, type))
    changed = {}
    for key, item in given.items():
        if (
            isinstance(item, _CHANGEABLE)
            and not _holds_instance(sent[key])
            and (now := plain.encode(item)) != sent[key]
        ):
            changed[str(key)] = now
    return {**reply, "changed": changed} if changed else reply


def _holds_instance(data: Any) -> bool:
    if isinstance(data, dict):
        return "instance" in data or _holds_instance(data.get("tuple"))
    return isinstance(data, list) and any(map(_holds_instance, data))


def _told(value: Any, instances: list[Any], always: bool = False) -> dict[str, Any]:
    """A value as data; an object of the solution's own classes, or a match of a pattern, stays here under a number."""
    try:
        return {"value": plain.encode(value)}
    except plain.Unsupported:
        if not (always or type(value).__module__ in _KEPT):
            raise
        instances.append(value)
        return {"object": len(instances) - 1}


def _received(data: Any, instances: list[Any]) -> Any:
    """The inverse of what the caller encodes: data, among which may be instances by their numbers."""
    if isinstance(data, list):
        return [_received(item, instances) for item in data]
    if isinstance(data, dict) and "instance" in data:
        return instances[data["instance"]]
    if isinstance(data, dict) and "tuple" in data:
        return tuple(_received(item, instances) for item in data["tuple"])
    return plain.decode(data)


def _bases(kind: type) -> list[str]:
    """The names of an exception's class and of those it comes from, up to the first built-in one."""
    names = []
    for base in kind.__mro__:
        if issubclass(base, BaseException):
            names.append(base.__name__)
            if base.__module__ == "builtins":
                break
    return names


def _raised(error: Exception) -> dict[str, Any]:
    """The exception as data; its traceback goes to stderr, from the solution's own frame on."""
    traceback.print_exception(type(error), error, error.__traceback__ and error.__traceback__.tb_next)
    messages = [item for item in error.args if isinstance(item, (str, int, float))]
    return {
        "raise": type(error).__name__,
        "bases": _bases(type(error)),
        "args": [plain.encode(item) for item in messages],
    }


def _lookup(namespace: dict[str, Any], instances: list[Any], request: dict[str, Any]) -> tuple[bool, Any]:
    """A global of the solution; where the problem asks for a method, one of its ``Solution`` class before it.

    There a helper may have the method's name. A test's own code finds what Python would: methods only behind the class.
    """
    name = request["name"]
    if "object" in request:
        instance = instances[request["object"]]
        return hasattr(instance, name), getattr(instance, name, None)
    solution_class: Any = namespace.get("Solution")
    if request.get("method") and isinstance(solution_class, type) and hasattr(solution_class, name):
        return True, getattr(solution_class(), name)
    return name in namespace, namespace.get(name)
